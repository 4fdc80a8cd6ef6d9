"""From a cohort to shards and their manifest: one Ray task a shard."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.cohort import is_simulated, read_bids
from data_pipeline.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.quality import COLUMNS as QUALITY_COLUMNS
from data_pipeline.quality import Quality, Removal, check_quality, read_scan, write_quarantine
from data_pipeline.quality_cohort import COARSE, coarse_path, judge_shards, save_coarse
from data_pipeline.scan import Scan
from data_pipeline.shard import CODECS, UNFINISHED, encode, write_shard
from data_pipeline.split import DEFAULT_SPLITS, assign_splits
from data_pipeline.volume import BadScan, Grid, check_scaling, open_image
from infra import ray_cluster
from infra.errors import UserError, nearest
from infra.files import sha256_of
from infra.progress import Progress
from infra.settings import to_dict

PLACES = (
    "key",
    "shard",
    "offset",
    "size",
    "crc32c",
)  # the manifest's own columns; a table's of these names are left out


@dataclass(frozen=True)
class _Task:
    """What one Ray task needs to write one shard."""

    scans: list[Scan]
    out: str
    name: str
    grid: Grid
    scaling: str
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
) -> Manifest:
    """Build the shards of a BIDS-like cohort in ``out`` and return their manifest.

    Args:
        grid: where the voxels shall lie; None takes the cohort's own grid where its first scans share one, else the VBM
            grid at 1.5 mm.
        scaling: ``none``, or ``tiv``: divide by total intracranial volume (needs a ``tiv`` column in ml).
        codec: ``zst`` (zstd, a quarter of the size) or ``npy`` (which DALI's own reader decodes).
        splits: shares of the healthy participants, see ``data_pipeline.split``.
        quality: which scans are left out, see ``data_pipeline.quality``; None takes the rules' defaults.

    The same cohort and settings give the same bytes, whatever ``workers``. A scan that cannot be used goes to
    ``quarantine.tsv`` with its reason. A folder that holds this very build already is left as it is; another one in it
    is refused.
    """
    folder, root = Path(out).resolve(), Path(cohort).resolve()  # Ray's workers have a working directory of their own
    check_scaling(scaling)
    if codec not in CODECS:
        raise UserError(f"codec={codec!r} is not known{nearest(codec, CODECS)}; allowed: {', '.join(CODECS)}")
    if scans_per_shard < 1:
        raise UserError(f"scans_per_shard={scans_per_shard} must be at least 1")
    scans, unknown = read_bids(root, dataset, modality)
    check_keys(root, scans)
    grid, quality = grid or common_grid(scans), quality or Quality()
    check_quality(quality, scans)
    settings: dict[str, Any] = {
        "dataset": scans[0].dataset, "modality": modality, "scaling": scaling, "codec": codec,
        "scans_per_shard": scans_per_shard, "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "quality": to_dict(quality),
        "simulated": is_simulated(root), "scans_found": len(scans) + len(unknown),
    }  # fmt: skip
    done = _already_built(folder, grid, settings)
    if done:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    # What a killed build left, with other settings perhaps: no manifest lists it.
    for leftover in (
        *folder.glob(f"{UNFINISHED}*"),
        *folder.glob(f"*{COARSE}*"),
        *folder.glob(f"{scans[0].dataset}-[0-9]*.tar"),
    ):
        leftover.unlink()
    with ray_cluster.session(workers):
        shards, rows, bad = _write_shards(folder, scans, grid, settings, quality)
        paths = {scan.key: scan.path for scan in scans}
        shards, rows, removed = judge_shards(folder, shards, rows, quality, codec, paths)
    bad += removed + [
        Removal.of(scan, BadScan("participant is not in participants.tsv", "participant")) for scan in unknown
    ]
    write_quarantine(folder / "quarantine.tsv", bad)
    if not rows:
        raise UserError(f"cohort {root}: no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    settings["quarantined"] = len(bad)
    return write_manifest(folder, grid, settings, shards, _scan_table(rows, settings))


def check_keys(root: Path, scans: list[Scan]) -> None:
    """UserError where two files of a cohort have one key."""
    twice = pd.Series([scan.key for scan in scans]).value_counts()
    if twice.iloc[0] > 1:
        raise UserError(
            f"cohort {root}: {twice.iloc[0]} files have the key {twice.index[0]}; name their runs _run-1, _run-2"
        )


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
    folder: Path, scans: list[Scan], grid: Grid, settings: dict[str, Any], quality: Quality
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Removal]]:
    """Shuffle the scans over shards, write these in Ray tasks; rows of shards, of scans, and what was quarantined."""
    # One shuffle, once: a reader that takes shard after shard sees mixed sites too.
    order = np.random.Generator(np.random.Philox(key=[settings["seed"], 0x5AAD])).permutation(len(scans))
    step = settings["scans_per_shard"]
    parts = [[scans[i] for i in order[first : first + step]] for first in range(0, len(scans), step)]
    scaling, codec = settings["scaling"], settings["codec"]
    tasks = [
        _Task(part, str(folder), f"{settings['dataset']}-{n:06d}.tar", grid, scaling, codec, quality)
        for n, part in enumerate(parts)
    ]
    results: list[Any] = [None] * len(tasks)
    with Progress(len(scans), "scans", "building shards") as progress:
        quarantined = 0
        for index, result in ray_cluster.map_unordered(build_one, [(task,) for task in tasks], in_flight=64):
            results[index] = result
            quarantined += len(result[2])
            progress.advance(len(parts[index]), quarantined=quarantined)
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    bad: list[Removal] = []
    for shard, its_rows, its_bad in results:
        bad += its_bad
        if its_rows:
            rows += [{**row, "shard": len(shards)} for row in its_rows]
            shards.append(shard)
    return shards, rows, bad


def build_one(task: _Task) -> tuple[dict[str, Any], list[dict[str, Any]], list[Removal]]:
    """Write one shard under a temporary name and rename it; runs in a Ray worker, one volume in memory at a time."""
    bad: list[Removal] = []
    used: list[tuple[Scan, dict[str, Any]]] = []
    coarse: list[Any] = []

    def samples() -> Any:
        for scan in task.scans:
            try:
                voxels, figures, small = read_scan(scan, task.grid, task.scaling, task.quality)
            except BadScan as error:
                bad.append(Removal.of(scan, error))
                continue
            used.append((scan, figures))
            coarse.append(small)
            yield scan.key, encode(voxels, task.codec), _describe(scan)

    final = Path(task.out) / task.name
    temporary = final.with_name(f"{UNFINISHED}{task.name}")
    rows = write_shard(temporary, samples(), task.codec)
    if not rows:
        temporary.unlink()
        return {}, [], bad
    save_coarse(coarse_path(final.parent, task.name), coarse)
    shard = {"name": task.name, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary), "scans": len(rows)}
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(final)
    return shard, [{**row, **_describe(scan), **figures} for row, (scan, figures) in zip(rows, used, strict=True)], bad


def _describe(scan: Scan) -> dict[str, Any]:
    """What a sample's .json and the scan table say of a scan; no path, which may name a person."""
    known = {
        "participant_id": scan.participant_id, "session": scan.session, "run": scan.run, "dataset": scan.dataset,
        "site": scan.site, "age": None if scan.age != scan.age else scan.age, "sex": scan.sex,
    }  # fmt: skip
    return {**{name: value for name, value in scan.extra.items() if name not in (*PLACES, *QUALITY_COLUMNS)}, **known}


def _scan_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table["age"] = pd.to_numeric(table["age"])
    # A participant is a person of a data set: two data sets may both have a sub-01.
    people = table.assign(participant=table["dataset"] + "/" + table["participant_id"])
    table["split"] = assign_splits(people, settings["splits"], settings["seed"])
    first = [
        "key",
        "shard",
        "offset",
        "size",
        "crc32c",
        "participant_id",
        "session",
        "run",
        "dataset",
        "site",
        "age",
        "sex",
    ]
    return table[[*first, *(column for column in table.columns if column not in first)]]


def _already_built(folder: Path, grid: Grid, settings: dict[str, Any]) -> Manifest | None:
    if not (folder / MANIFEST).is_file():
        return None
    old = Manifest.load(folder)
    before = {**{k: v for k, v in old.settings.items() if k != "quarantined"}, "grid": Grid.from_dict(old.grid)}
    now = {**settings, "grid": grid}
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} holds shards built otherwise ({key} was {before.get(key)!r}, now {now[key]!r}); "
            "choose another folder, or remove that one"
        )
    return old
