"""From a cohort to shards and their manifest: one Ray task a shard."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# Not used here: write_shard imports it, and a Ray task that is cancelled in the middle of an import spoils its worker.
import webdataset  # noqa: F401
from pydantic import TypeAdapter

from data_pipeline.cohort.grid import common_grid
from data_pipeline.cohort.pseudonyms import key_mark, read_key
from data_pipeline.cohort.read import is_simulated, name_of, read_cohort
from data_pipeline.cohort.scan import Scan
from data_pipeline.cohort.split import DEFAULT_SPLITS, assign_splits
from data_pipeline.quality.outliers import coarse_path, save_coarse
from data_pipeline.quality.rules import COLUMNS as QUALITY_COLUMNS
from data_pipeline.quality.rules import Quality, Removal, check_quality, read_scan, unlisted_removals, write_quarantine
from data_pipeline.shards import unfinished as resume
from data_pipeline.shards.purge import purge_shards
from data_pipeline.shards.tar import CODECS, encode, write_shard
from data_pipeline.shards.unfinished import Result
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.volume.load import (
    PREPARED,
    BadScan,
    Grid,
    Preparation,
    check_preparation,
    check_scaling,
)
from infra import ray_cluster
from infra.errors import UserError, nearest
from infra.files import sha256_of
from infra.progress import Progress
from infra.settings import to_dict

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
    preparation: Preparation
    codec: str
    quality: Quality


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
    quality: Quality | None = None,
    seed: int = 0,
    workers: int | None = None,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
    crop: str = "world",
    intensity: str | None = None,
) -> Manifest:
    """Build the shards of a cohort in ``out`` and return their manifest.

    Args:
        cohort, dataset, modality, layout, columns, key_file: see ``data_pipeline.cohort.read.read_cohort``.
        grid: where the voxels shall lie; None takes the cohort's own grid where its first scans share one, else the VBM
            grid at 1.5 mm.
        scaling: ``none``, or ``tiv``: divide by total intracranial volume (needs a ``tiv`` column in ml).
        codec: ``zst`` (zstd, a quarter of the size) or ``npy`` (which DALI's own reader decodes).
        splits: shares of the healthy participants, see ``data_pipeline.cohort.split``.
        quality: which scans are left out, see ``data_pipeline.quality.rules``; None takes the rules' defaults.
        crop, intensity: see ``data_pipeline.volume.load.load_volume``; None scales T1 images robustly, VBM maps not at all.

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
    intensity, quality = check_preparation(modality, crop, intensity), quality or Quality()
    scans, unknown = read_cohort(root, dataset, modality, layout=layout, columns=columns, key_file=key_file)
    check_quality(quality, scans)
    grid = grid or common_grid(scans)
    settings: dict[str, Any] = {
        "dataset": name_of(scans, root), "modality": modality, "scaling": scaling, "crop": crop, "intensity": intensity,
        "codec": codec, "scans_per_shard": scans_per_shard, "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "quality": to_dict(quality), "simulated": is_simulated(root), "scans_found": len(scans) + len(unknown),
        "pseudonymised": key_file is not None,
    }  # fmt: skip
    if key_file is not None:
        settings["pseudonym_key"] = key_mark(read_key(Path(key_file)))
    folder.mkdir(parents=True, exist_ok=True)
    done = _already_built(folder, grid, settings)
    if done:
        return done
    with resume.locked(folder):
        # Another process may have finished it since.
        return _already_built(folder, grid, settings) or _build(folder, scans, unknown, grid, settings, workers)


def _build(
    folder: Path, scans: list[Scan], unknown: list[Scan], grid: Grid, settings: dict[str, Any], workers: int | None
) -> Manifest:
    # Shards of this name may also be left from a data set whose manifest the user removed, to build it anew.
    count = -(-len(scans) // settings["scans_per_shard"])
    names = {shard_name(settings["dataset"], n) for n in range(count)}
    for leftover in folder.glob(f"{settings['dataset']}-{'[0-9]' * 6}.tar"):
        if leftover.name not in names:
            leftover.unlink()
    shards, rows, bad = _write_shards(folder, scans, grid, settings, workers)
    bad = [*unlisted_removals(unknown), *bad]
    write_quarantine(folder / "quarantine.tsv", bad)
    if not rows:
        raise UserError(f"no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    built = write_manifest(folder, grid, {**settings, "quarantined": len(bad)}, shards, scan_table(rows, settings))
    resume.clear(folder)
    return built


def _write_shards(
    folder: Path, scans: list[Scan], grid: Grid, settings: dict[str, Any], workers: int | None, first_number: int = 0,
    known: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Removal]]:  # fmt: skip
    """Shuffle the scans over shards, write these in Ray tasks, take out what the rules that compare scans refuse.

    Gives rows of shards, of scans, and what was quarantined. ``known``: see ``data_pipeline.quality.outliers.judge``.
    """
    # One shuffle, once: a reader that takes shard after shard sees mixed sites too.
    order = np.random.Generator(np.random.Philox(key=[settings["seed"], 0x5AAD])).permutation(len(scans))
    step, codec = settings["scans_per_shard"], settings["codec"]
    parts = [[scans[i] for i in order[first : first + step]] for first in range(0, len(scans), step)]
    names = [shard_name(settings["dataset"], first_number + n) for n in range(len(parts))]
    preparation, quality = Preparation.of(grid.to_dict(), settings), rules_of(settings)
    with resume.building(folder, names) as temporary, ray_cluster.session(workers):
        tasks = [
            _Task(part, str(folder), str(temporary), name, preparation, codec, quality)
            for name, part in zip(names, parts, strict=True)
        ]
        results = run_tasks(tasks, workers, "building shards")
        shards: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        bad: list[Removal] = []
        for shard, its_rows, its_bad in results:
            bad += its_bad
            if its_rows:
                rows += [{**row, "shard": len(shards)} for row in its_rows]
                shards.append(shard)
        places = {scan.key: scan.place for scan in scans}
        shards, rows, removed = purge_shards(folder, shards, rows, quality, codec=codec, paths=places, known=known)
    return shards, rows, [*bad, *removed]


def rules_of(settings: Mapping[str, Any]) -> Quality:
    """The quality rules of a manifest's settings; the defaults for one of before there were any."""
    return TypeAdapter(Quality).validate_python(settings.get("quality", {}))


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
    bad: list[Removal] = []
    used: list[tuple[Scan, dict[str, Any]]] = []
    coarse: list[Any] = []

    def samples() -> Any:
        for scan in task.scans:
            try:
                voxels, figures, small = read_scan(scan, task.preparation, task.quality)
            except BadScan as error:
                bad.append(Removal.of(scan, error))
                continue
            used.append((scan, figures))
            coarse.append(small)
            yield scan.key, encode(voxels, task.codec), _describe(scan)

    # A name of its own for every try: Ray may run a task again whose first worker is lost but not dead.
    temporary = Path(task.temporary) / f"{task.name}.{uuid.uuid4().hex[:8]}"
    rows = write_shard(temporary, samples(), task.codec)
    shard: dict[str, Any] = {}
    if rows:
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
        shard = {"name": task.name, "bytes": size, "sha256": sha256, "scans": len(rows)}
        save_coarse(coarse_path(Path(task.out), task.name), coarse)
    described = [{**row, **_describe(scan), **figures} for row, (scan, figures) in zip(rows, used, strict=True)]
    return resume.finish(Path(task.out), temporary, task.name, mark, (shard, described, bad))


def _describe(scan: Scan) -> dict[str, Any]:
    """What a sample's .json and the scan table say of a scan; no path, which may name a person."""
    known = {
        "participant_id": scan.participant_id, "session": scan.session, "run": scan.run, "dataset": scan.dataset,
        "site": scan.site, "age": None if scan.age != scan.age else scan.age, "sex": scan.sex,
    }  # fmt: skip
    return {**{name: value for name, value in scan.extra.items() if name not in (*PLACES, *QUALITY_COLUMNS)}, **known}


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
    first = {
        **PREPARED,
        "pseudonymised": False,
        "pseudonym_key": settings.get("pseudonym_key"),
        "quality": to_dict(Quality()),
    }  # of builds from before these were settings
    before = {**first, **old.settings, "grid": Grid.from_dict(old.grid)}
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
