"""The plan of the experiment in docs/experiments.md: size, cohorts, shards, pretrainings and tasks.

A clinic is a simulated cohort with patients. Encoders are pretrained on healthy cohorts and evaluated on clinics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXPERIMENT = "yaware-experiment"  # in MLflow
SITES = tuple(f"site{number:02d}" for number in range(12))
TEST_SITES = SITES[6:]  # of every clinic; no model is fitted to their scans
DISEASES = ("scz", "ad")
MAIN_CLINIC = "clinic-a1"  # primary comparisons, variants, networks trained end to end
NETWORK_TASK = "scz"  # the only task that networks are trained on end to end


@dataclass(frozen=True)
class ExperimentPlan:
    """The size of the experiment. The defaults are those of docs/experiments.md."""

    healthy: int = 3600  # participants of each pretraining cohort
    clinic: int = 5000  # participants of each clinic
    spacing: float = 6.0  # mm
    steps: int = 200  # of pretraining, 64 scans each
    seeds: int = 3  # pretrainings of each method
    variant_seeds: int = 2  # pretrainings of each variant
    sizes: tuple[int, ...] = (100, 500)  # labelled training scans
    draws: int = 20  # training sets of each size
    network_draws: tuple[int, ...] = (20, 5)  # for each size, the number of draws used by end-to-end training
    network_epochs: int = 15
    resamples: int = 1000
    seed: int = 41


@dataclass(frozen=True)
class Pretraining:
    """One encoder: ``method`` under ``variant`` (``main``: the unchanged recipe), pretrained on the shards ``data``."""

    method: str
    variant: str
    seed: int
    data: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A unique name; also the run's folder."""
        return f"{self.method}-{self.variant}-{self.seed}"


# Cohort -> settings that differ from the simulation's defaults. All clinics except clinic-sites share their healthy scans.
HEALTHY: dict[str, dict[str, Any]] = {"healthy": {}, "healthy-sites": {"site_effects": 3.0}}
CLINICS: dict[str, dict[str, Any]] = {
    "clinic-a0": {"acceleration": 0.0}, "clinic-a1": {"acceleration": 1.0}, "clinic-a2": {"acceleration": 2.0},
    "clinic-mixed": {"acceleration": 1.0, "heterogeneity": 1.0}, "clinic-sites": {"acceleration": 1.0, "site_effects": 3.0},
}  # fmt: skip
# Shards -> (cohort, scaling).
SHARDS = {name: (name, "tiv") for name in (*HEALTHY, *CLINICS)} | {
    "healthy-unscaled": ("healthy", "none"), "clinic-a1-unscaled": ("clinic-a1", "none"),
}  # fmt: skip
# Shards that encoders are evaluated on -> shards that these encoders were pretrained on.
PRETRAINED_ON = dict.fromkeys(CLINICS, "healthy") | {
    "clinic-sites": "healthy-sites", "clinic-a1-unscaled": "healthy-unscaled",
}  # fmt: skip
# Method -> changes of the recipe.
METHODS: dict[str, tuple[str, ...]] = {
    "y-aware": (), "simclr": ("--loss.proxies.age.bandwidth=0",), "age-regression": ("--loss.name=regression",),
    "random": ("--train.steps=0",),
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    disease: {
        "title": title, "kind": "binary", "label": "diagnosis", "positive": [positive], "negative": ["control"],
        "query": "session == '1'", "test": f"site in {list(TEST_SITES)}", "covariates": ["age"],
        "match": {"column": "age", "within": 5.0, "ratio": 1},
    }
    for disease, title, positive in (("scz", "schizophrenia", "SCZ"), ("ad", "Alzheimer's disease", "AD"))
}  # fmt: skip
# Four sites give enough people for the age task; more sites would mean more scans to embed than the diseases need.
TASKS["age"] = {
    "title": "age of healthy people", "kind": "regression", "label": "age", "test": f"site in {[SITES[6], SITES[7]]}",
    "query": f"session == '1' and diagnosis == 'control' and site in {[SITES[0], SITES[1], SITES[6], SITES[7]]}",
}  # fmt: skip


def pretrainings(plan: ExperimentPlan) -> list[Pretraining]:
    """Return every pretraining of the experiment, those of the main comparison first."""
    runs = [
        Pretraining(method, "main", seed, "healthy", overrides)
        for seed in range(plan.seeds) for method, overrides in METHODS.items()
    ]  # fmt: skip
    variant_seeds = range(plan.variant_seeds)
    trained = ("y-aware", "age-regression")
    for variant, data, methods, overrides in (
        ("unscaled", "healthy-unscaled", ("y-aware", "simclr", "age-regression"), ()),
        ("cutout", "healthy", trained, ("--augmentation.preset=paper-cutout",)),
        ("plain", "healthy", trained, ("--augmentation.preset=none",)),
        ("batch256", "healthy", trained, ("--batch.global=256", f"--train.steps={max(1, plan.steps // 4)}",
                                          f"--optimizer.warmup_steps={max(1, plan.steps // 28)}")),
        ("sites", "healthy-sites", trained, ()),
    ):  # fmt: skip
        runs += [
            Pretraining(method, variant, seed, data, METHODS[method] + overrides)
            for method in methods
            for seed in variant_seeds
        ]
    runs += [
        Pretraining("y-aware", f"bandwidth{years}", 0, "healthy", (f"--loss.proxies.age.bandwidth={years}",))
        for years in (2, 10)
    ]
    runs.append(Pretraining("random", "unscaled", 0, "healthy-unscaled", METHODS["random"]))
    return runs


def encoders_for(clinic: str, plan: ExperimentPlan) -> list[Pretraining]:
    """Return the encoders that are evaluated on a clinic: those pretrained on the matching shards.

    Variants of the recipe are evaluated on the main clinic only, and on clinics with pretraining shards of their own.
    """
    matching = [run for run in pretrainings(plan) if run.data == PRETRAINED_ON[clinic]]
    if clinic in (MAIN_CLINIC, "clinic-sites", "clinic-a1-unscaled"):
        return matching
    return [run for run in matching if run.variant == "main"]
