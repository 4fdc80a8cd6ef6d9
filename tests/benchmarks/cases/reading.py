"""Read the scans of the read rows from our shards, from .nii.gz and from .npy; open tables of many scans."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import google_crc32c
import nibabel
import numpy as np
import pandas as pd

from data_pipeline.storage import unpacked as unpacked_module
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.manifest_file import SCANS
from data_pipeline.storage.remote import Access
from tests.benchmarks.harness.measure import measured
from tests.benchmarks.peers.reading import count, read_all, voxel


def shards(data: str, cold: bool = False) -> dict[str, Any]:
    """Read, check and decode every scan from our shards."""
    folder = Path(data, "full", "shards")
    return _read_manifest(Manifest.load(folder), folder, cold)


def raw_shards(data: str, cold: bool = False) -> dict[str, Any]:
    """Read and check every scan from our shards of raw arrays."""
    folder = Path(data, "full", "shards-npy")
    return _read_manifest(Manifest.load(folder), folder, cold)


def unpacked(data: str, cold: bool = False) -> dict[str, Any]:
    """Read and check every scan from the file in which ``data.cache_unpacked`` keeps scans; measure its two parts apart."""
    folder = Path(data, "full", "unpacked")
    manifest = Manifest.load(Path(data, "full", "shards"), Access(unpacked=str(folder)))
    found = _read_manifest(manifest, folder, cold)
    return found if cold else {**found, **_parts_of_a_raw_read(manifest)}


def _read_manifest(manifest: Manifest, folder: Path, cold: bool) -> dict[str, Any]:
    rows = range(len(manifest.scans))
    return read_all(folder, lambda: lambda: sum(voxel(manifest.read_volume(row)) for row in rows), len(rows), cold)


def _parts_of_a_raw_read(manifest: Manifest) -> dict[str, float]:
    """Return the CPU seconds of a scan's checksum where it is computed in a read, and of the rest of the read."""
    spent = [0.0]

    def value(content: Any) -> int:
        used = time.process_time()
        found: int = google_crc32c.value(content)
        spent[0] += time.process_time() - used
        return found

    rows = manifest.rows()
    passes = 10
    with mock.patch.object(unpacked_module, "google_crc32c", SimpleNamespace(value=value)):
        found = measured(lambda: [voxel(manifest.read_volume(int(row))) for _ in range(passes) for row in rows])
    checksum, scans = spent[0], passes * len(rows)
    return {"part_checksum": checksum / scans, "part_rest": (found["cpu"] - checksum) / scans}


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
    """Load a manifest of many scans: open, check and parse it; and two of its checks, measured again alone."""
    folder = Path(data, "index", f"ours-{scans}")
    found: list[Manifest] = []
    result = _with_system_time(lambda: found.append(Manifest.load(folder)))
    table = (folder / SCANS).read_bytes()
    digest = min(measured(lambda: hashlib.sha256(table).hexdigest())["cpu"] for _ in range(3))
    unique = min(measured(lambda: found[0].scans["key"].duplicated().any())["cpu"] for _ in range(3))
    return {
        **result, "beside_SHA-256 of the table": digest, "beside_the search for equal keys": unique,
        "check": float(len(found[0].scans)),
    }  # fmt: skip


def open_with_pandas(data: str, scans: int) -> dict[str, Any]:
    """Read the same table with pandas."""
    found: list[pd.DataFrame] = []
    result = _with_system_time(
        lambda: found.append(pd.read_parquet(Path(data, "index", f"ours-{scans}", SCANS), engine="pyarrow"))
    )
    return {**result, "check": float(len(found[0]))}


def _with_system_time(work: Callable[[], Any]) -> dict[str, float]:
    """Return what `measured` returns, and the part that the kernel takes, most of it for memory that is used the first time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    found = measured(work)
    return {**found, "part_kernel": resource.getrusage(resource.RUSAGE_SELF).ru_stime - before}


def rows_of_a_split(data: str, scans: int) -> dict[str, Any]:
    """List the rows of one split, for the first time after opening."""
    manifest = Manifest.load(Path(data, "index", f"ours-{scans}"))
    return measured(lambda: manifest.rows("pretrain"))


def rows_by_pandas(data: str, scans: int) -> dict[str, Any]:
    """List the rows of one split of the same table, read by pandas."""
    table = pd.read_parquet(Path(data, "index", f"ours-{scans}", SCANS))
    return measured(lambda: np.flatnonzero((table["split"] == "pretrain").to_numpy()))
