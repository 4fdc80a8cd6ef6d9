"""Prepare all raw scans of a cohort: one Ray task for each scan, which a later run finds done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.cohort.pseudonyms import read_key
from data_pipeline.cohort.read import DATA_SETS_FILE, SIGNS, is_simulated, licences_of, name_of, read_with_changes
from data_pipeline.cohort.scan import Scan, safe_name
from data_pipeline.prepare.derivative import DICOM, check_claim, claim, read_timings, write_tables, write_timings
from data_pipeline.prepare.job import MEMORY, RECORDS, Outcome, ScanTask, finished, prepare_one, settle
from data_pipeline.prepare.page import write_page
from data_pipeline.prepare.settings import PrepareRecipe
from data_pipeline.prepare.steps.dicom import find_series, first_dicom
from data_pipeline.prepare.steps.dicom_cohort import write_dicom_cohort
from data_pipeline.quality.rules import Removal, unlisted_removals, write_quarantine
from data_pipeline.shards.unfinished import locked
from infra import ray_cluster
from infra.errors import OPTIONAL_PATH, OPTIONAL_TEXT, PATH, UserError, check_arguments
from infra.files import atomic_write, check_output
from infra.progress import Progress

GPU_SHARE = 0.25  # of a GPU for each task: its network takes 3 GB
SECONDS_BETWEEN_TABLES = 60.0
HASHING_THREADS = 8


@dataclass(frozen=True)
class PreparedCohort:
    """The result of ``prepare_cohort``: the derivative, each scan's outcome by key, the refused scans, and the CPU seconds."""

    folder: Path
    outcomes: dict[str, Outcome]
    removals: list[Removal]
    seconds: dict[str, float]
    already: int

    @property
    def prepared(self) -> int:
        """The number of prepared scans."""
        return sum(outcome.refused is None for outcome in self.outcomes.values())


@dataclass(frozen=True)
class RawCohort:
    """The raw scans of a cohort, those that no table lists, and the root of the derivative of each data set."""

    scans: list[Scan]
    unlisted: list[Scan]
    roots: dict[str, Path]
    simulated: bool
    name: str
    licences: dict[str, str] = field(default_factory=dict)  # of the data sets that state one


def read_raw_cohort(
    raw: str | Path, out: str | Path, *, dataset: str | None = None, layout: str | None = None,
    columns: str | Path | None = None, key_file: str | Path | None = None,
) -> RawCohort:  # fmt: skip
    """Read the raw T1-weighted scans of a cohort, as ``read_cohort`` does; several data sets have a folder each in ``out``.

    The T1-weighted series of a folder of DICOM files are converted first; ``dicom.tsv`` in ``out`` lists all series.

    Raises UserError: the cohort or an option is wrong, or ``out`` is inside the cohort but not among its derivatives.
    """
    check_arguments(PATH, raw=raw, out=out)
    check_arguments(OPTIONAL_TEXT, dataset=dataset, layout=layout)
    check_arguments(OPTIONAL_PATH, columns=columns, key_file=key_file)
    source, folder = Path(raw).resolve(), Path(out).resolve()
    if folder == source or (folder.is_relative_to(source) and folder.parent != source / "derivatives"):
        raise UserError(
            f"OUT={folder} is inside the cohort, which is never written to; choose a folder outside {source}, or "
            f"{source / 'derivatives' / 'yaware'}"
        )
    check_output(folder, "OUT")
    if is_dicom_folder(source, layout):
        source, key_file = _converted(source, folder, dataset or source.name, key_file), None
        dataset, layout = dataset or Path(raw).resolve().name, "bids"
    scans, unlisted, _, _ = read_with_changes(source, dataset, "t1w", layout=layout, columns=columns, key_file=key_file)
    names = sorted({scan.dataset for scan in (*scans, *unlisted)})
    roots = {name: folder / name if len(names) > 1 else folder for name in names}
    licences = {name: stated["licence"] for name, stated in licences_of(source, dataset, columns).items()}
    return RawCohort(scans, unlisted, roots, is_simulated(source), name_of(scans, source), licences)


def is_dicom_folder(source: Path, layout: str | None = None) -> bool:
    """Return whether a path is a folder of DICOM files without any other layout."""
    if layout is not None or not source.is_dir() or (source / DATA_SETS_FILE).is_file():
        return False
    return all(next(iter(find(source)), None) is None for find in SIGNS.values()) and first_dicom(source) is not None


def _converted(source: Path, folder: Path, dataset: str, key_file: str | Path | None) -> Path:
    """Convert a folder of DICOM files to raw scans inside the derivative; return their folder."""
    home = folder / RECORDS / "dicom"
    key = None if key_file is None else read_key(Path(key_file))
    check_claim(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        series = find_series(source)
        write_dicom_cohort(series, source, home, folder / DICOM, dataset=safe_name(dataset), key=key)
    return home


def prepare_cohort(
    raw: str | Path, out: str | Path, recipe: PrepareRecipe | None = None, *, dataset: str | None = None,
    layout: str | None = None, columns: str | Path | None = None, key_file: str | Path | None = None,
    workers: int | None = None, gpu: bool = False,
) -> PreparedCohort:  # fmt: skip
    """Prepare the raw scans of a cohort, and write them as a BIDS derivative that ``build_shards`` reads.

    The same scans and recipe give the same bytes on the CPU, whatever ``workers`` is. Scans that fail or look wrong are listed
    in ``quarantine.tsv``. After a killed run the same call goes on where it stopped; new scans of the cohort are added.

    Args:
        raw: the cohort, see ``data_pipeline.cohort.read.read_cohort``; also for ``dataset``, ``layout``, ``columns`` and
            ``key_file``.
        out: the folder to write.
        recipe: pipeline and parameters; None for the defaults.
        workers: CPUs; None for all, or for the cluster of RAY_ADDRESS. Each scan takes one, and up to 4 GB of memory.
        gpu: find brains on a GPU, which four tasks share. A mask may then differ from the CPU's by single voxels.

    Raises:
        UserError: the cohort or an option is wrong, a library is missing, or ``out`` holds something else.
    """
    ray_cluster.check_workers(workers)
    recipe = recipe or PrepareRecipe()
    check_recipe(recipe)
    cohort = read_raw_cohort(raw, out, dataset=dataset, layout=layout, columns=columns, key_file=key_file)
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        for name, root in cohort.roots.items():
            claim(root, recipe, name=name, simulated=cohort.simulated, licence=cohort.licences.get(name, ""))
        if len(cohort.roots) > 1:
            _write_data_sets(folder, list(cohort.roots))
        tasks = scan_tasks(cohort, recipe, gpu)
        return _run(cohort, folder, tasks, workers)


def check_recipe(recipe: PrepareRecipe) -> None:
    """Raise UserError if the recipe's parts do not fit each other, or its pipeline cannot run here."""
    if recipe.pipeline == "vbm" and recipe.linear.kind == "rigid":
        raise UserError(
            "linear.kind=rigid: pipeline vbm needs affine registration; leave --rigid out, or take quasiraw"
        )
    if recipe.pipeline == "deepmriprep":
        from data_pipeline.prepare.steps.deepmriprep import check_installed

        check_installed()


def scan_tasks(cohort: RawCohort, recipe: PrepareRecipe, gpu: bool) -> list[ScanTask]:
    """Return the task of each scan of a cohort."""
    return [ScanTask(scan=scan, root=str(cohort.roots[scan.dataset]), recipe=recipe, gpu=gpu) for scan in cohort.scans]


def find_finished(tasks: Sequence[ScanTask]) -> list[Outcome | None]:
    """Return the outcome of each task that an earlier run has finished, and None for those that are to be done."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(finished, tasks))


def _run(cohort: RawCohort, folder: Path, tasks: list[ScanTask], workers: int | None) -> PreparedCohort:
    outcomes: list[Any] = find_finished(tasks)
    for task, outcome in zip(tasks, outcomes, strict=True):
        if outcome is not None:
            settle(task, outcome)
    waiting = [number for number, outcome in enumerate(outcomes) if outcome is None]
    already = len(tasks) - len(waiting)
    seconds = read_timings(folder)
    refused = sum(outcome is not None and outcome.refused is not None for outcome in outcomes)
    written = time.monotonic()
    here = not ray_cluster.has_cluster() and (workers == 1 or len(waiting) <= 1)
    with ray_cluster.session_on_demand(workers), Progress(len(tasks), "scans", "preparing", already) as progress:
        cpus, needed = 1, {}
        if waiting and tasks[0].gpu:
            _check_gpu(here)
        if waiting and not here:
            cpus = int(ray_cluster.connect().cluster_resources().get("CPU", 1))
            # A task that asks for more than any node has would wait for ever.
            memory = min(MEMORY, int(ray_cluster.node_memory()))
            needed = {"num_gpus": GPU_SHARE if tasks[0].gpu else 0.0, "memory": memory}
        results = ray_cluster.map_unordered(
            prepare_one, [(tasks[number],) for number in waiting], in_flight=2 * cpus, in_process=here,
            resources=needed,
        )  # fmt: skip
        for index, outcome in results:
            number = waiting[index]
            outcomes[number] = outcome
            seconds[tasks[number].scan.key] = outcome.seconds
            refused += outcome.refused is not None
            progress.advance(1, quarantined=refused)
            if time.monotonic() - written > SECONDS_BETWEEN_TABLES:
                write_timings(folder, seconds)
                written = time.monotonic()
    by_key = {task.scan.key: outcome for task, outcome in zip(tasks, outcomes, strict=True)}
    removals = [Removal.of(task.scan, by_key[task.scan.key].error) for task in tasks if by_key[task.scan.key].error]
    removals += unlisted_removals(cohort.unlisted)
    write_timings(folder, {key: value for key, value in seconds.items() if key in by_key})
    for name, root in cohort.roots.items():
        write_tables(root, [scan for scan in cohort.scans if scan.dataset == name], by_key)
    write_quarantine(folder / "quarantine.tsv", removals)
    if tasks:
        recipe = tasks[0].recipe
        write_page(folder, cohort.name, recipe, cohort.scans, by_key, cohort.roots, simulated=cohort.simulated)
    return PreparedCohort(folder, by_key, removals, seconds, already)


def _check_gpu(here: bool) -> None:
    """Raise UserError if no GPU is there: a task that asks for one would wait for ever."""
    if here:
        import torch  # takes seconds

        found = torch.cuda.is_available()
    else:
        found = ray_cluster.gpus() >= GPU_SHARE
    if not found:
        raise UserError("--gpu: no GPU was found that its tasks could use; leave it out to find brains on the CPU")


def _write_data_sets(folder: Path, names: Sequence[str]) -> None:
    """List the data sets of a folder, so that it can be read as one cohort."""
    with atomic_write(folder / DATA_SETS_FILE, "w") as stream:
        yaml.safe_dump({"datasets": [{"path": name, "name": name, "layout": "bids"} for name in names]}, stream)
