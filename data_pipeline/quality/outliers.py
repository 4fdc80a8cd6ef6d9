"""The rules that compare scans: duplicate and outlier, and the removal of what they find from written shards.

Each part of a cohort (a shard, in a build) leaves its coarse volumes in a file (V, scans) float16: voxels first, so that a
block of voxels of all scans is read as few long runs. A million scans take about 12 GB of such files and are judged with
about ``MEMORY_BYTES`` at a time: the exact median block by block, then each part's correlations with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from data_pipeline.quality.rules import Quality, Removal
from data_pipeline.volume.load import Array
from infra.files import atomic_write
from infra.progress import Progress

MEMORY_BYTES = 256 * 2**20
LEAST_SPREAD = 1e-4  # of correlations: smaller differences are rounding, as among copies of one phantom

Mask = np.ndarray[Any, np.dtype[np.bool_]]


COARSE_PREFIX = ".coarse-"  # of the name of a file of coarse volumes


def coarse_path(folder: Path, name: str) -> Path:
    """The file in ``folder`` with the coarse volumes of the shard ``name``; it is deleted when the build is done."""
    return folder / f"{COARSE_PREFIX}{name}.npy"


def save_coarse(path: Path, volumes: Sequence[Array]) -> None:
    """Write the coarse volumes of a part's scans, in their order."""
    with atomic_write(path) as stream:
        np.save(stream, np.stack(volumes, axis=1).astype(np.float16))


class Verdict(NamedTuple):
    """Each scan's ``correlation`` with the median scan and its robust ``z``, (N,) float64, NaN where there is none; whom to
    remove; and what z is reckoned with: z = (correlation - ``middle``) / ``scale``, both None in too small a cohort."""

    correlation: Array
    z: Array
    removals: list[Removal]
    middle: float | None
    scale: float | None


def judge(
    table: pd.DataFrame,
    coarse: Sequence[Path],
    quality: Quality,
    paths: Mapping[str, str],
    known: Mapping[str, str] | None = None,
) -> Verdict:
    """Compare all scans of a cohort with each other and with their median scan.

    Args:
        table: a row per scan, in the order of the parts' columns: ``key``, ``dataset``, ``participant_id``,
            ``voxels_sha256``.
        coarse: the parts' files.
        paths: each key's file as the quarantine may name it.
        known: digest -> key of scans that are in the shards already; a new copy of one of them is removed.

    Copies are left out of the median. Depends on the cohort and the rules alone, not on how it was cut into parts.
    """
    removed: dict[int, Removal] = {}
    if quality.duplicate == "refuse":
        removed = _duplicates(table, paths, known or {})
    kept = np.ones(len(table), dtype=bool)
    kept[list(removed)] = False
    correlation = _correlations(coarse, kept)
    limit = quality.outlier
    judged = kept & np.isfinite(correlation)
    if judged.sum() < limit.least_scans:
        none = np.full(len(table), np.nan)
        return Verdict(correlation, none, [removed[row] for row in sorted(removed)], None, None)
    middle, scale = robust_scale(correlation[judged])
    z = (correlation - middle) / scale
    low = (z < limit.robust_z) & (middle - correlation >= limit.least_drop)
    for row in np.flatnonzero(judged & low) if limit.use else ():
        key = str(table["key"].iloc[row])
        reason = (
            f"correlation {correlation[row]:.3f} with the cohort's median scan is {-z[row]:.3g} robust standard deviations "
            f"below the cohort's median of {middle:.3f}"
        )
        removed[int(row)] = Removal(key, paths[key], "outlier", float(z[row]), limit.robust_z, reason)
    return Verdict(correlation, z, [removed[row] for row in sorted(removed)], middle, scale)


def robust_scale(correlation: Array) -> tuple[float, float]:
    """Median and 1.4826 x median absolute deviation (the standard deviation of a normal law) of some correlations."""
    middle = float(np.median(correlation))
    return middle, 1.4826 * max(float(np.median(np.abs(correlation - middle))), LEAST_SPREAD)


def _duplicates(table: pd.DataFrame, paths: Mapping[str, str], known: Mapping[str, str]) -> dict[int, Removal]:
    """All copies but the first in the order of keys; a scan already in the shards comes before any new one."""
    people = (table["dataset"].astype(str) + "/" + table["participant_id"].astype(str)).to_numpy()
    keys, digests = table["key"].to_numpy(), table["voxels_sha256"].to_numpy()
    copies = table["voxels_sha256"].value_counts()
    first: dict[str, int] = {}
    removed: dict[int, Removal] = {}
    for row in np.argsort(keys, kind="stable"):
        digest = digests[row]
        if digest in known:
            text = f"same voxels as {known[digest]}, which the shards hold already"
        elif digest in first:
            other = first[digest]
            person = "" if people[row] == people[other] else ", another participant: one of the two ids is wrong"
            text = f"same voxels as {keys[other]}, the first of {copies[digest]} copies, which stays{person}"
        else:
            first[digest] = int(row)
            continue
        count = float(copies[digest] + (digest in known))
        removed[int(row)] = Removal(keys[row], paths[keys[row]], "duplicate", count, 1.0, text)
    return removed


def _correlations(coarse: Sequence[Path], kept: Mask) -> Array:
    """Pearson's r of every scan's coarse volume with the median one of the kept scans, NaN for constant volumes."""
    if not kept.any():
        return np.full(len(kept), np.nan)
    reference = _median_volume(coarse, kept)
    reference -= reference.mean()
    parts = []
    with Progress(len(kept), "scans", "comparing scans") as progress:
        for path in coarse:
            block = np.load(path).astype(np.float64)
            block -= block.mean(axis=0)
            lengths = np.sqrt((block**2).sum(axis=0) * (reference**2).sum())
            with np.errstate(invalid="ignore", divide="ignore"):
                r = (block * reference[:, None]).sum(axis=0) / lengths
            parts.append(np.where(lengths > 0, r, np.nan))
            progress.advance(block.shape[1])
    # Six decimals: sums in another order, on another processor, round alike.
    return np.round(np.concatenate(parts), 6)


def _median_volume(coarse: Sequence[Path], kept: Mask) -> Array:
    """The exact voxelwise median (V,) float64 over the kept scans, a block of voxels at a time."""
    sizes = [np.load(path, mmap_mode="r").shape for path in coarse]
    edges = np.cumsum([0, *(count for _, count in sizes)])
    assert edges[-1] == len(kept), "the coarse files do not hold the table's scans"
    voxels, step = sizes[0][0], max(1, MEMORY_BYTES // (8 * len(kept)))
    median = np.empty(voxels)
    for begin in range(0, voxels, step):
        block = np.empty((min(step, voxels - begin), int(kept.sum())), dtype=np.float32)
        filled = 0
        for path, left, right in zip(coarse, edges, edges[1:], strict=False):
            part = np.load(path, mmap_mode="r")[begin : begin + step, kept[left:right]]
            block[:, filled : filled + part.shape[1]] = part
            filled += part.shape[1]
        median[begin : begin + step] = np.median(block, axis=1, overwrite_input=True)
    return median
