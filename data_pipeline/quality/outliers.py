"""The rules that compare scans: duplicate and outlier.

The coarse volumes of a cohort are in files of shape (V, scans) float16, one for each part of the cohort (in a build, each
shard). Voxels are the first axis, so that a block of voxels of all scans is read in few long runs. A million scans take
about 12 GB of such files and are compared in about ``MEMORY_BYTES`` of memory: first the exact median, block by block, then
each part's correlations with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.quality.rules import Quality, Removal
from infra.errors import UserError
from infra.files import atomic_write
from infra.progress import Progress

MEMORY_BYTES = 256 * 2**20
LEAST_SPREAD = 1e-4  # of correlations; smaller differences are rounding, for example between copies of one phantom
COARSE_PREFIX = ".coarse-"  # of the name of a file of coarse volumes


def coarse_path(folder: Path, name: str) -> Path:
    """The file in ``folder`` with the coarse volumes of the part ``name``; it is deleted when the build is done."""
    return folder / f"{COARSE_PREFIX}{name}.npy"


def save_coarse(path: Path, volumes: Sequence[NDArray[np.float32]]) -> None:
    """Write the coarse volumes of a part's scans, each (V,), as one (V, scans) float16 array."""
    with atomic_write(path) as stream:
        np.save(stream, np.stack(volumes, axis=1).astype(np.float16))


class StoredScan(NamedTuple):
    """A scan that the shards hold already: its key and its split."""

    key: str
    split: str


class Verdict(NamedTuple):
    """The result of comparing N scans; z = (correlation - location) / scale."""

    correlation: NDArray[np.float64]  # (N,) with the median scan; NaN for constant volumes
    z: NDArray[np.float64]  # (N,) robust z of the correlation; NaN if the cohort is too small
    removals: list[Removal]
    location: float | None  # median correlation; None if the cohort is too small
    scale: float | None  # 1.4826 x median absolute deviation; None if the cohort is too small


def find_outliers(
    table: pd.DataFrame,
    coarse: Sequence[Path],
    quality: Quality,
    paths: Mapping[str, str],
    stored_scans: Mapping[str, StoredScan] | None = None,
) -> Verdict:
    """Compare all scans of a cohort with each other and with their median scan.

    Duplicates are left out of the median. The result does not depend on how the cohort is divided into parts.

    Args:
        table: one row per scan, in the order of the coarse files' columns, with ``key``, ``dataset``, ``participant_id``
            ``voxels_sha256``, and optionally ``split``, which is missing where no table declares one.
        coarse: the coarse files of the parts.
        quality: the rules.
        paths: each key's file, as the quarantine may name it.
        stored_scans: digest -> the scan that the shards hold already; a new copy of it is excluded.

    Raises:
        UserError: two copies of one scan are declared to be in different splits.
    """
    removed: dict[int, Removal] = {}
    table = table if "split" in table else table.assign(split=None)
    _check_splits_of_copies(table, quality, stored_scans or {})
    if quality.duplicate == "refuse":
        removed = _find_duplicates(table, paths, stored_scans or {})
    kept = np.ones(len(table), dtype=bool)
    kept[list(removed)] = False
    correlation = _correlations(coarse, kept)
    rule = quality.outlier
    judged = kept & np.isfinite(correlation)
    if judged.sum() < rule.least_scans:
        no_z = np.full(len(table), np.nan)
        return Verdict(correlation, no_z, [removed[row] for row in sorted(removed)], None, None)
    location, scale = robust_scale(correlation[judged])
    z = (correlation - location) / scale
    low = (z < rule.robust_z) & (location - correlation >= rule.least_drop)
    for row in np.flatnonzero(judged & low) if rule.use else ():
        key = str(table["key"].iloc[row])
        reason = (
            f"correlation {correlation[row]:.3f} with the cohort's median scan is {-z[row]:.3g} robust standard deviations "
            f"below the cohort's median of {location:.3f}"
        )
        removed[int(row)] = Removal(key, paths[key], "outlier", float(z[row]), rule.robust_z, reason)
    return Verdict(correlation, z, [removed[row] for row in sorted(removed)], location, scale)


def robust_scale(correlation: NDArray[np.float64]) -> tuple[float, float]:
    """Median, and 1.4826 x median absolute deviation, which equals the standard deviation of normally distributed values."""
    location = float(np.median(correlation))
    return location, 1.4826 * max(float(np.median(np.abs(correlation - location))), LEAST_SPREAD)


def _check_splits_of_copies(table: pd.DataFrame, quality: Quality, stored_scans: Mapping[str, StoredScan]) -> None:
    """Raise UserError if copies of one scan are declared to be in two splits: it would be trained on and tested."""
    declared = table["split"].notna().to_numpy()
    if not declared.any():
        return
    stored = set(stored_scans)
    several = table["voxels_sha256"].duplicated(keep=False) | table["voxels_sha256"].isin(stored)
    # A kept copy without a declared split could be put into any.
    chosen = table[several.to_numpy() & (declared | (quality.duplicate == "keep"))].sort_values("key", kind="stable")
    first = {digest: (scan.key, scan.split) for digest, scan in stored_scans.items()}
    for row in chosen.itertuples():
        split = row.split if isinstance(row.split, str) else "not declared"
        key, other = first.setdefault(str(row.voxels_sha256), (str(row.key), split))
        if split != other:
            raise UserError(
                f"{key} (split {other}) and {row.key} (split {split}) have the same voxels, so a scan would be in two splits; "
                "remove one of the two, or declare one split for both"
            )


def _find_duplicates(
    table: pd.DataFrame, paths: Mapping[str, str], stored_scans: Mapping[str, StoredScan]
) -> dict[int, Removal]:
    """Row -> removal of every copy but the one with the first key.

    Scans that the shards hold already precede new ones, and those with a declared split precede those without.
    """
    participants = (table["dataset"].astype(str) + "/" + table["participant_id"].astype(str)).to_numpy()
    keys, digests = table["key"].to_numpy(), table["voxels_sha256"].to_numpy()
    copies = table["voxels_sha256"].value_counts()
    first_row: dict[str, int] = {}
    removed: dict[int, Removal] = {}
    for row in np.lexsort((keys.astype(str), table["split"].isna().to_numpy())):
        digest = digests[row]
        if digest in stored_scans:
            reason = f"same voxels as {stored_scans[digest].key}, which the shards hold already"
        elif digest in first_row:
            other = first_row[digest]
            same = participants[row] == participants[other]
            warning = "" if same else "; they are listed as two participants, so one of the two ids is wrong"
            reason = f"same voxels as {keys[other]}, the first of {copies[digest]} copies, which is kept{warning}"
        else:
            first_row[digest] = int(row)
            continue
        count = float(copies[digest] + (digest in stored_scans))
        removed[int(row)] = Removal(keys[row], paths[keys[row]], "duplicate", count, 1.0, reason)
    return removed


def _correlations(coarse: Sequence[Path], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) Pearson's r of each scan's coarse volume with the median of the kept scans; NaN for constant volumes."""
    if not kept.any():
        return np.full(len(kept), np.nan)
    reference = _median_volume(coarse, kept)
    reference -= reference.mean()
    correlations = []
    with Progress(len(kept), "scans", "comparing scans") as progress:
        for path in coarse:
            volumes = np.load(path).astype(np.float64)
            volumes -= volumes.mean(axis=0)
            lengths = np.sqrt((volumes**2).sum(axis=0) * (reference**2).sum())
            with np.errstate(invalid="ignore", divide="ignore"):
                r = (volumes * reference[:, None]).sum(axis=0) / lengths
            correlations.append(np.where(lengths > 0, r, np.nan))
            progress.advance(volumes.shape[1])
    # Rounded to six decimals: other processors sum in another order.
    rounded: NDArray[np.float64] = np.round(np.concatenate(correlations), 6)
    return rounded


def _median_volume(coarse: Sequence[Path], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(V,) exact median of the kept scans at each voxel, computed in blocks of voxels."""
    shapes = [np.load(path, mmap_mode="r").shape for path in coarse]
    edges = np.cumsum([0, *(scans for _, scans in shapes)])
    assert edges[-1] == len(kept), "the coarse files do not hold the table's scans"
    voxels, step = shapes[0][0], max(1, MEMORY_BYTES // (8 * len(kept)))
    median = np.empty(voxels)
    for first in range(0, voxels, step):
        block = np.empty((min(step, voxels - first), int(kept.sum())), dtype=np.float32)
        filled = 0
        for path, left, right in zip(coarse, edges, edges[1:], strict=False):
            columns = np.load(path, mmap_mode="r")[first : first + step, kept[left:right]]
            block[:, filled : filled + columns.shape[1]] = columns
            filled += columns.shape[1]
        median[first : first + step] = np.median(block, axis=1, overwrite_input=True)
    return median
