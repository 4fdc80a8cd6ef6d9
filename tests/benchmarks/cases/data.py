"""Prepare what several rows read: simulated cohorts with their shards and `.npy` files, tables of many scans, a small run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import simulate_cohort
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
from data_pipeline.volume.grid import Grid
from infra import ray_cluster
from tests.benchmarks.bench_shards import write_large_manifest
from tests.benchmarks.cases import startup

NOTHING = {"cpu": 0.0, "wall": 0.0}


def scans(data: str, name: str, scans: int, spacing: float) -> dict[str, float]:
    """Simulate a cohort with one scan a person; write it as .nii.gz, shards and float32 .npy files below ``data``/``name``."""
    folder = Path(data, name)
    cohort = simulate_cohort(folder / "cohort", participants=scans, spacing=spacing)
    with ray_cluster.session(1):
        manifest = build_shards(
            cohort, folder / "shards", grid=Grid.vbm(spacing), scans_per_shard=16, splits={"pretrain": 1.0}
        )
    (folder / "npy").mkdir()
    for row in manifest.rows():
        np.save(folder / "npy" / f"{row:05d}.npy", np.asarray(manifest.read_volume(int(row)), dtype=np.float32))
    return NOTHING


def raw(data: str, spacing: float) -> dict[str, float]:
    """Write the scans of the read rows raw: as shards of the codec npy, unpacked beside the packed shards, and as .npy."""
    folder = Path(data, "full")
    with ray_cluster.session(1):
        build_shards(
            folder / "cohort", folder / "shards-npy", grid=Grid.vbm(spacing), scans_per_shard=16,
            splits={"pretrain": 1.0}, codec="npy",
        )  # fmt: skip
    kept = Manifest.load(folder / "shards", Access(unpacked=str(folder / "unpacked")))
    (folder / "npy-float16").mkdir()
    for row in kept.rows():
        np.save(folder / "npy-float16" / f"{row:05d}.npy", kept.read_volume(int(row)))
    return NOTHING


def table(data: str, scans: int) -> dict[str, float]:
    """Write a manifest of many scans without their volumes."""
    folder = Path(data, "index", f"ours-{scans}")
    folder.mkdir(parents=True)
    write_large_manifest(folder, scans)
    return NOTHING


def small_run(data: str) -> dict[str, float]:
    """Build shards of 36 small scans and pretrain 0 steps of a small network."""
    startup.prepare(Path(data, "startup"))
    return NOTHING
