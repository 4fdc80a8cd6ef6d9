"""Read the scans of the read rows from our shards, from .nii.gz and from .npy; open tables of many scans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from data_pipeline.storage.manifest import Manifest
from tests.benchmarks.harness.measure import measured
from tests.benchmarks.peers.reading import count, read_all, voxel


def shards(data: str, cold: bool = False) -> dict[str, Any]:
    """Read, check and decode every scan from our shards."""
    folder = Path(data, "full", "shards")
    manifest = Manifest.load(folder)
    rows = range(len(manifest.scans))
    return read_all(folder, lambda: lambda: sum(voxel(manifest.read_volume(row)) for row in rows), len(rows), cold)


def nifti(data: str, cold: bool = False) -> dict[str, Any]:
    """Read every scan from .nii.gz with nibabel, as float32."""
    folder = Path(data, "full", "cohort")
    paths = sorted(folder.rglob("*.nii.gz"))

    def read() -> float:
        return sum(voxel(np.asarray(nibabel.load(path).dataobj, dtype=np.float32)) for path in paths)

    return read_all(folder, lambda: read, len(paths), cold)


def npy(data: str, cold: bool = False) -> dict[str, Any]:
    """Read every scan from a float32 .npy file."""
    folder = Path(data, "full", "npy")
    paths = sorted(folder.glob("*.npy"))
    return read_all(folder, lambda: lambda: sum(voxel(np.load(path)) for path in paths), count(data), cold)


def open_table(data: str, scans: int) -> dict[str, Any]:
    """Load a manifest of many scans: open, check and parse it."""
    found: list[Manifest] = []
    result = measured(lambda: found.append(Manifest.load(Path(data, "index", f"ours-{scans}"))))
    return {**result, "check": float(len(found[0].scans))}


def rows_of_a_split(data: str, scans: int) -> dict[str, Any]:
    """List the rows of one split, for the first time after opening."""
    manifest = Manifest.load(Path(data, "index", f"ours-{scans}"))
    return measured(lambda: manifest.rows("pretrain"))
