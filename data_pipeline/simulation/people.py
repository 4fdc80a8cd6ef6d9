"""The simulated participants: who they are, and how age, sex, disease and chance change each region of their brain.

Rates and effect sizes follow the literature on healthy ageing, Alzheimer's disease and schizophrenia: grey matter shrinks by
about 0.35 % a year at age 35 and by 0.85 % at 80, ventricles grow from 14 to about 48 ml over adult life, Alzheimer's
disease removes about a fifth of the hippocampus, schizophrenia about 2.6 % of the grey matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.simulation.atlas import REGIONS
from data_pipeline.simulation.settings import Simulation
from infra import random_streams

AGES = {"AD": (74.0, 7.0), "MCI": (72.0, 7.0), "SCZ": (34.0, 10.0), "BD": (38.0, 11.0)}  # mean and SD in years
AGE_LIMITS = (6.0, 90.0)
MEAN_TIV = 1450.0  # ml

# Ageing of a region in addition to that of all grey matter: insula and frontal lobes lose more, occipital lobes less.
AGEING_WEIGHT = {
    "insula": 0.55, "lateral_frontal": 0.35, "orbitofrontal": 0.25, "superior_temporal": 0.3, "precentral": 0.2,
    "anterior_cingulate": 0.2, "occipital": -0.5, "cerebellum": -0.2, "medial_temporal": -0.2, "thalamus": 0.1,
}  # fmt: skip
# Change of a region's grey matter at severity 1, in log units.
PATTERN: dict[str, dict[str, float]] = {
    "AD": {"hippocampus": -0.2, "medial_temporal": -0.12, "temporal": -0.06, "parietal": -0.05, "precuneus": -0.05},
    "SCZ": {"anterior_cingulate": -0.03, "insula": -0.025, "superior_temporal_left": -0.03, "temporal": -0.02,
            "hippocampus": -0.035},
}  # fmt: skip
ACCELERATION = {"AD": 7.0, "SCZ": 5.0}  # years by which the brain is older, at severity 1 and acceleration 1
VENTRICLES = {"AD": 0.12, "SCZ": 0.12}  # growth of the ventricles at severity 1, in log units
# Milder form -> its disease, and its share of that disease's effect.
MILDER = {"MCI": ("AD", 0.5), "BD": ("SCZ", 0.5)}
# Torque and language asymmetry, the same in everybody: right frontal, left occipital and left planum temporale are larger.
ASYMMETRY = {
    "lateral_frontal_right": 0.04, "occipital_left": 0.04, "superior_temporal_left": 0.06, "hippocampus_right": 0.03,
    "cerebellum_right": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Person:
    """A simulated participant: the values of participants.tsv, and the hidden causes."""

    number: int
    site: int
    sex: str
    diagnosis: str
    age: float  # at the first session, in years
    later: tuple[float, ...]  # years from the first session to each further one
    severity: float  # of the disease; 0 in healthy participants
    gap: float  # brain age minus age in years, before any disease
    log_tiv: float  # log of head size, relative to the mean
    log_ventricle: float
    regions: NDArray[np.float64]  # (R,) log deviations of the regions
    foci: NDArray[np.float64]  # (R + 1,) weights of mean 1 for a heterogeneous disease: of each region, and of ageing
    subtype: int  # of the disease, from 0
    travels: bool = False  # whether scanned on several scanners


@dataclass(frozen=True)
class Site:
    """A site: the age and sex of its participants, and the properties of its scanner."""

    mean_age: float
    age_spread: float  # standard deviation in years
    female: float  # share of women
    gain: float
    bias: float  # of grey-matter maps, in log units
    noise: float
    contrast: float  # between grey and white matter, relative to the mean site's
    blur: float  # standard deviation in mm
    t1_bias: float  # of T1-like images, in log units


def draw_people(
    participants: int, shares: dict[str, float], seed: int, *, sites: int = 12, subtypes: int = 1
) -> list[Person]:
    """Draw all participants of a cohort; participant n depends only on the arguments and on n."""
    counts = {name: round(participants * share) for name, share in shares.items()}
    diagnoses = [name for name, count in counts.items() for _ in range(count)]
    diagnoses += ["control"] * (participants - len(diagnoses))
    order = random_streams.generator(seed, random_streams.SIMULATED_ORDER).permutation(participants)
    return [
        _draw_person(n, diagnoses[order[n]], shares, seed=seed, sites=sites, subtypes=subtypes)
        for n in range(participants)
    ]


def _draw_person(
    number: int, diagnosis: str, shares: dict[str, float], *, seed: int, sites: int, subtypes: int
) -> Person:
    generator = random_streams.generator(seed, random_streams.SIMULATED_PERSON, (0, 0, number, 0))
    site_number = int(generator.integers(sites))
    site = site_of(site_number, seed)
    age_group = diagnosis
    if diagnosis == "control" and generator.random() < 0.35:
        # A third of the controls are recruited to match a patient group, and have its ages.
        patient_groups = [name for name in AGES if shares.get(name, 0) > 0]
        weights = np.array([shares[name] for name in patient_groups])
        if patient_groups:
            age_group = str(generator.choice(patient_groups, p=weights / weights.sum()))
    mean, spread = AGES.get(age_group, (site.mean_age, site.age_spread))
    age = float(np.clip(mean + spread * generator.standard_normal(), *AGE_LIMITS))
    female = generator.random() < (site.female if diagnosis != "SCZ" else 0.35)
    further_sessions = 0 if generator.random() > 0.15 else int(generator.integers(1, 3))
    later = tuple(np.round(np.cumsum(generator.uniform(0.8, 3.0, 2))[:further_sessions], 1).tolist())
    severity = float(np.clip(1.0 + 0.35 * generator.standard_normal(), 0.2, 2.2)) if diagnosis != "control" else 0.0
    deviations = 0.035 * generator.standard_normal(len(REGIONS))
    for name, value in zip(("hippocampus_left", "hippocampus_right"), generator.standard_normal(2), strict=True):
        deviations[REGIONS.index(name)] = 0.04 * value
    both_sides = 0.08 * generator.standard_normal()
    deviations[REGIONS.index("hippocampus_left")] += both_sides
    deviations[REGIONS.index("hippocampus_right")] += both_sides
    foci = random_streams.generator(seed, random_streams.SIMULATED_FOCI, (0, 0, number, 0))
    subtype = random_streams.generator(seed, random_streams.SIMULATED_SUBTYPE, (0, 0, number, 0)).integers(subtypes)
    return Person(
        number=number,
        site=site_number,
        sex="F" if female else "M",
        diagnosis=diagnosis,
        age=round(age, 1),
        later=later,
        severity=severity,
        gap=4.0 * float(generator.standard_normal()),
        log_tiv=(-0.06 if female else 0.06) + 0.085 * float(generator.standard_normal()),
        log_ventricle=0.32 * float(generator.standard_normal()),
        regions=deviations,
        foci=foci.standard_exponential(len(REGIONS) + 1),
        subtype=int(subtype),
    )


def site_of(site: int, seed: int, site_effects: float = 1.0) -> Site:
    """Draw a site; ``site_effects`` scales the scanner's gain, bias field and noise."""
    generator = random_streams.generator(seed, random_streams.SIMULATED_SITE, (0, 0, site, 0))
    return Site(
        mean_age=float(generator.choice([14.0, 22.0, 26.0, 30.0, 38.0, 52.0, 66.0])),
        age_spread=float(generator.uniform(5.0, 14.0)),
        female=float(generator.uniform(0.35, 0.65)),
        gain=float(np.exp(site_effects * 0.025 * generator.standard_normal())),
        bias=site_effects * float(generator.uniform(0.02, 0.06)),
        noise=site_effects * float(generator.uniform(0.015, 0.04)),
        contrast=float(generator.uniform(0.85, 1.15)),
        blur=float(generator.uniform(0.2, 0.9)),
        t1_bias=site_effects * float(generator.uniform(0.05, 0.2)),
    )


def change_with_age(person: Person, age: float, settings: Simulation) -> tuple[NDArray[np.float64], float, float]:
    """Compute how a participant's brain differs from the template at an age.

    Args:
        person: the participant.
        age: in years.
        settings: ``effect`` scales the disease. ``acceleration`` moves it from a pattern of regions (0) over half of each
            (1) to accelerated ageing (2). ``heterogeneity`` moves it from the same in every patient (0) to foci of each
            patient's own (1): each region, and the ageing, is then weighted by the patient's draw from an exponential
            distribution of mean 1, so that the mean over patients does not change. ``subtypes`` above 1 do the same for
            groups of patients.

    Returns:
        Log multipliers of grey matter: (R,) of each region, in addition to that of all grey matter; of all grey matter;
        and the log multiplier of ventricle volume.
    """
    disease, share = MILDER.get(person.diagnosis, (person.diagnosis, 1.0))
    severity = settings.effect * share * person.severity
    foci = 1.0 + settings.heterogeneity * (person.foci - 1.0)
    foci *= subtype_weights(settings.subtypes, settings.seed)[person.subtype]
    accelerated = severity * settings.acceleration * ACCELERATION.get(disease, 0.0) * float(foci[-1])
    brain_age = min(age + person.gap + accelerated, 105.0)
    whole = -_loss(brain_age, early=0.0030, late=0.0085, middle=55.0) + 0.16 / (1.0 + np.exp((brain_age - 16.0) / 5.0))
    regions = person.regions.copy()
    pattern = severity * (2.0 - settings.acceleration)
    changes = PATTERN.get(disease, {})
    for index, region in enumerate(REGIONS):
        base = region.removesuffix("_left").removesuffix("_right")
        if base == "hippocampus":
            regions[index] += -_loss(brain_age, early=0.0025, late=0.0140, middle=64.0) - whole
        regions[index] += whole * AGEING_WEIGHT.get(base, 0.0) + ASYMMETRY.get(region, 0.0)
        regions[index] += pattern * float(foci[index]) * changes.get(region, changes.get(base, 0.0))
    growth = _loss(brain_age, early=0.012, late=0.032, middle=55.0)
    ventricle = growth + person.log_ventricle + severity * VENTRICLES.get(disease, 0.0)
    return regions, float(whole), float(ventricle)


@lru_cache(maxsize=4)
def subtype_weights(subtypes: int, seed: int) -> NDArray[np.float64]:
    """Weights (subtypes, R + 1) of each region, and of ageing, in the subtypes of a disease; 1 on average over subtypes."""
    streams = [
        random_streams.generator(seed, random_streams.SIMULATED_SUBTYPES, (0, 0, number, 0))
        for number in range(subtypes)
    ]
    draws = np.stack([stream.standard_exponential(len(REGIONS) + 1) for stream in streams])
    return np.asarray(draws / draws.mean(axis=0))


def _loss(age: float, *, early: float, late: float, middle: float, width: float = 8.0) -> float:
    """Log units lost since age 20: ``early`` a year at first, ``late`` a year after age ``middle``, smoothly joined."""
    turn = np.logaddexp(0.0, (age - middle) / width) - np.logaddexp(0.0, (20.0 - middle) / width)
    return float(early * (age - 20.0) + (late - early) * width * turn)
