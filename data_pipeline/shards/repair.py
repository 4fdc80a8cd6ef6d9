"""Builds damaged or missing shards again from their cohort, and takes them only if every byte is as the manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.cohort.read import DATA_SETS, read_cohort
from data_pipeline.cohort.scan import Scan
from data_pipeline.shards import unfinished as resume
from data_pipeline.shards.append import check_own, check_pseudonyms
from data_pipeline.shards.build import _Task, rules_of, run_tasks
from data_pipeline.shards.verify import stored_scans
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.load import Preparation
from infra.errors import UserError


def repair_shards(
    manifest: Manifest, cohort: str | Path, problems: dict[str, str], workers: int | None = None, **reading: Any
) -> dict[str, str]:
    """Rebuild the shards among ``problems`` (file name -> what is wrong) from ``cohort``; what is still wrong.

    A shard whose bytes come out otherwise than the manifest says (the cohort changed, or another release of a library
    wrote it) is left as it lies. ``reading``: layout, columns, key_file, as in ``read_cohort``.
    """
    check_own(manifest)
    check_pseudonyms(manifest, reading.get("key_file"))
    root, folder = Path(cohort).resolve(), manifest.root.resolve()
    numbers = {str(row["name"]): n for n, row in enumerate(manifest.shards) if str(row["name"]) in problems}
    left, preparation = dict(problems), Preparation.of(manifest.grid, manifest.settings)
    tasks = []
    cohorts: dict[str, dict[str, Scan] | str] = {}
    with resume.locked(folder), resume.private_folder(folder) as private:
        for name, number in numbers.items():
            scans = _scans_of(manifest, number, root, cohorts, reading)
            if isinstance(scans, str):
                left[name] = f"{problems[name]}; not repaired: {scans}"
                continue
            tasks.append(_Task(scans, str(private), str(private), name, preparation, manifest.settings["codec"],
                               rules_of(manifest.settings)))  # fmt: skip
        results = run_tasks(tasks, workers, "rebuilding shards") if tasks else []
        for task, (shard, _, bad) in zip(tasks, results, strict=True):
            if shard and shard["sha256"] == manifest.shards[numbers[task.name]]["sha256"]:
                (private / task.name).replace(folder / task.name)
                del left[task.name]
            else:
                why = (
                    f"scan {bad[0].key} cannot be used any more ({bad[0].reason})"
                    if bad
                    else "its bytes come out otherwise"
                )
                left[task.name] = (
                    f"{problems[task.name]}; not repaired, the old file is as it was: {why}; "
                    "the cohort, its tables or a library changed since the build"
                )
    return left


def _scans_of(
    manifest: Manifest, number: int, root: Path, cohorts: dict[str, dict[str, Scan] | str], reading: dict[str, Any]
) -> list[Scan] | str:
    """A shard's scans out of the cohort, in the order of its bytes; or why they cannot be had."""
    rows = stored_scans(manifest, number)
    found = []
    for stored in rows:
        dataset = str(stored.row["dataset"])
        if dataset not in cohorts:
            try:
                # A list of data sets names each of them itself.
                name = None if root.suffix.lower() in DATA_SETS else dataset
                scans, _ = read_cohort(root, name, str(manifest.settings["modality"]), **reading)
                cohorts[dataset] = {scan.key: scan for scan in scans}
            except UserError as error:
                cohorts[dataset] = str(error)
        there = cohorts[dataset]
        if isinstance(there, str):
            return there
        if stored.key not in there:
            return f"cohort {root} has no scan {stored.key}"
        found.append(there[stored.key])
    return found
