"""Writes the shards of a list of scans: one Ray task per shard."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.cohort.scan import Scan, bytes_of
from data_pipeline.quality.outliers import StoredScan, coarse_path, save_coarse
from data_pipeline.quality.rules import Quality, Removal, read_scan
from data_pipeline.shards import unfinished
from data_pipeline.shards.purge import purge_shards
from data_pipeline.shards.scan_table import describe
from data_pipeline.shards.tar import encode, tar_writer, write_shard
from data_pipeline.shards.unfinished import WrittenShard
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import Preparation
from infra import ray_cluster
from infra.files import sha256_of
from infra.progress import Progress
from infra.random_streams import SHARD_SHUFFLE, generator

tar_writer()  # now, although only write_shard uses it: cancelling a Ray task in the middle of an import breaks its worker

MIN_IN_FLIGHT = 64  # shards that Ray holds at least; the rest waits in this process


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What a Ray task needs to write one shard. Every field but the two folders decides the shard's bytes.

    Attributes:
        scans: the shard's scans, in the order of its bytes.
        out: folder of the shards.
        temporary: folder in ``out`` for unfinished tars.
        name: file name of the shard.
        preparation: how voxels are prepared.
        codec: ``zst`` or ``npy``.
        quality: the rules for single scans.
    """

    scans: list[Scan]
    out: str
    temporary: str
    name: str
    preparation: Preparation
    codec: str
    quality: Quality


def write_shards(
    folder: Path,
    scans: Sequence[Scan],
    grid: Grid,
    settings: Mapping[str, Any],
    *,
    workers: int | None = None,
    first_number: int = 0,
    stored: Mapping[str, StoredScan] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Removal]]:
    """Shuffle scans over shards, write the shards, and remove the scans that the rules for whole cohorts refuse.

    Args:
        folder: the folder of the shards, locked by the caller.
        scans: the scans to write.
        grid: the grid that all scans are resampled to.
        settings: the manifest's settings.
        workers: Ray workers; None for one per core, or none if the scans are few.
        first_number: number of the first shard.
        stored: digest -> the scan that the shards hold already; a new scan with such a digest is a duplicate.

    Returns:
        The rows of the shards, the rows of the scans, and what was refused.
    """
    # Scans are shuffled once, here, so that a reader that takes shard after shard also sees mixed sites.
    order = generator(settings["seed"], SHARD_SHUFFLE).permutation(len(scans))
    step, codec = settings["scans_per_shard"], settings["codec"]
    parts = [[scans[i] for i in order[first : first + step]] for first in range(0, len(scans), step)]
    names = [shard_name(settings["dataset"], first_number + n) for n in range(len(parts))]
    preparation, quality = Preparation.of(grid.to_dict(), settings), quality_rules(settings)
    with unfinished.build_folder(folder, names) as temporary, ray_cluster.session_on_demand(workers):
        tasks = [
            ShardTask(
                scans=part, out=str(folder), temporary=str(temporary), name=name, preparation=preparation, codec=codec,
                quality=quality,
            )
            for name, part in zip(names, parts, strict=True)
        ]  # fmt: skip
        shards: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        refused: list[Removal] = []
        for written in run_tasks(tasks, workers, "building shards"):
            refused += written.removals
            if written.scans:
                rows += [{**row, "shard": len(shards)} for row in written.scans]
                shards.append(written.shard)
        paths = {scan.key: scan.reported_path for scan in scans}
        shards, rows, compared = purge_shards(
            folder, shards, rows, quality, codec=codec, paths=paths, stored_scans=stored
        )
    return shards, rows, [*refused, *compared]


def quality_rules(settings: Mapping[str, Any]) -> Quality:
    """Return the quality rules of a manifest's settings; the defaults for manifests written before there were rules."""
    return TypeAdapter(Quality).validate_python(settings.get("quality", {}))


def shard_name(dataset: str, number: int) -> str:
    """Return ``<dataset>-<number with six digits>.tar``."""
    return f"{dataset}-{number:06d}.tar"


def run_tasks(tasks: Sequence[ShardTask], workers: int | None, title: str) -> list[WrittenShard]:
    """Run ``build_one`` for every task in Ray; the results are in the order of the tasks.

    Args:
        tasks: the shards to write.
        workers: Ray workers; None for one per core.
        title: what the progress line says.
    """
    results: list[Any] = [None] * len(tasks)
    scans = sum(len(task.scans) for task in tasks)
    small = ray_cluster.is_small(bytes_of([scan for task in tasks for scan in task.scans]), workers)
    with ray_cluster.session_on_demand(workers), Progress(scans, "scans", title) as progress:
        quarantined = 0
        cpus = 1 if small else ray_cluster.connect().cluster_resources().get("CPU", 1)
        in_flight = max(MIN_IN_FLIGHT, 2 * int(cpus))
        arguments = [(task,) for task in tasks]
        for index, written in ray_cluster.map_unordered(build_one, arguments, in_flight=in_flight, in_process=small):
            results[index] = written
            quarantined += len(written.removals)
            progress.advance(len(tasks[index].scans), quarantined=quarantined)
    return results


def build_one(task: ShardTask) -> WrittenShard:
    """Write one shard under a temporary name and rename it; a shard finished earlier from the same inputs is kept.

    Runs in a Ray worker with one volume in memory at a time.
    """
    # The fingerprint is taken before the inputs are read: if a file changes meanwhile, the next run sees other stamps.
    settings = {f.name: getattr(task, f.name) for f in fields(task) if f.name not in ("scans", "out", "temporary")}
    mark = unfinished.fingerprint(task.scans, settings)
    finished = unfinished.read_finished(Path(task.out), task.name, mark)
    if finished:
        return finished
    refused: list[Removal] = []
    used: list[tuple[Scan, dict[str, Any]]] = []
    coarse: list[Any] = []

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """Give the sample of each scan that can be used; fill the lists above."""
        for scan in task.scans:
            try:
                voxels, measures, coarse_volume = read_scan(scan, task.preparation, task.quality)
            except BadScan as error:
                refused.append(Removal.of(scan, error))
                continue
            used.append((scan, measures))
            coarse.append(coarse_volume)
            yield scan.key, encode(voxels, task.codec), describe(scan)

    # Every attempt has its own file: Ray may start a task again while a lost worker is still writing.
    temporary = Path(task.temporary) / f"{task.name}.{uuid.uuid4().hex[:8]}"
    rows = write_shard(temporary, samples(), task.codec)
    shard: dict[str, Any] = {}
    if rows:
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
        shard = {"name": task.name, "bytes": size, "sha256": sha256, "scans": len(rows)}
        save_coarse(coarse_path(Path(task.out), task.name), coarse)
    scans = [{**row, **describe(scan), **measures} for row, (scan, measures) in zip(rows, used, strict=True)]
    return unfinished.finish(Path(task.out), temporary, task.name, mark, WrittenShard(shard, scans, refused))
