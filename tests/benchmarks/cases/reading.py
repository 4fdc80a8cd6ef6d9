"""Read the scans of the read rows from our shards, from .nii.gz and from .npy; open tables of many scans."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import google_crc32c
import nibabel
import numpy as np
import pandas as pd

from data_pipeline.storage import manifest as manifest_module
from data_pipeline.storage import pieces, table_schema
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.manifest_file import SCANS
from data_pipeline.storage.remote import Access
from tests.benchmarks.harness.measure import back_memory, measured
from tests.benchmarks.peers.reading import count, memory_of_table, read_all, voxel


def shards(data: str, cold: bool = False) -> dict[str, Any]:
    """Read, check and decode every scan from our shards."""
    folder = Path(data, "full", "shards")
    return _read_manifest(Manifest.load(folder), folder, cold)


def raw_shards(data: str, cold: bool = False) -> dict[str, Any]:
    """Read and check every scan from our shards of raw arrays; measure the checksum apart."""
    folder = Path(data, "full", "shards-npy")
    return _read_raw(Manifest.load(folder), folder, cold)


def unpacked(data: str, cold: bool = False) -> dict[str, Any]:
    """Read and check every scan from the file in which ``data.cache_unpacked`` keeps scans; measure the checksum apart."""
    folder = Path(data, "full", "unpacked")
    return _read_raw(Manifest.load(Path(data, "full", "shards"), Access(unpacked=str(folder))), folder, cold)


def _read_raw(manifest: Manifest, folder: Path, cold: bool) -> dict[str, Any]:
    found = _read_manifest(manifest, folder, cold)
    if cold:
        return found
    checksum = _checksum_of_a_read(manifest)
    return {**found, "part_checksum": checksum, "part_rest": found["cpu"] - checksum}


def _read_manifest(manifest: Manifest, folder: Path, cold: bool) -> dict[str, Any]:
    rows = range(len(manifest.scans))
    return read_all(folder, lambda: lambda: sum(voxel(manifest.read_volume(row)) for row in rows), len(rows), cold)


def _checksum_of_a_read(manifest: Manifest) -> float:
    """Return the CPU seconds of a scan's checksum where it is computed in a read: on bytes that the kernel has just copied."""
    spent = [0.0]

    def extend(crc: int, content: Any) -> int:
        used = time.process_time()
        found: int = google_crc32c.extend(crc, content)
        spent[0] += time.process_time() - used
        return found

    rows, passes = manifest.rows(), 10
    with mock.patch.object(pieces, "google_crc32c", SimpleNamespace(extend=extend)):
        for _ in range(passes):
            for row in rows:
                voxel(manifest.read_volume(int(row)))
    return spent[0] / (passes * len(rows))


def nifti(data: str, cold: bool = False) -> dict[str, Any]:
    """Read every scan from .nii.gz with nibabel, as float32."""
    folder = Path(data, "full", "cohort")
    paths = sorted(folder.rglob("*.nii.gz"))

    def read() -> float:
        return sum(voxel(np.asarray(nibabel.load(path).dataobj, dtype=np.float32)) for path in paths)

    return read_all(folder, lambda: read, len(paths), cold)


def npy(data: str, cold: bool = False, folder: str = "npy") -> dict[str, Any]:
    """Read every scan from a .npy file: float32, or float16 with the folder ``npy-float16``."""
    place = Path(data, "full", folder)
    paths = sorted(place.glob("*.npy"))
    return read_all(place, lambda: lambda: sum(voxel(np.load(path)) for path in paths), count(data), cold)


def open_table(data: str, scans: int) -> dict[str, Any]:
    """Load a manifest of many scans: open, check and parse it. Its parts are CPU seconds, those in the kernel too."""
    folder = Path(data, "index", f"ours-{scans}")
    parts = {"files, SHA-256": 0.0, "table": 0.0, "checks": 0.0}
    spots = (
        ("files, SHA-256", manifest_module, "read_checked"),
        ("table", manifest_module, "read_table"),
        ("checks", table_schema, "_check_locations"),
    )
    found: list[Manifest] = []
    back_memory(memory_of_table(scans))
    with ExitStack() as stack:
        for part, module, name in spots:
            stack.enter_context(mock.patch.object(module, name, _timed(getattr(module, name), parts, part)))
        result = measured(lambda: found.append(Manifest.load(folder)))
    parts["table"] -= parts["checks"]
    return {
        **result,
        **{f"part_{name}": seconds for name, seconds in parts.items()},
        "check": float(len(found[0].scans)),
    }


def open_with_pandas(data: str, scans: int) -> dict[str, Any]:
    """Read the same table with pandas."""
    import pyarrow.dataset  # noqa: F401  pandas imports it at its first table; an import is not part of the row

    found: list[pd.DataFrame] = []
    path = Path(data, "index", f"ours-{scans}", SCANS)
    back_memory(memory_of_table(scans))
    result = measured(lambda: found.append(pd.read_parquet(path, engine="pyarrow")))
    return {**result, "check": float(len(found[0]))}


def _timed(function: Callable[..., Any], parts: dict[str, float], part: str) -> Callable[..., Any]:
    """Return a function that adds its CPU seconds to a part."""

    def call(*arguments: Any) -> Any:
        before = time.process_time()
        result = function(*arguments)
        parts[part] += time.process_time() - before
        return result

    return call


def rows_of_a_split(data: str, scans: int) -> dict[str, Any]:
    """List the rows of one split, for the first time after opening."""
    manifest = Manifest.load(Path(data, "index", f"ours-{scans}"))
    return measured(lambda: manifest.rows("pretrain"))


def rows_by_pandas(data: str, scans: int) -> dict[str, Any]:
    """List the rows of one split of the same table, read by pandas."""
    table = pd.read_parquet(Path(data, "index", f"ours-{scans}", SCANS))
    return measured(lambda: np.flatnonzero((table["split"] == "pretrain").to_numpy()))
