"""The preparation of one scan: a pure function of its file and the recipe. It runs in a Ray task with one thread.

A scan that is done, or refused, has a record ``.prepare/<key>.json`` in the derivative: the digests of the recipe, of the raw
file and of every file that was written. It is written last, so that what a killed run leaves is done again. If changed limits
refuse a scan that is done, its files are moved to ``.prepare/withheld``, from where they come back if limits admit it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.cohort.scan import Scan
from data_pipeline.prepare.align import align
from data_pipeline.prepare.judge import judge
from data_pipeline.prepare.picture import draw
from data_pipeline.prepare.pipelines import PIPELINES
from data_pipeline.prepare.prepared import ENDINGS, Prepared, stem_of, write_prepared
from data_pipeline.prepare.raw import read_raw
from data_pipeline.prepare.settings import SPACE, PrepareRecipe, recorded
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError
from infra.files import atomic_write, read_text, remove_left, sha256_of, write_json

RECORDS, WITHHELD = ".prepare", "withheld"
FAILED = "failed"  # rule of a scan of which a step failed: that may be the machine's fault, so that it is tried again
LIBRARIES = ("antspyx", "deepbet", "nibabel", "nilearn", "numpy", "scipy", "torch")
MEMORY = 4 * 2**30  # bytes; the peak of one scan, see docs/prepare.md
FIGURE_DIGITS = 6
EARLY_LIMITS = ("brain_ml", "voxel_mm")  # they refuse a scan before it is registered


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One scan to prepare: the scan, the root of its derivative, the recipe, and whether to use a GPU."""

    scan: Scan
    root: str
    recipe: PrepareRecipe
    gpu: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a scan.

    Attributes:
        figures: what was measured, by name.
        refused: the arguments of ``BadScan``: reason, rule, measured, threshold; None if the scan is prepared.
        seconds: of CPU; 0 if an earlier run did the work.
    """

    figures: dict[str, float]
    refused: tuple[str, str, float | None, float | None] | None
    seconds: float = 0.0

    @property
    def error(self) -> BadScan | None:
        """Why the scan is refused, or None."""
        return None if self.refused is None else BadScan(*self.refused)


def prepare_one(task: ScanTask) -> Outcome:
    """Prepare one scan and write its files, or return what an earlier run found.

    Raises UserError if a library is missing; whatever is wrong with the scan is in the outcome.
    """
    earlier = finished(task)
    if earlier is not None:
        return earlier
    started, root, key = time.process_time(), Path(task.root), task.scan.key
    there = bool(_digest(task.scan.path))
    if there:
        _clear(task)
    prepared, figures, error = _prepare(task)
    files: list[str] = []
    if prepared is not None:
        with atomic_write(picture_path(root, key)) as stream:
            stream.write(draw(prepared.picture))
    if prepared is not None and error is None:
        stem = stem_of(task.scan)
        files = write_prepared(root, stem, prepared)
        files.append(f"{stem}_{prepared.main}.json")
        write_json(root / files[-1], _sidecar(task, figures))
    refused = None if error is None else (str(error), error.rule, error.measured, error.threshold)
    outcome = Outcome(figures, refused, time.process_time() - started)
    if not there and error is not None:
        return outcome  # what an earlier run made of the file stays for the day when it can be read again
    digests = {name: sha256_of(root / name) for name in files}
    _write_record(task, outcome, digests, judged=prepared is not None)
    return outcome


def finished(task: ScanTask) -> Outcome | None:
    """Return the outcome of an earlier run of the same task, or None if the scan must be prepared.

    The limits of the recipe may have changed since: they are applied to the figures of the earlier run. Nothing is written; see
    ``settle``.
    """
    root = Path(task.root)
    try:
        record = json.loads(read_text(record_path(root, task.scan.key)))
    except (OSError, ValueError):
        return None
    source = _digest(task.scan.path)
    if not source or record["recipe"] != recipe_digest(task.recipe) or record["source"] != source:
        return None
    outcome = Outcome(record["figures"], None if record["refused"] is None else tuple(record["refused"]))
    if record["judged"]:
        error = judge(outcome.figures, task.recipe.limits)
        outcome = replace(
            outcome, refused=None if error is None else (str(error), error.rule, error.measured, error.threshold)
        )
    files: Mapping[str, str] = record["files"]
    if (not files) if outcome.refused is None else outcome.refused[1] == FAILED:
        return None
    for name, digest in files.items():
        path = _place(root, name)
        if not path.is_file() or sha256_of(path) != digest:
            return None
    return outcome


def settle(task: ScanTask, outcome: Outcome) -> None:
    """Move the files of a finished scan out of the derivative if ``outcome`` refuses it now, and back if it does not."""
    root = Path(task.root)
    record = json.loads(read_text(record_path(root, task.scan.key)))
    folder = root if outcome.refused is None else root / RECORDS / WITHHELD
    for name in record["files"]:
        source, target = _place(root, name), folder / name
        if source != target:  # a run that was killed here may have moved some
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    if (record["refused"] is None) == (outcome.refused is None):
        return
    _write_record(task, outcome, record["files"], judged=record["judged"])


def _place(root: Path, name: str) -> Path:
    """Where a file of a record is: in the derivative, or withheld."""
    visible = root / name
    return visible if visible.is_file() else root / RECORDS / WITHHELD / name


def _clear(task: ScanTask) -> None:
    """Remove what an earlier run wrote for a scan that is prepared again: if it is refused now, none of it stays."""
    root, key = Path(task.root), task.scan.key
    for path in (record_path(root, key), picture_path(root, key)):
        path.unlink(missing_ok=True)
    # A worker that writes here for the second time would leave what a killed one left.
    for target in (root / RECORDS / key, root / stem_of(task.scan)):
        remove_left(target.parent, target.name)
    for ending in ENDINGS:
        for folder in (root, root / RECORDS / WITHHELD):
            (folder / f"{stem_of(task.scan)}_{ending}").unlink(missing_ok=True)


def record_path(root: Path, key: str) -> Path:
    """Return the path of the record of a scan."""
    return root / RECORDS / f"{key}.json"


def picture_path(root: Path, key: str) -> Path:
    """Return the path of the picture of a scan; there is none if its preparation failed."""
    return root / RECORDS / f"{key}.png"


@cache
def recipe_digest(recipe: PrepareRecipe) -> str:
    """Return the SHA-256 of all that decides prepared voxels: the recipe without later limits, and the libraries' versions."""
    settings = recorded(recipe)
    settings["limits"] = {name: settings["limits"][name] for name in EARLY_LIMITS}
    return hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that prepare scans; empty for one that is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _prepare(task: ScanTask) -> tuple[Prepared | None, dict[str, float], BadScan | None]:
    """The result of the pipeline, the figures, and why the scan is refused; no result if a step failed."""
    recipe, scan = task.recipe, task.scan
    figures: dict[str, float] = {}
    try:
        raw = read_raw(scan.path, scan.orientation, most_voxel=recipe.limits.voxel_mm)
        aligned = align(raw, recipe, gpu=task.gpu)
        figures = _rounded(aligned.figures)
        prepared = PIPELINES[recipe.pipeline](aligned, recipe)
    except BadScan as error:
        return None, figures, error
    except UserError:
        raise
    except Exception as error:  # ANTs and torch raise many types of error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return None, figures, BadScan(f"a step failed: {reason}", FAILED)
    figures = _rounded({**figures, **prepared.figures, "nonfinite_voxels": float(raw.nonfinite)})
    return prepared, figures, judge(figures, recipe.limits)


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.{FIGURE_DIGITS}g}") for name, value in figures.items()}


def _sidecar(task: ScanTask, figures: Mapping[str, float]) -> dict[str, Any]:
    """The JSON beside the main image: how it was made, and the figures."""
    return {
        "Sources": [Path(task.scan.reported_path).name], "SourceSHA256": _digest(task.scan.path), "SkullStripped": True,
        "SpatialReference": f"{SPACE}: ICBM 2009a nonlinear symmetric, as nilearn ships it",
        "Preparation": recorded(task.recipe), "Versions": versions(), "Figures": dict(figures),
    }  # fmt: skip


def _write_record(task: ScanTask, outcome: Outcome, files: Mapping[str, str], *, judged: bool) -> None:
    """Write the record of a scan; ``files`` are the digests of its files, ``judged`` is whether it got to the late limits."""
    content = asdict(outcome)
    del content["seconds"]  # a run's own; the same input gives the same bytes
    write_json(
        record_path(Path(task.root), task.scan.key),
        {
            **content, "recipe": recipe_digest(task.recipe), "source": _digest(task.scan.path), "files": dict(files),
            "judged": judged,
        },
    )  # fmt: skip


def _digest(path: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        return sha256_of(path)
    except (OSError, UserError):
        return ""
