"""From a cohort to shards and their manifest: one Ray task a shard."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.cohort import is_simulated, name_of, read_cohort
from data_pipeline.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.scan import Scan
from data_pipeline.shard import CODECS, encode, write_shard
from data_pipeline.split import DEFAULT_SPLITS, assign_splits
from data_pipeline.volume import (
    PREPARED,
    BadScan,
    Grid,
    check_preparation,
    check_scaling,
    load_volume,
    open_image,
    scale_factor,
)
from infra import ray_cluster
from infra.errors import UserError, nearest
from infra.files import atomic_write, sha256_of
from infra.progress import Progress

UNFINISHED = ".unfinished-"
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
    crop: str = "world"
    intensity: str = "none"


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
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
    crop: str = "world",
    intensity: str | None = None,
) -> Manifest:
    """Build the shards of a cohort in ``out`` and return their manifest.

    Args:
        cohort, dataset, modality, layout, columns, key_file: see ``data_pipeline.cohort.read_cohort``.
        grid: where the voxels shall lie; None takes the cohort's own grid where its first scans share one, else the VBM
            grid at 1.5 mm.
        scaling: ``none``, or ``tiv``: divide by total intracranial volume (needs a ``tiv`` column in ml).
        codec: ``zst`` (zstd, a quarter of the size) or ``npy`` (which DALI's own reader decodes).
        splits: shares of the healthy participants, see ``data_pipeline.split``.
        crop, intensity: see ``data_pipeline.volume.load_volume``; None scales T1 images robustly, VBM maps not at all.

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
    intensity = check_preparation(modality, crop, intensity)
    scans, unknown = read_cohort(root, dataset, modality, layout=layout, columns=columns, key_file=key_file)
    grid = grid or common_grid(scans)
    settings: dict[str, Any] = {
        "dataset": name_of(scans, root), "crop": crop, "intensity": intensity, "modality": modality,
        "scaling": scaling, "codec": codec,
        "scans_per_shard": scans_per_shard, "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "simulated": is_simulated(root), "scans_found": len(scans) + len(unknown),
        "pseudonymised": key_file is not None,
    }  # fmt: skip
    done = _already_built(folder, grid, settings)
    if done:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    # What a killed build left, with other settings perhaps: no manifest lists it.
    for leftover in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{settings['dataset']}-[0-9]*.tar")):
        leftover.unlink()
    shards, rows, bad = _write_shards(folder, scans, grid, settings, workers)
    bad = [(scan.key, scan.place, "participant is not in participants.tsv") for scan in unknown] + bad
    _write_quarantine(folder / "quarantine.tsv", bad)
    if not rows:
        raise UserError(f"cohort {root}: no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    settings["quarantined"] = len(bad)
    return write_manifest(folder, grid, settings, shards, _scan_table(rows, settings))


def common_grid(scans: list[Scan], look_at: int = 5) -> Grid:
    """The grid that the first readable scans share, else the VBM grid at 1.5 mm."""
    grids = set()
    for scan in scans[:look_at]:
        try:
            image = open_image(scan.path, scan.orientation)
        except BadScan:
            continue
        grids.add(Grid.of(image.shape, image.affine))
    shared = grids.pop() if len(grids) == 1 else None
    return shared if shared is not None and shared.upright else Grid.vbm(1.5)


def _write_shards(
    folder: Path, scans: list[Scan], grid: Grid, settings: dict[str, Any], workers: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Shuffle the scans over shards, write these in Ray tasks; rows of shards, of scans, and what was quarantined."""
    # One shuffle, once: a reader that takes shard after shard sees mixed sites too.
    order = np.random.Generator(np.random.Philox(key=[settings["seed"], 0x5AAD])).permutation(len(scans))
    step = settings["scans_per_shard"]
    parts = [[scans[i] for i in order[first : first + step]] for first in range(0, len(scans), step)]
    tasks = [
        _Task(
            part,
            str(folder),
            f"{settings['dataset']}-{n:06d}.tar",
            grid,
            settings["scaling"],
            settings["codec"],
            settings["crop"],
            settings["intensity"],
        )
        for n, part in enumerate(parts)
    ]
    results: list[Any] = [None] * len(tasks)
    with ray_cluster.session(workers), Progress(len(scans), "scans", "building shards") as progress:
        quarantined = 0
        for index, result in ray_cluster.map_unordered(build_one, [(task,) for task in tasks], in_flight=64):
            results[index] = result
            quarantined += len(result[2])
            progress.advance(len(parts[index]), quarantined=quarantined)
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    bad: list[tuple[str, str, str]] = []
    for shard, its_rows, its_bad in results:
        bad += its_bad
        if its_rows:
            rows += [{**row, "shard": len(shards)} for row in its_rows]
            shards.append(shard)
    return shards, rows, bad


def build_one(task: _Task) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Write one shard under a temporary name and rename it; runs in a Ray worker, one volume in memory at a time."""
    bad: list[tuple[str, str, str]] = []
    used: list[Scan] = []

    def samples() -> Any:
        for scan in task.scans:
            try:
                factor = scale_factor(task.scaling, scan.extra)
                volume = load_volume(
                    scan.path, task.grid, factor=factor, crop=task.crop, intensity=task.intensity,
                    orientation=scan.orientation,
                )  # fmt: skip
                payload = encode(volume, task.codec)
            except BadScan as error:
                bad.append((scan.key, scan.place, str(error)))
                continue
            used.append(scan)
            yield scan.key, payload, _describe(scan)

    final = Path(task.out) / task.name
    temporary = final.with_name(f"{UNFINISHED}{task.name}")
    rows = write_shard(temporary, samples(), task.codec)
    if not rows:
        temporary.unlink()
        return {}, [], bad
    shard = {"name": task.name, "bytes": temporary.stat().st_size, "sha256": sha256_of(temporary), "scans": len(rows)}
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(final)
    return shard, [{**row, **_describe(scan)} for row, scan in zip(rows, used, strict=True)], bad


def _describe(scan: Scan) -> dict[str, Any]:
    """What a sample's .json and the scan table say of a scan; no path, which may name a person."""
    known = {
        "participant_id": scan.participant_id, "session": scan.session, "run": scan.run, "dataset": scan.dataset,
        "site": scan.site, "age": None if scan.age != scan.age else scan.age, "sex": scan.sex,
    }  # fmt: skip
    return {**{name: value for name, value in scan.extra.items() if name not in PLACES}, **known}


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
    first = {**PREPARED, "pseudonymised": False}  # of builds from before these were settings
    before = {
        **first, **{k: v for k, v in old.settings.items() if k != "quarantined"}, "grid": Grid.from_dict(old.grid)
    }  # fmt: skip
    now = {**settings, "grid": grid}
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} holds shards built otherwise ({key} was {before.get(key)!r}, now {now[key]!r}); "
            "choose another folder, or remove that one"
        )
    return old


def _write_quarantine(path: Path, bad: list[tuple[str, str, str]]) -> None:
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["key", "path", "reason"])
        writer.writerows(sorted(bad))
