"""``yaware cohort prepare``: the arguments of ``prepare_cohort`` on the command line, and its dry run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.cli_arguments import add_layout_arguments, layout_options
from data_pipeline.prepare.derivative import DESCRIPTION, check_claim, read_timings
from data_pipeline.prepare.driver import (
    PreparedCohort,
    RawCohort,
    check_recipe,
    find_finished,
    is_dicom_folder,
    prepare_cohort,
    read_raw_cohort,
    scan_tasks,
)
from data_pipeline.prepare.job import ScanTask, prepare_one
from data_pipeline.prepare.page import PAGE
from data_pipeline.prepare.settings import PrepareRecipe, load_prepare_recipe
from data_pipeline.prepare.steps.dicom import Series, find_series
from data_pipeline.prepare.steps.dicom_cohort import write_dicom_cohort
from infra import ray_cluster
from infra.errors import UserError
from infra.files import check_output, read_text
from infra.processes.allowance import usable_cores
from infra.processes.scratch import scratch_folder
from infra.progress import clock
from infra.slurm.batch_script import RECIPE_COPY, CheckedCommand, JobSize
from infra.slurm.parser import OneLineParser

LISTED = 20  # scans that a dry run names
TIMED, MOST_TIMED = 2, 10  # scans that a dry run prepares for its estimate; scans that it tries for that
JOBS = ".jobs"  # folder of batch scripts and logs in OUT: hidden, as a new OUT may hold hidden files only


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware cohort prepare``."""
    parser.add_argument(
        "raw", help="folder of raw scans or of DICOM files, table of paths (.csv, .tsv), or list of data sets (.yaml)"
    )
    parser.add_argument("out", type=Path, help="folder for the prepared scans, a BIDS derivative")
    parser.add_argument("--pipeline", help="quasiraw (default), vbm (modulated grey matter) or deepmriprep")
    parser.add_argument(
        "--spacing", type=float, help="edge of a prepared voxel in mm (default 1 for quasiraw, 1.5 for vbm)"
    )
    parser.add_argument("--rigid", action="store_true", help="register with 6 parameters instead of 12 (not vbm)")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE",
        help="YAML file with a section prepare:; --prepare.section.key=value sets a single parameter",
    )  # fmt: skip
    parser.add_argument("--dataset", help="name with which every key begins (default: the name of the cohort's folder)")
    add_layout_arguments(parser)
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")
    parser.add_argument("--gpu", action="store_true", help="find brains on a GPU, which four workers share")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done, and estimate the CPU hours")


def run_prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run ``yaware cohort prepare``; return the exit status."""
    recipe = recipe_of(options, overrides)
    reading = {"dataset": options.dataset, **layout_options(options)}
    if options.dry_run:
        check_recipe(recipe)
        source = Path(options.raw).resolve()
        if is_dicom_folder(source, options.layout):
            return _list_series(source, recipe, options)
        _dry_run(read_raw_cohort(options.raw, options.out, **reading), recipe, options)
        return 0
    done = prepare_cohort(options.raw, options.out, recipe, workers=options.workers, gpu=options.gpu, **reading)
    _report(done)
    return 0 if done.prepared else 1


def check_batch(arguments: Sequence[str], size: JobSize) -> CheckedCommand:
    """Check the arguments of ``yaware cohort prepare`` for a batch job, which keeps a copy of the recipe. Raises UserError."""
    parser = OneLineParser(prog="yaware cohort prepare")
    add_prepare_arguments(parser)
    options, overrides = parser.parse_known_args(arguments[1:])
    if options.dry_run:
        raise UserError("--dry-run of the preparation does nothing in a job; run it here, without launch --slurm")
    check_recipe(recipe_of(options, overrides))
    ray_cluster.check_workers(options.workers)
    if not size.waits and not Path(options.raw).exists():
        raise UserError(f"{options.raw} is not there; give the folder or table of the raw scans")
    check_output(options.out, "OUT")
    recipe = "" if options.recipe is None else read_text(options.recipe)
    new = None if (options.out / DESCRIPTION).is_file() else options.out
    return CheckedCommand(_with_copy(arguments[1:]), options.out / JOBS, recipe, new)


def _with_copy(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the copy of the recipe in place of ``--recipe FILE``, which may be shortened or have ``=``."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        option, equals, _ = word.partition("=")
        # The parser has taken the arguments, so a beginning of the option's name is no other option.
        if option.startswith("--r") and "--recipe".startswith(option):
            words += ["--recipe", RECIPE_COPY]
            if not equals:
                next(rest)
        else:
            words.append(word)
    return words


def recipe_of(options: argparse.Namespace, overrides: Sequence[str]) -> PrepareRecipe:
    """Return the recipe of the options and of the changes ``--prepare.key=value``. Raises UserError for an unknown argument."""
    for argument in overrides:
        if not argument.startswith("--prepare."):
            raise UserError(f"unrecognized argument: {argument}; parameters are set as --prepare.section.key=value")
    given = {name: getattr(options, name) for name in ("pipeline", "spacing")}
    own = [f"--prepare.{name}={value}" for name, value in given.items() if value is not None]
    own += ["--prepare.linear.kind=rigid"] if options.rigid else []
    return load_prepare_recipe(options.recipe, [*own, *overrides])


def _report(done: PreparedCohort) -> None:
    quarantined = len(done.removals)
    print(
        f"cohort: prepared {done.prepared} scans in {done.folder}"
        + (f", {done.already} of all by an earlier run" if done.already else "")
    )
    if done.seconds:
        mean = sum(done.seconds.values()) / len(done.seconds)
        print(f"cohort: {clock(mean)} of CPU for a scan, {sum(done.seconds.values()) / 3600:.2f} CPU hours in all")
    print(f"cohort: look at {done.folder / PAGE}")
    if quarantined:
        print(f"cohort: {quarantined} scans are in quarantine; the reasons are in {done.folder / 'quarantine.tsv'}")


def _list_series(source: Path, recipe: PrepareRecipe, options: argparse.Namespace) -> int:
    """Print the DICOM series of a folder, and what preparing them would cost; return the exit status."""
    check_claim(options.out, recipe)
    series = find_series(source)
    for one in series:
        outcome = f"left out: {one.reason}" if one.reason else "would be prepared"
        print(f"  {one.files[0].relative_to(source).parent}: {one.description} ({len(one.files)} files): {outcome}")
    taken = [one for one in series if not one.reason]
    print(f"cohort: {len(series)} DICOM series, {len(taken)} of them T1-weighted 3D scans")
    if not taken:
        return 1
    timings = read_timings(options.out)
    if len(timings) < len(taken):
        _print_cost(
            list(timings.values()) or _time_series(taken[:TIMED], source, recipe), len(taken) - len(timings), options
        )
    return 0


def _time_series(series: Sequence[Series], source: Path, recipe: PrepareRecipe) -> list[float]:
    """Convert series and prepare them, both in a temporary folder; return the CPU seconds of each that is not refused."""
    with scratch_folder("dicom") as folder:
        raw = folder / "raw"
        write_dicom_cohort(series, source, raw, folder / "dicom.tsv", dataset="first")
        return _time_first(scan_tasks(read_raw_cohort(raw, folder / "out", layout="bids"), recipe, gpu=False))


def _dry_run(cohort: RawCohort, recipe: PrepareRecipe, options: argparse.Namespace) -> None:
    """Print what a run would do, and its cost: from the timings of earlier runs, or from the first scans."""
    for root in cohort.roots.values():
        check_claim(root, recipe)
    tasks = scan_tasks(cohort, recipe, options.gpu)
    outcomes = find_finished(tasks)
    waiting = [task for task, outcome in zip(tasks, outcomes, strict=True) if outcome is None]
    print(
        f"cohort: {len(tasks)} raw scans, {len(tasks) - len(waiting)} of them done; pipeline {recipe.pipeline}, {recipe.grid}"
    )
    for task in waiting[:LISTED]:
        print(f"  {task.scan.key}: {task.scan.reported_path}")
    if len(waiting) > LISTED:
        print(f"  and {len(waiting) - LISTED} more")
    for scan in cohort.unlisted[:LISTED]:
        print(f"  left out: {scan.key}: {scan.unlisted or 'participant is not in participants.tsv'}")
    if not waiting:
        return
    # Scans that are refused cost next to nothing.
    refused = {task.scan.key for task, outcome in zip(tasks, outcomes, strict=True) if outcome and outcome.refused}
    known = [seconds for key, seconds in read_timings(options.out).items() if key not in refused]
    _print_cost(known or _time_first(waiting), len(waiting), options)


def _print_cost(timings: Sequence[float], count: int, options: argparse.Namespace) -> None:
    """Print what so many scans will cost, from the CPU seconds of some."""
    if not timings:
        print("cohort: the first scans are refused, so that there is no estimate")
        return
    mean = sum(timings) / len(timings)
    cores = options.workers or usable_cores()
    where = f"{clock(mean * count / cores)} on {cores} cores" if not ray_cluster.has_cluster() else "on the cluster"
    print(
        f"cohort: {clock(mean)} of CPU for a scan (from {len(timings)} scans): {mean * count / 3600:.2f} CPU hours, {where}"
    )


def _time_first(tasks: Sequence[ScanTask]) -> list[float]:
    """Prepare scans in a temporary folder until TIMED of them are not refused; return the CPU seconds of these."""
    timings: list[float] = []
    with scratch_folder("prepare") as folder, ray_cluster.one_thread():
        print(f"cohort: preparing {min(TIMED, len(tasks))} scans to estimate the time", file=sys.stderr, flush=True)
        for task in tasks[:MOST_TIMED]:
            outcome = prepare_one(replace(task, root=str(folder)))
            timings += [outcome.seconds] if outcome.refused is None else []
            if len(timings) == TIMED:
                break
    return timings
