"""From a cohort to shards and their manifest: one Ray task a shard."""

from __future__ import annotations

import csv
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline import resume
from data_pipeline.cohort import is_simulated, read_bids
from data_pipeline.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.resume import Result
from data_pipeline.scan import Scan
from data_pipeline.shard import CODECS, encode, write_shard
from data_pipeline.split import DEFAULT_SPLITS, assign_splits
from data_pipeline.volume import BadScan, Grid, check_scaling, load_volume, open_image, scale_factor
from infra import ray_cluster
from infra.errors import UserError, nearest
from infra.files import atomic_write, sha256_of
from infra.progress import Progress

# The manifest's own columns; a participants' table's of these names are left out.
PLACES = ("key", "shard", "offset", "size", "crc32c")
IN_FLIGHT = 64  # shards handed to Ray ahead of their turn, at least


@dataclass(frozen=True)
class _Task:
    """What one Ray task needs to write one shard. All but the two folders decides its bytes."""

    scans: list[Scan]
    out: str
    temporary: str  # folder in ``out`` for unfinished shards
    name: str
    grid: Grid
    scaling: str
    codec: str


def build_shards(
    cohort: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    modality: str = "vbm",
    grid: Grid | None = None,
    scaling: str = "none",
    codec: str = "zst",
    scans_per_shard: int = 256,
    splits: dict[str, float] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Build the shards of a BIDS-like cohort in ``out`` and return their manifest.

    Args:
        grid: where the voxels shall lie; None takes the cohort's own grid where its first scans share one, else the VBM
            grid at 1.5 mm.
        scaling: ``none``, or ``tiv``: divide by total intracranial volume (needs a ``tiv`` column in ml).
        codec: ``zst`` (zstd, a quarter of the size) or ``npy`` (which DALI's own reader decodes).
        splits: shares of the healthy participants, see ``data_pipeline.split``.

    The same cohort and settings give the same bytes, whatever ``workers``. A scan that cannot be used goes to
    ``quarantine.tsv`` with its reason. A killed build goes on where it was when the same call is made again. A folder
    that holds this very build already is left as it is; another one in it is refused.
    """
    folder, root = Path(out).resolve(), Path(cohort).resolve()  # Ray's workers have a working directory of their own
    check_scaling(scaling)
    if codec not in CODECS:
        raise UserError(f"codec={codec!r} is not known{nearest(codec, CODECS)}; allowed: {', '.join(CODECS)}")
    if scans_per_shard < 1:
        raise UserError(f"scans_per_shard={scans_per_shard} must be at least 1")
    scans, unknown = read_cohort(root, dataset, modality)
    grid = grid or common_grid(scans)
    settings: dict[str, Any] = {
        "dataset": scans[0].dataset, "modality": modality, "scaling": scaling, "codec": codec,
        "scans_per_shard": scans_per_shard, "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "simulated": is_simulated(root), "scans_found": len(scans) + len(unknown),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done = _already_built(folder, grid, settings)
    if done:
        return done
    with resume.locked(folder):
        # Another process may have finished it since.
        return _already_built(folder, grid, settings) or _build(folder, root, scans, unknown, grid, settings, workers)


def _build(
    folder: Path,
    root: Path,
    scans: list[Scan],
    unknown: list[Scan],
    grid: Grid,
    settings: dict[str, Any],
    workers: int | None,
) -> Manifest:
    # Shards of this name may also be left from a data set whose manifest the user removed, to build it anew.
    count = -(-len(scans) // settings["scans_per_shard"])
    names = {shard_name(settings["dataset"], n) for n in range(count)}
    for leftover in folder.glob(f"{settings['dataset']}-{'[0-9]' * 6}.tar"):
        if leftover.name not in names:
            leftover.unlink()
    shards, rows, bad = _write_shards(folder, scans, grid, settings, workers)
    bad = [*not_listed(unknown), *bad]
    write_quarantine(folder / "quarantine.tsv", bad)
    if not rows:
        raise UserError(f"cohort {root}: no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    built = write_manifest(folder, grid, {**settings, "quarantined": len(bad)}, shards, scan_table(rows, settings))
    resume.clear(folder)
    return built


def read_cohort(root: Path, dataset: str | None, modality: str) -> tuple[list[Scan], list[Scan]]:
    """Scans of a cohort, each key once, and those of participants whom its table does not list."""
    scans, unknown = read_bids(root, dataset, modality)
    twice = pd.Series([scan.key for scan in scans]).value_counts()
    if twice.iloc[0] > 1:
        raise UserError(
            f"cohort {root}: {twice.iloc[0]} files have the key {twice.index[0]}; name their runs _run-1, _run-2"
        )
    return scans, unknown


def not_listed(unknown: list[Scan]) -> list[tuple[str, str, str]]:
    """What quarantine.tsv says of scans whose participant the table does not list."""
    return [(scan.key, str(scan.path), "participant is not in participants.tsv") for scan in unknown]


def common_grid(scans: list[Scan], look_at: int = 5) -> Grid:
    """The grid that the first readable scans share, else the VBM grid at 1.5 mm."""
    grids = set()
    for scan in scans[:look_at]:
        try:
            image = open_image(scan.path)
        except BadScan:
            continue
        grids.add(Grid.of(image.shape, image.affine))
    return grids.pop() if len(grids) == 1 else Grid.vbm(1.5)


def _write_shards(
    folder: Path, scans: list[Scan], grid: Grid, settings: dict[str, Any], workers: int | None, first_number: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Shuffle the scans over shards, write these in Ray tasks; rows of shards, of scans, and what was quarantined."""
    # One shuffle, once: a reader that takes shard after shard sees mixed sites too.
    order = np.random.Generator(np.random.Philox(key=[settings["seed"], 0x5AAD])).permutation(len(scans))
    step = settings["scans_per_shard"]
    parts = [[scans[i] for i in order[first : first + step]] for first in range(0, len(scans), step)]
    names = [shard_name(settings["dataset"], first_number + n) for n in range(len(parts))]
    with resume.building(folder, names) as temporary:
        tasks = [
            _Task(part, str(folder), str(temporary), name, grid, settings["scaling"], settings["codec"])
            for name, part in zip(names, parts, strict=True)
        ]
        results = run_tasks(tasks, workers, "building shards")
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    bad: list[tuple[str, str, str]] = []
    for shard, its_rows, its_bad in results:
        bad += its_bad
        if its_rows:
            rows += [{**row, "shard": len(shards)} for row in its_rows]
            shards.append(shard)
    return shards, rows, bad


def shard_name(dataset: str, number: int) -> str:
    """``<dataset>-<number of six digits>.tar``."""
    return f"{dataset}-{number:06d}.tar"


def run_tasks(tasks: Sequence[_Task], workers: int | None, title: str) -> list[Result]:
    """``build_one`` of every task by Ray, in the tasks' order."""
    results: list[Any] = [None] * len(tasks)
    with ray_cluster.session(workers) as ray, Progress(sum(len(t.scans) for t in tasks), "scans", title) as progress:
        quarantined = 0
        ahead = max(IN_FLIGHT, 2 * int(ray.cluster_resources().get("CPU", 1)))
        for index, result in ray_cluster.map_unordered(build_one, [(task,) for task in tasks], in_flight=ahead):
            results[index] = result
            quarantined += len(result[2])
            progress.advance(len(tasks[index].scans), quarantined=quarantined)
    return results


def build_one(task: _Task) -> Result:
    """Write one shard under a temporary name and rename it; runs in a Ray worker, one volume in memory at a time.

    A shard that an earlier run finished from the same inputs is kept.
    """
    # Taken before the inputs are read: a file written to meanwhile differs from it when the next run looks.
    mark = resume.fingerprint(
        task.scans, {f.name: getattr(task, f.name) for f in fields(task) if f.name not in ("scans", "out", "temporary")}
    )
    kept = resume.finished(Path(task.out), task.name, mark)
    if kept:
        return kept
    bad: list[tuple[str, str, str]] = []
    used: list[Scan] = []

    def samples() -> Any:
        for scan in task.scans:
            try:
                factor = scale_factor(task.scaling, scan.extra)
                payload = encode(load_volume(scan.path, task.grid, factor=factor), task.codec)
            except BadScan as error:
                bad.append((scan.key, str(scan.path), str(error)))
                continue
            used.append(scan)
            yield scan.key, payload, _describe(scan)

    # A name of its own for every try: Ray may run a task again whose first worker is lost but not dead.
    temporary = Path(task.temporary) / f"{task.name}.{uuid.uuid4().hex[:8]}"
    rows = write_shard(temporary, samples(), task.codec)
    shard: dict[str, Any] = {}
    if rows:
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
        shard = {"name": task.name, "bytes": size, "sha256": sha256, "scans": len(rows)}
    described = [{**row, **_describe(scan)} for row, scan in zip(rows, used, strict=True)]
    return resume.finish(Path(task.out), temporary, task.name, mark, (shard, described, bad))


def _describe(scan: Scan) -> dict[str, Any]:
    """What a sample's .json and the scan table say of a scan; no path, which may name a person."""
    known = {
        "participant_id": scan.participant_id, "session": scan.session, "run": scan.run, "dataset": scan.dataset,
        "site": scan.site, "age": None if scan.age != scan.age else scan.age, "sex": scan.sex,
    }  # fmt: skip
    return {**{name: value for name, value in scan.extra.items() if name not in PLACES}, **known}


def scan_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """A row per scan in the order of the shards, with its split."""
    table = pd.DataFrame(rows)
    table["age"] = pd.to_numeric(table["age"])
    # A participant is a person of a data set: two data sets may both have a sub-01.
    people = table.assign(participant=table["dataset"] + "/" + table["participant_id"])
    table["split"] = assign_splits(people, settings["splits"], settings["seed"])
    first = [*PLACES, "participant_id", "session", "run", "dataset", "site", "age", "sex"]
    return table[[*first, *(column for column in table.columns if column not in first)]]


def _already_built(folder: Path, grid: Grid, settings: dict[str, Any]) -> Manifest | None:
    if not (folder / MANIFEST).is_file():
        return None
    old = Manifest.load(folder)
    before = {**old.settings, "grid": Grid.from_dict(old.grid)}
    now = {**settings, "grid": grid}
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} holds shards built otherwise ({key} was {before.get(key)!r}, now {now[key]!r}); "
            "choose another folder, or remove that one"
        )
    resume.tidy(folder, [str(row["name"]) for row in old.shards])
    return old


def write_quarantine(path: Path, bad: list[tuple[str, str, str]]) -> None:
    """``quarantine.tsv``: a line for every scan left out, with its reason."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["key", "path", "reason"])
        writer.writerows(sorted(set(bad)))
