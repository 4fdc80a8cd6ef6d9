"""Who is simulated, and what age, sex, disease and chance do to each region of a brain.

The rates and effect sizes follow the literature on healthy ageing, Alzheimer's disease and schizophrenia: grey matter loses
about 0.35 % a year at 35 and 0.85 % at 80, ventricles grow from 14 to about 48 ml over adult life, Alzheimer's disease takes
about a fifth of the hippocampus, schizophrenia about 2.6 % of the grey matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.simulation.atlas import REGIONS
from infra.random_streams import SIMULATED_FOCI, SIMULATED_ORDER, SIMULATED_PERSON, SIMULATED_SITE, generator

Array = np.ndarray[Any, np.dtype[Any]]
DIAGNOSES = ("control", "AD", "MCI", "SCZ", "BD")
AGES = {"AD": (74.0, 7.0), "MCI": (72.0, 7.0), "SCZ": (34.0, 10.0), "BD": (38.0, 11.0)}
LIMITS = (6.0, 90.0)
MEAN_TIV = 1450.0
SITES = 12

# Ageing relative to the grey matter's mean: insula and frontal lobes lose more, occipital lobes less.
AGEING_WEIGHT = {
    "insula": 0.55, "lateral_frontal": 0.35, "orbitofrontal": 0.25, "superior_temporal": 0.3, "precentral": 0.2,
    "anterior_cingulate": 0.2, "occipital": -0.5, "cerebellum": -0.2, "medial_temporal": -0.2, "thalamus": 0.1,
}  # fmt: skip
# Log units at severity 1, and years by which the brain ages ahead.
PATTERN: dict[str, dict[str, float]] = {
    "AD": {"hippocampus": -0.2, "medial_temporal": -0.12, "temporal": -0.06, "parietal": -0.05, "precuneus": -0.05},
    "SCZ": {"anterior_cingulate": -0.03, "insula": -0.025, "superior_temporal_left": -0.03, "temporal": -0.02,
            "hippocampus": -0.035},
}  # fmt: skip
ACCELERATION = {"AD": 7.0, "SCZ": 5.0}
VENTRICLES = {"AD": 0.12, "SCZ": 0.12}
MILDER = {"MCI": ("AD", 0.5), "BD": ("SCZ", 0.5)}  # the same disease, so much of it
# Torque and language asymmetry, the same in everybody: right frontal, left occipital and left planum temporale are larger.
ASYMMETRY = {
    "lateral_frontal_right": 0.04, "occipital_left": 0.04, "superior_temporal_left": 0.06, "hippocampus_right": 0.03,
    "cerebellum_right": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Person:
    """One simulated participant: what participants.tsv says, and the hidden causes."""

    number: int
    site: int
    sex: str
    diagnosis: str
    age: float  # at the first session
    later: tuple[float, ...]  # years after it of further sessions
    severity: float
    gap: float  # years by which the brain is older than the person, before any disease
    log_tiv: float
    log_ventricle: float
    regions: Array  # (R,) log deviations
    foci: Array  # (R + 1,) weights of mean 1: what a disease of many faces makes of its regions, and of its ageing


def draw_people(participants: int, shares: dict[str, float], seed: int) -> list[Person]:
    """All participants of a cohort; person n depends on (participants, shares, seed, n) alone."""
    counts = {name: round(participants * share) for name, share in shares.items()}
    diagnoses = [name for name, count in counts.items() for _ in range(count)]
    diagnoses += ["control"] * (participants - len(diagnoses))
    order = generator(seed, SIMULATED_ORDER).permutation(participants)
    return [_draw_person(n, diagnoses[order[n]], shares, seed) for n in range(participants)]


def _draw_person(number: int, diagnosis: str, shares: dict[str, float], seed: int) -> Person:
    draws = generator(seed, SIMULATED_PERSON, (0, 0, number, 0))
    site = int(draws.integers(SITES))
    kind = diagnosis
    if diagnosis == "control" and draws.random() < 0.35:
        # A third of the controls were recruited beside patients, and are as old as these.
        kinds = [name for name in AGES if shares.get(name, 0) > 0]
        weights = np.array([shares[name] for name in kinds])
        kind = str(draws.choice(kinds, p=weights / weights.sum())) if kinds else diagnosis
    mean, spread = AGES[kind] if kind in AGES else site_of(site, seed)["age"]
    age = float(np.clip(mean + spread * draws.standard_normal(), *LIMITS))
    female = draws.random() < (site_of(site, seed)["female"] if diagnosis != "SCZ" else 0.35)
    sessions = 0 if draws.random() > 0.15 else int(draws.integers(1, 3))
    later = tuple(np.round(np.cumsum(draws.uniform(0.8, 3.0, 2))[:sessions], 1).tolist())
    severity = float(np.clip(1.0 + 0.35 * draws.standard_normal(), 0.2, 2.2)) if diagnosis != "control" else 0.0
    deviations = 0.035 * draws.standard_normal(len(REGIONS))
    for name, value in zip(("hippocampus_left", "hippocampus_right"), draws.standard_normal(2), strict=True):
        deviations[REGIONS.index(name)] = 0.04 * value
    both = 0.08 * draws.standard_normal()
    deviations[REGIONS.index("hippocampus_left")] += both
    deviations[REGIONS.index("hippocampus_right")] += both
    return Person(
        number, site, "F" if female else "M", diagnosis, round(age, 1), later, severity,
        4.0 * float(draws.standard_normal()), (-0.06 if female else 0.06) + 0.085 * float(draws.standard_normal()),
        0.32 * float(draws.standard_normal()), deviations,
        generator(seed, SIMULATED_FOCI, (0, 0, number, 0)).standard_exponential(len(REGIONS) + 1),
    )  # fmt: skip


def site_of(site: int, seed: int, strength: float = 1.0) -> dict[str, Any]:
    """What a site's people and scanner are like; ``strength`` scales how much a scanner does to its scans."""
    g = generator(seed, SIMULATED_SITE, (0, 0, site, 0))
    return {
        "age": (float(g.choice([14.0, 22.0, 26.0, 30.0, 38.0, 52.0, 66.0])), float(g.uniform(5.0, 14.0))),
        "female": float(g.uniform(0.35, 0.65)),
        "gain": float(np.exp(strength * 0.025 * g.standard_normal())),
        "bias": strength * float(g.uniform(0.02, 0.06)),
        "noise": strength * float(g.uniform(0.015, 0.04)),
        "contrast": float(g.uniform(0.85, 1.15)),
        "blur": float(g.uniform(0.2, 0.9)),
        "t1_bias": strength * float(g.uniform(0.05, 0.2)),
    }


def log_change(
    person: Person, age: float, effect: float, acceleration: float, heterogeneity: float = 0.0
) -> tuple[Array, float, float]:
    """Log multipliers of grey matter at an age: (R,) extra per region, one for all grey matter, and log ventricle size.

    ``effect`` scales disease; ``acceleration`` in 0..2 moves it from pattern (0) over both (1) to accelerated ageing (2).
    ``heterogeneity`` in 0..1 moves it from the same in every patient (0) to foci of each one's own (1): every region, and
    the ageing, then counts by a weight drawn for the patient from an exponential distribution of mean 1, so that the mean
    over patients stays.
    """
    name, part = MILDER.get(person.diagnosis, (person.diagnosis, 1.0))
    severity = effect * part * person.severity
    foci = 1.0 + heterogeneity * (person.foci - 1.0)
    ahead = severity * acceleration * ACCELERATION.get(name, 0.0) * float(foci[-1])
    older = min(age + person.gap + ahead, 105.0)
    general = -_loss(older, 0.0030, 0.0085, 55.0) + 0.16 / (1.0 + np.exp((older - 16.0) / 5.0))
    extra = person.regions.copy()
    pattern = severity * (2.0 - acceleration)
    for index, region in enumerate(REGIONS):
        base = region.removesuffix("_left").removesuffix("_right")
        if base == "hippocampus":
            extra[index] += -_loss(older, 0.0025, 0.0140, 64.0) - general
        extra[index] += general * AGEING_WEIGHT.get(base, 0.0) + ASYMMETRY.get(region, 0.0)
        changes = PATTERN.get(name, {})
        extra[index] += pattern * float(foci[index]) * changes.get(region, changes.get(base, 0.0))
    ventricle = _loss(older, 0.012, 0.032, 55.0) + person.log_ventricle + severity * VENTRICLES.get(name, 0.0)
    return extra, float(general), float(ventricle)


def _loss(age: float, early: float, late: float, middle: float, width: float = 8.0) -> float:
    """Log units lost since 20: ``early`` a year at first, ``late`` a year past ``middle``, with a soft turn."""
    turn = np.logaddexp(0.0, (age - middle) / width) - np.logaddexp(0.0, (20.0 - middle) / width)
    return float(early * (age - 20.0) + (late - early) * width * turn)
