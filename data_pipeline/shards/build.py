"""Builds shards and their manifest from a cohort of scans."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from data_pipeline.cohort.grid import common_grid
from data_pipeline.cohort.layouts import CohortScans
from data_pipeline.cohort.pseudonyms import key_fingerprint, read_key
from data_pipeline.cohort.read import is_simulated, name_of, origins_of, read_with_changes
from data_pipeline.cohort.scan import array_orientations
from data_pipeline.cohort.split import DEFAULT_SPLITS, check_shares
from data_pipeline.cohort.texts import warn
from data_pipeline.quality.columns import PAGE, column_tables, warn_of_unmatched, write_columns
from data_pipeline.quality.rules import Quality, check_quality, unlisted_removals, write_quarantine
from data_pipeline.shards import unfinished
from data_pipeline.shards.scan_table import scan_table
from data_pipeline.shards.tar import CODECS
from data_pipeline.shards.writing import shard_name, write_shards
from data_pipeline.storage.licences import in_words
from data_pipeline.storage.manifest import MANIFEST, Manifest, write_manifest
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import DEFAULT_PREPARATION, check_preparation, check_scaling
from infra import ray_cluster
from infra.errors import OPTIONAL_PATH, PATH, WHOLE, Kind, UserError, check_arguments, nearest
from infra.settings import to_dict


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
    """Build the shards of a cohort in the folder ``out`` and return their manifest.

    The same cohort, settings and library versions give the same bytes, whatever ``workers`` is. A scan that cannot be used
    is listed in ``quarantine.tsv`` with the reason, and the build continues. ``columns.html`` shows how the columns of the
    tables were read; the manifest records the licences that the data sets state. After a killed build, the same call
    continues where it stopped. If ``out`` already holds this build, nothing is written.

    Args:
        cohort: the cohort's folder or table, see ``data_pipeline.cohort.read.read_cohort``; also for ``dataset``,
            ``modality``, ``layout``, ``columns`` and ``key_file``.
        out: the folder to write; it is created if it is missing.
        dataset: name of the data set.
        modality: which images to read.
        grid: the grid to which all scans are resampled. None uses the grid that the cohort's first scans share, or the
            VBM grid at 1.5 mm if they share none.
        scaling: ``none``, or ``tiv`` to divide by total intracranial volume (needs a ``tiv`` column in ml).
        codec: ``zst`` (zstd, a quarter of the size) or ``npy`` (plain arrays, which DALI's own reader decodes).
        scans_per_shard: number of scans in a shard; the last one may have fewer.
        splits: shares of the healthy participants, see ``data_pipeline.cohort.split``.
        quality: which scans are left out, see ``data_pipeline.quality.rules``; None uses the rules' defaults.
        seed: decides the splits and the order of the scans.
        workers: Ray workers; None for one per core.
        layout: how the cohort's folder is organised.
        columns: file that declares columns.
        key_file: key with which participants are pseudonymised.
        crop: see ``data_pipeline.volume.load.load_volume``.
        intensity: see ``data_pipeline.volume.load.load_volume``; None scales T1 images robustly and leaves VBM maps as
            they are.

    Raises:
        UserError: if an option or the cohort is invalid, no scan can be used, or ``out`` holds another build.
    """
    check_arguments(PATH, cohort=cohort, out=out)
    check_arguments(OPTIONAL_PATH, columns=columns, key_file=key_file)
    check_arguments(Kind((Quality, type(None)), "a data_pipeline.quality.rules.Quality or None"), quality=quality)
    check_storage(splits, codec, scans_per_shard, seed=seed, scaling=scaling, workers=workers)
    folder, root = Path(out).resolve(), Path(cohort).resolve()  # absolute: Ray workers run in another directory
    intensity, quality = check_preparation(modality, crop, intensity), quality or Quality()
    cohort_scans = read_with_changes(root, dataset, modality, layout=layout, columns=columns, key_file=key_file)
    scans, unlisted = cohort_scans.scans, cohort_scans.unlisted
    check_quality(quality, scans)
    grid = grid or common_grid(scans)
    settings: dict[str, Any] = {
        "dataset": name_of(scans, root), "modality": modality, "scaling": scaling, "crop": crop, "intensity": intensity,
        "codec": codec, "scans_per_shard": scans_per_shard, "seed": seed, "splits": splits or DEFAULT_SPLITS,
        "quality": to_dict(quality), "simulated": is_simulated(root), "scans_found": len(scans) + len(unlisted),
        "pseudonymised": key_file is not None, "array_orientations": array_orientations(scans),
    }  # fmt: skip
    settings |= origins_of(root, settings["dataset"], dataset, columns)
    if key_file is not None:
        settings["pseudonym_key"] = key_fingerprint(read_key(Path(key_file)))
    folder.mkdir(parents=True, exist_ok=True)
    existing = _existing_build(folder, grid, settings)
    if existing:
        return existing
    with unfinished.locked(folder):
        # Checked again under the lock: another process may have finished the build meanwhile.
        existing = _existing_build(folder, grid, settings)
        return existing or _build(folder, cohort_scans, grid, settings, workers)


def check_storage(
    splits: dict[str, float] | None, codec: str, scans_per_shard: int, *, seed: int, scaling: str, workers: int | None
) -> None:
    """Raise UserError if one of these arguments of ``build_shards`` cannot be used."""
    check_arguments(WHOLE, scans_per_shard=scans_per_shard, seed=seed)
    ray_cluster.check_workers(workers)
    check_scaling(scaling)
    if splits is not None:
        check_shares(splits, splits)
    if codec not in CODECS:
        raise UserError(f"codec={codec!r} is not known{nearest(codec, CODECS)}; allowed: {', '.join(CODECS)}")
    if scans_per_shard < 1:
        raise UserError(f"scans_per_shard={scans_per_shard} must be at least 1")


def _build(
    folder: Path, cohort_scans: CohortScans, grid: Grid, settings: dict[str, Any], workers: int | None
) -> Manifest:
    scans, unlisted, changes, without_scan = cohort_scans
    # The user may have removed the manifest of an earlier build to build again; its surplus shards are removed here.
    count = -(-len(scans) // settings["scans_per_shard"])
    names = {shard_name(settings["dataset"], n) for n in range(count)}
    for leftover in folder.glob(f"{settings['dataset']}-{'[0-9]' * 6}.tar"):
        if leftover.name not in names:
            leftover.unlink()
    shards, rows, refused = write_shards(folder, scans, grid, settings, workers=workers)
    refused = [*unlisted_removals(unlisted), *refused]
    write_quarantine(folder / "quarantine.tsv", refused)
    tables = column_tables(scans, changes, without_scan, len(unlisted))
    write_columns(folder / PAGE, settings["dataset"], tables)
    warn_of_unmatched(without_scan)
    if not rows:
        raise UserError(f"no scan could be used; the reasons are in {folder / 'quarantine.tsv'}")
    built = write_manifest(folder, grid, {**settings, "quarantined": len(refused)}, shards, scan_table(rows, settings))
    unfinished.remove_leftovers(folder)
    return built


def _existing_build(folder: Path, grid: Grid, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest in ``folder``, None if there is none; raises UserError if it is of another build."""
    if not (folder / MANIFEST).exists():
        return None
    old = Manifest.load(folder)
    # The values of builds made before these settings existed.
    defaults = {
        **DEFAULT_PREPARATION,
        "pseudonymised": False,
        "array_orientations": settings["array_orientations"],
        "pseudonym_key": settings.get("pseudonym_key"),
        "preparations": settings.get("preparations"),
        "quality": to_dict(Quality()),
    }
    before = {**defaults, **old.settings, "grid": Grid.from_dict(old.grid)}
    now = {**settings, "grid": grid}
    changed = [key for key in now if key != "licences" and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} holds shards built with other settings ({key} was {_shown(before.get(key))}, now {_shown(now[key])}); "
            "choose another folder, or remove that one"
        )
    _compare_licences(folder, old, settings)
    unfinished.remove_records(folder, [str(row["name"]) for row in old.shards])
    return old


def _compare_licences(folder: Path, old: Manifest, settings: dict[str, Any]) -> None:
    """Warn of licences that the cohort states otherwise than the manifest does; its bytes do not depend on them."""
    recorded = old.licences()
    for name, stated in settings.get("licences", {}).items():
        if name in recorded and stated["licence"] not in recorded[name]:
            warn(
                f"{name}: licence {stated['licence']!r} is stated in {stated['stated_in']}, {folder} records "
                f"{in_words({name: recorded[name]})}; to change it: yaware shards annotate {folder} --replace "
                f"--licence {shlex.quote(name + '=' + stated['licence'])}"
            )


def _shown(value: Any) -> str:
    """A setting in a message; the recipe of a preparation has pages."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
