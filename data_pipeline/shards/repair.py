"""Rebuilds damaged or missing shards from their cohort, and keeps only those whose bytes match the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.cohort.read import DATA_SETS, read_with_changes
from data_pipeline.cohort.scan import Scan
from data_pipeline.shards import unfinished
from data_pipeline.shards.append import check_not_indexed, check_pseudonyms
from data_pipeline.shards.scan_table import text_columns
from data_pipeline.shards.verify import stored_scans
from data_pipeline.shards.writing import ShardTask, quality_rules, run_tasks
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.preparation import Preparation
from infra.errors import UserError


def repair_shards(
    manifest: Manifest, cohort: str | Path, problems: dict[str, str], workers: int | None = None, **reading: Any
) -> dict[str, str]:
    """Rebuild the shards named in ``problems`` from ``cohort`` and return the problems that remain.

    A shard is left as it is if its rebuilt bytes differ from the manifest: the cohort changed, or it was written with
    another release of a library.

    Args:
        manifest: the data set.
        cohort: the cohort from which the shards were built.
        problems: file name -> what is wrong, as ``verify.find_problems`` returns it.
        workers: Ray workers; None for one per core.
        reading: ``layout``, ``columns`` and ``key_file``, as in ``read_cohort``.

    Raises:
        UserError: if the data set is an index, or ``key_file`` does not fit it.
    """
    check_not_indexed(manifest)
    check_pseudonyms(manifest, reading.get("key_file"))
    root, folder = Path(cohort).resolve(), manifest.root.resolve()
    numbers = {str(row["name"]): n for n, row in enumerate(manifest.shards) if str(row["name"]) in problems}
    remaining, preparation = dict(problems), Preparation.of(manifest.grid, manifest.settings)
    codec, quality = manifest.settings["codec"], quality_rules(manifest.settings)
    tasks = []
    cohorts: dict[str, dict[str, Scan] | str] = {}
    with unfinished.locked(folder), unfinished.private_folder(folder) as private:
        for name, number in numbers.items():
            scans = _scans_of_shard(manifest, number, root, cohorts, reading)
            if isinstance(scans, str):
                remaining[name] = f"{problems[name]}; not repaired: {scans}"
                continue
            tasks.append(
                ShardTask(
                    scans=scans, out=str(private), temporary=str(private), name=name, preparation=preparation,
                    codec=codec, quality=quality,
                )
            )  # fmt: skip
        results = run_tasks(tasks, workers, "rebuilding shards") if tasks else []
        for task, rebuilt in zip(tasks, results, strict=True):
            if rebuilt.shard and rebuilt.shard["sha256"] == manifest.shards[numbers[task.name]]["sha256"]:
                (private / task.name).replace(folder / task.name)
                del remaining[task.name]
                continue
            reason = "its bytes differ from the manifest"
            if rebuilt.removals:
                first = rebuilt.removals[0]
                reason = f"scan {first.key} can no longer be used ({first.reason})"
            remaining[task.name] = (
                f"{problems[task.name]}; not repaired, the old file is unchanged: {reason}; "
                "the cohort, its tables or a library changed since the build"
            )
    return remaining


def _scans_of_shard(
    manifest: Manifest, number: int, root: Path, cohorts: dict[str, dict[str, Scan] | str], reading: dict[str, Any]
) -> list[Scan] | str:
    """Return a shard's scans from the cohort, in the order of its bytes, or the reason why they are not available.

    ``cohorts`` caches, for each data set, the scans by key or the error.
    """
    scans = []
    for stored in stored_scans(manifest, number):
        dataset = str(stored.row["dataset"])
        if dataset not in cohorts:
            try:
                # A table of data sets names each of them itself.
                name = None if root.suffix.lower() in DATA_SETS else dataset
                cohort = read_with_changes(
                    root, name, str(manifest.settings["modality"]), text=text_columns(manifest.scans), **reading
                )
                cohorts[dataset] = {scan.key: scan for scan in cohort.scans}
            except UserError as error:
                cohorts[dataset] = str(error)
        available = cohorts[dataset]
        if isinstance(available, str):
            return available
        if stored.key not in available:
            return f"cohort {root} has no scan {stored.key}"
        scans.append(available[stored.key])
    return scans
