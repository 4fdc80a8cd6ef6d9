"""Simulated cohorts of healthy people and of clinics, and their shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import RECORD, simulate_cohort
from infra.errors import UserError
from infra.files import atomic_write, read_text

PATIENTS = {"AD": 0.15, "SCZ": 0.15}  # share of a clinic's participants
HEALTHY_SPLITS = {"pretrain": 0.9, "monitor": 0.1}
CLINIC_SPLITS = {"downstream": 1.0}
# A clinic has another seed than the healthy cohorts, and so other people and other sites.
CLINIC_SEED = 1


def make_cohort(
    folder: Path,
    *,
    participants: int,
    spacing: float,
    seed: int,
    clinic: bool,
    jobs: int,
    differences: Mapping[str, Any],
) -> None:
    """Simulate a healthy cohort or a clinic; ``differences`` are the settings that are not the simulation's defaults."""
    simulate_cohort(
        folder, participants=participants, spacing=spacing, seed=seed + (CLINIC_SEED if clinic else 0),
        shares=PATIENTS if clinic else {}, workers=jobs, **differences,
    )  # fmt: skip


def make_shards(cohort: Path, target: Path, *, scaling: str, seed: int, clinic: bool, jobs: int) -> None:
    """Build the shards of a cohort, unless they are there. The name of the cohort's folder is that of the data set.

    Raises UserError if the shards that are there hold people of another simulation than the cohort's.
    """
    simulation, kept = read_text(cohort / RECORD), target.with_name(f"{target.name}.{RECORD}")
    if is_built(target):
        if not kept.is_file() or read_text(kept) != simulation:
            raise UserError(f"{target} holds people of another simulation than {cohort}; remove the folder")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, "w") as stream:
        stream.write(simulation)
    # Participants are identified by data set and id: sub-00001 exists in every cohort and is another person in each.
    build_shards(
        cohort, target, dataset=cohort.name, scaling=scaling, splits=CLINIC_SPLITS if clinic else HEALTHY_SPLITS,
        workers=jobs, scans_per_shard=512, seed=seed,
    )  # fmt: skip


def is_built(shards: Path) -> bool:
    """Return whether a folder holds finished shards."""
    return (shards / "manifest.json").is_file()
