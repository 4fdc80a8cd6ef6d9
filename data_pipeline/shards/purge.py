"""Apply the rules that compare scans to written shards, and rewrite the shards that lose scans."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.split import SPLIT
from data_pipeline.quality.outliers import StoredScan, coarse_path, find_outliers
from data_pipeline.quality.rules import Quality, Removal
from data_pipeline.shards.tar import CODECS, copy_without, payloads
from data_pipeline.shards.unfinished import UNFINISHED
from infra import ray_cluster
from infra.files import open_file, sha256_of
from infra.progress import Progress

ShardRow = dict[str, Any]  # Row of a shard in the manifest: name, bytes, sha256, scans
ScanRow = dict[str, Any]  # a scan's row of the scan table, with the number of its shard


def purge_shards(
    folder: Path,
    shards: list[ShardRow],
    rows: list[ScanRow],
    quality: Quality,
    *,
    codec: str,
    paths: Mapping[str, str],
    stored_scans: Mapping[str, StoredScan] | None = None,
) -> tuple[list[ShardRow], list[ScanRow], list[Removal]]:
    """Compare the scans of written shards with each other and remove those that the rules refuse.

    A shard that holds a removed scan is rewritten without it, in a Ray task, under a temporary name that is then renamed.
    Repeating the call changes nothing, so a killed build can repeat it.

    Args:
        folder: the folder of the shards.
        shards: the manifest's row of each shard.
        rows: the row of each scan, in the order of the shards.
        quality: the rules.
        codec: the shards' codec, a key of ``CODECS``.
        paths: each scan key's file, as the quarantine may name it.
        stored_scans: see ``find_outliers``.

    Returns:
        The remaining shards, the remaining scans with their new shard numbers and offsets, and the removals.
    """
    if not rows:
        return shards, rows, []
    names = ("key", "dataset", "participant_id", "voxels_sha256")
    table = pd.DataFrame({name: [row[name] for row in rows] for name in names})
    table[SPLIT] = pd.Series([row.get(SPLIT) for row in rows], dtype=object)
    coarse = [coarse_path(folder, str(shard["name"])) for shard in shards]
    verdict = find_outliers(table, coarse, quality, paths, stored_scans)
    rows = [{**row, "quality_correlation": float(r)} for row, r in zip(rows, verdict.correlation, strict=True)]
    removed_keys = {removal.key for removal in verdict.removals}
    shards, rows = _rewrite_shards(folder, shards, rows, removed_keys, codec)
    return shards, rows, verdict.removals


def _rewrite_shards(
    folder: Path, shards: list[ShardRow], rows: list[ScanRow], removed_keys: Collection[str], codec: str
) -> tuple[list[ShardRow], list[ScanRow]]:
    keys_by_shard: dict[int, set[str]] = {}
    for row in rows:
        if row["key"] in removed_keys:
            keys_by_shard.setdefault(int(row["shard"]), set()).add(row["key"])
    numbers = sorted(keys_by_shard)
    tasks = [(str(folder), str(shards[number]["name"]), keys_by_shard[number], codec) for number in numbers]
    rewritten: dict[int, tuple[ShardRow, dict[str, int]]] = {}
    if tasks:
        small = ray_cluster.is_small(sum(shards[number]["bytes"] for number in numbers), None)
        with (
            ray_cluster.session_on_demand(),
            Progress(len(tasks), "shards", "removing scans from shards") as progress,
        ):
            for index, result in ray_cluster.map_unordered(rewrite_shard, tasks, in_flight=64, in_process=small):
                rewritten[numbers[index]] = result
                progress.advance()
    new_shards: list[ShardRow] = []
    new_numbers: dict[int, int] = {}
    for number, shard in enumerate(shards):
        new_shard = rewritten[number][0] if number in rewritten else shard
        if new_shard:
            new_numbers[number] = len(new_shards)
            new_shards.append(new_shard)
    new_rows = []
    for row in rows:
        number = int(row["shard"])
        if row["key"] in removed_keys:
            continue
        offset = {"offset": rewritten[number][1][row["key"]]} if number in rewritten else {}
        new_rows.append({**row, **offset, "shard": new_numbers[number]})
    return new_shards, new_rows


def rewrite_shard(folder: str, name: str, keys: Collection[str], codec: str) -> tuple[ShardRow, dict[str, int]]:
    """Rewrite a shard without some samples; runs in a Ray worker.

    Returns:
        The shard's new row of the manifest ({} if no sample is left; the shard is then deleted), and each remaining key's
        offset in bytes.
    """
    final = Path(folder) / name
    temporary = final.with_name(f"{UNFINISHED}less-{name}")
    copy_without(final, temporary, keys)
    offsets = {key: offset for key, offset, _ in payloads(temporary, CODECS[codec])}
    if not offsets:
        temporary.unlink()
        final.unlink()
        return {}, {}
    row = {"name": name, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary), "scans": len(offsets)}
    with open_file(temporary) as stream:
        os.fsync(stream.fileno())
    temporary.replace(final)
    return row, offsets
