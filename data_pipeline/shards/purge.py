"""Removes scans that the rules for whole cohorts refuse from shards that are already written."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.quality.outliers import coarse_file, judge
from data_pipeline.quality.quarantine import Removal
from data_pipeline.quality.rules import Quality
from data_pipeline.shards.tar import CODECS, copy_without, payloads
from data_pipeline.shards.unfinished import UNFINISHED
from infra import ray_cluster
from infra.files import sha256_of
from infra.progress import Progress


def remove_refused_scans(
    folder: Path,
    shards: list[dict[str, Any]],
    scans: list[dict[str, Any]],
    *,
    quality: Quality,
    codec: str,
    paths: Mapping[str, str],
    stored: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Removal]]:
    """Compare the scans of written shards with each other and remove duplicates and outliers from the shards.

    Args:
        folder: the folder of the shards and of their coarse volumes.
        shards: the shards' rows.
        scans: the scans' rows.
        quality: the rules.
        codec: the shards' codec.
        paths: each key's file, as quarantine.tsv may name it.
        stored: digest -> key of scans that the data set already has.

    Returns:
        The rows of the remaining shards and scans, and the removals.

    A shard that loses a scan is copied without it under a temporary name, which is then renamed. Repeating this changes
    nothing, so a killed build may do it again.
    """
    if not scans:
        return shards, scans, []
    names = ("key", "dataset", "participant_id", "voxels_sha256")
    table = pd.DataFrame({name: [row[name] for row in scans] for name in names})
    files = [coarse_file(folder, str(shard["name"])) for shard in shards]
    verdict = judge(table, files, quality, paths, stored)
    scans = [{**row, "quality_correlation": float(r)} for row, r in zip(scans, verdict.correlation, strict=True)]
    refused = {removal.key for removal in verdict.removals}
    shards, scans = _rewrite_shards(folder, shards, scans, refused, codec)
    return shards, scans, verdict.removals


def _rewrite_shards(
    folder: Path, shards: list[dict[str, Any]], scans: list[dict[str, Any]], refused: Collection[str], codec: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rewrite each shard that holds a refused scan; return the new rows, with shards numbered again."""
    refused_in: dict[int, set[str]] = {}
    for row in scans:
        if row["key"] in refused:
            refused_in.setdefault(int(row["shard"]), set()).add(row["key"])
    numbers = sorted(refused_in)
    tasks = [(str(folder), str(shards[n]["name"]), refused_in[n], codec) for n in numbers]
    rewritten: dict[int, tuple[dict[str, Any], dict[str, int]]] = {}
    if tasks:
        with ray_cluster.session(), Progress(len(tasks), "shards", "removing scans from shards") as progress:
            for index, result in ray_cluster.map_unordered(rewrite_one, tasks, in_flight=64):
                rewritten[numbers[index]] = result
                progress.advance()
    new_shards: list[dict[str, Any]] = []
    new_numbers: dict[int, int] = {}
    for number, shard in enumerate(shards):
        new_shard = rewritten[number][0] if number in rewritten else shard
        if new_shard:
            new_numbers[number] = len(new_shards)
            new_shards.append(new_shard)
    new_scans = []
    for row in scans:
        number = int(row["shard"])
        if row["key"] in refused:
            continue
        moved = {"offset": rewritten[number][1][row["key"]]} if number in rewritten else {}
        new_scans.append({**row, **moved, "shard": new_numbers[number]})
    return new_shards, new_scans


def rewrite_one(folder: str, name: str, keys: Collection[str], codec: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Rewrite the shard ``name`` without the samples ``keys``; runs in a Ray worker.

    Returns:
        The shard's new row, {} if no sample is left and the shard was removed; and each key's new offset.
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
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(final)
    return row, offsets
