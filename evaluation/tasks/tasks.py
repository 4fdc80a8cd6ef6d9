"""Downstream tasks: a YAML file names a label, the scans and the classes; applied to a manifest it becomes a ``Task``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from data_pipeline.cohort.split import is_healthy
from data_pipeline.storage.manifest import Manifest, fulfilling
from evaluation.tasks.columns import as_numbers, as_strata, as_text, name_of_label, normalise_spelling
from evaluation.tasks.match import Match, match_controls
from infra.errors import UserError, nearest
from infra.settings import load_settings

FILES = Path(__file__).parent / "files"
_strict = ConfigDict(extra="forbid")


def _as_label(value: Any) -> Any:
    """A number of a YAML list as text; labels compare as numbers and as words, so [1], ["1"] and ["1.0"] are equal."""
    if isinstance(value, bool) or value is None:
        raise ValueError("YAML reads yes, no, true, false and null as no words; quote the label, as in ['yes']")
    return str(value) if isinstance(value, int | float) else value


Label = Annotated[str, BeforeValidator(_as_label)]


@dataclass(config=_strict)
class TaskFile:
    """The keys of a task's YAML file."""

    title: str
    kind: Literal["binary", "multiclass", "regression"]
    label: str  # a column of scans.parquet
    positive: list[Label] = field(default_factory=list)  # binary: values of the label in the positive class
    negative: list[Label] = field(default_factory=list)
    splits: list[str] = field(default_factory=lambda: ["downstream"])
    query: str | None = None  # pandas query over the columns that selects the scans
    test: str | None = (
        None  # pandas query that selects a fixed test set, in place of folds (for example held-out sites)
    )
    groups: str = "participant_id"  # column whose values are never split between training and test, such as a family id
    strata: list[str] = field(default_factory=list)  # columns that folds balance in addition to the label
    sites: str = "site"  # column of the sites that --leave-site-out leaves out
    covariates: list[str] = field(default_factory=list)  # given to the model beside the features, unpenalised
    confounds: list[str] = field(default_factory=list)  # regressed out of the features, fitted inside each fold
    healthy: bool = False  # healthy participants only
    match: Match | None = None


@dataclass(config=ConfigDict(arbitrary_types_allowed=True))
class Task:
    """A task applied to the N scans of a manifest that it selects."""

    name: str
    title: str
    kind: str  # binary, multiclass or regression
    rows: Any  # (N,) int64 rows of the manifest
    labels: Any  # (N,) int64 0/1 or class codes, or float64 numbers
    groups: Any  # (N,) codes that are never split between training and test
    classes: list[str]
    participants: Any = None  # (N,) dataset/participant_id
    strata: Any = None  # (N,) codes; None: stratify by the label
    sites: Any = None  # (N,) names, empty where missing; None: the manifest has no such column
    sites_column: str = "site"
    test: Any = None  # (N,) bool, the fixed test set; None: folds
    covariates: Any = None  # (N, C) float64, NaN where missing
    confounds: Any = None  # (N, D) float64
    left_out: list[str] = field(default_factory=list)  # classes with too few participants, each with their number
    beside: list[str] = field(default_factory=list)  # columns of the covariates and the confounds


def check_names(tasks: Sequence[str]) -> None:
    """Raise UserError if two tasks have one name: results are kept by the name of the task, that of its file."""
    of_name: dict[str, str] = {}
    for task in tasks:
        name = Path(task).stem if task.endswith((".yaml", ".yml")) else task
        if name in of_name:
            raise UserError(
                f"tasks: {of_name[name]} and {task} have one name, {name!r}, by which results are kept; "
                + ("name it once" if of_name[name] == task else "rename one of the files")
            )
        of_name[name] = task


def load_task(name: str, manifest: Manifest, folds: int = 5, among: NDArray[np.int64] | None = None) -> Task:
    """Load a task and apply it to the scans of a manifest.

    Args:
        name: of a shipped task, or the path of a YAML file (``.yaml`` or ``.yml``).
        manifest: of the shards.
        folds: number of folds that every class must have participants for.
        among: rows of the scans that the task may have; None: all.

    Raises:
        UserError: if the file is missing, has an unknown key, or does not fit the manifest; the message names file and field.
    """
    path = _find(name)
    spec = _read(path)
    selected = _select(spec, manifest, path.name)
    scans = manifest.scans[selected if among is None else selected & manifest.scans.index.isin(among)]
    labels, classes, scans = _labels(spec, scans, path.name)
    test = None
    if spec.test is not None and len(scans):
        test = _query(scans, spec.test, path.name, "test")
    if spec.match:
        matched = match_controls(scans, labels, spec.match, test)
        scans, labels, test = scans[matched], labels[matched], None if test is None else test[matched]
    groups, participants = _groups(spec, scans, path.name)
    left_out: list[str] = []
    if spec.kind == "multiclass":
        small = _small_classes(labels, groups, len(classes), folds, test)
        left_out = [f"{classes[code]} {count}" for code, count in small.items()]
        keep = ~np.isin(labels, list(small))
        scans, groups, participants = scans[keep], groups[keep], participants[keep]
        classes = [name for code, name in enumerate(classes) if code not in small]
        labels = np.unique(labels[keep], return_inverse=True)[1].reshape(-1)
        test = None if test is None else test[keep]
    task = Task(
        name=path.stem, title=spec.title, kind=spec.kind, rows=scans.index.to_numpy(np.int64), labels=labels, groups=groups,
        classes=classes, participants=participants,
        strata=as_strata(labels, spec.kind, scans, spec.strata) if spec.strata and len(scans) else None,
        sites=as_text(scans[spec.sites]).to_numpy() if spec.sites in scans else None,
        sites_column=spec.sites, test=test,
        covariates=as_numbers(scans, spec.covariates), confounds=as_numbers(scans, spec.confounds),
        left_out=left_out, beside=[*spec.covariates, *spec.confounds],
    )  # fmt: skip
    _check_size(task, spec, path.name, folds)
    _check_test(task, path.name)
    return task


def check_task_file(name: str) -> None:
    """Check what can be known of a task without shards: its file. Raises UserError."""
    _read(_find(name))


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"task file {name} does not exist; give a shipped task's name or the path of a YAML file")
        return Path(name)
    shipped = sorted(path.stem for path in FILES.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"task {name!r} is not known{nearest(name, shipped)}; shipped: {', '.join(shipped)}")
    return FILES / f"{name}.yaml"


def _read(path: Path) -> TaskFile:
    try:
        spec = load_settings(TaskFile, path)
    except UserError as error:
        # A task has no overrides on the command line, which the message for recipes offers.
        raise UserError(str(error).partition("; set it in the recipe")[0]) from None
    for key in ("positive", "negative") if spec.kind == "binary" else ():
        if not getattr(spec, key):
            raise UserError(f"{path.name}: {key} is empty; a binary task needs values under positive and negative")
    _check_apart({*map(name_of_label, spec.positive)}, {*map(name_of_label, spec.negative)}, path.name)
    if spec.match and spec.kind != "binary":
        raise UserError(f"{path.name}: match needs a task of kind binary, found {spec.kind}; remove match")
    return spec


def _check_apart(positive: set[str], negative: set[str], file: str) -> None:
    """Raise UserError if a label is in both classes."""
    both = positive & negative
    if both:
        raise UserError(f"{file}: negative: {min(both)!r} is also under positive; remove it from one of them")


def _select(spec: TaskFile, manifest: Manifest, file: str) -> Any:
    """Return which scans have a label and are in the task's splits and query: (all scans,) bool."""
    scans = manifest.scans
    available = [str(column) for column in scans.columns]
    used = {"label": [spec.label], "groups": [spec.groups], "strata": spec.strata, "covariates": spec.covariates}
    used |= {"confounds": spec.confounds}
    used |= {"match.column": [spec.match.column], "match.same": spec.match.same} if spec.match else {}
    for key, columns in used.items():
        for column in columns:
            if column not in available:
                raise UserError(
                    f"{file}: {key}: {column!r} is not a column of scans.parquet{nearest(column, available)}"
                )
    for key in ("covariates", "confounds"):
        if spec.label in getattr(spec, key):
            raise UserError(f"{file}: {key}: {spec.label!r} is the label itself; remove it")
    label = scans[spec.label]
    keep = scans["split"].isin(spec.splits) & label.notna() & (label.astype(str) != "")
    if spec.query is not None:
        keep &= pd.Series(_query(scans, spec.query, file, "query"), scans.index)
    if spec.match and not pd.api.types.is_numeric_dtype(scans[spec.match.column]):
        text = as_text(scans[spec.match.column]).iloc[0]
        raise UserError(
            f"{file}: match.column: {spec.match.column!r} holds text such as {text!r}; controls are matched by numbers"
        )
    if spec.healthy and "diagnosis" in scans.columns:
        keep &= scans["diagnosis"].map(is_healthy)
    return keep


def _query(scans: pd.DataFrame, query: str, file: str, key: str) -> NDArray[np.bool_]:
    """Return which scans a pandas query selects: (len(scans),) bool."""
    try:
        return fulfilling(scans, query)
    except Exception as error:  # pandas raises whatever its parser or the columns raise
        raise UserError(
            f"{file}: {key}: {query!r} does not work on scans.parquet: {' '.join(str(error).split())}"
        ) from None


def _labels(spec: TaskFile, scans: pd.DataFrame, file: str) -> tuple[NDArray[Any], list[str], pd.DataFrame]:
    """Return the labels, the names of the classes and the scans that have one of them."""
    column = scans[spec.label]
    if spec.kind == "regression":
        numbers = pd.to_numeric(column, errors="coerce")
        wrong = ~np.isfinite(numbers.to_numpy(np.float64))
        if wrong.any():
            text = column[wrong].iloc[0]
            kind = "text" if isinstance(text, str) else "infinite values"
            raise UserError(
                f"{file}: label: {spec.label!r} holds {kind} such as {str(text)!r}; regression needs numbers"
            )
        return numbers.to_numpy(np.float64), [], scans
    if spec.kind == "binary":
        # 007 and 7 are two labels in a column that has both, and one label in other columns.
        text = column.map(normalise_spelling)
        names = column.map(name_of_label)
        several = names.groupby(text).nunique()
        spelling, text = (name_of_label, names) if (several > 1).any() else (normalise_spelling, text)
        positive, negative = ({spelling(value) for value in values} for values in (spec.positive, spec.negative))
        _check_apart(positive, negative, file)
        scans = scans[text.isin(positive | negative)]
        labels = text[text.isin(positive | negative)].isin(positive).to_numpy(np.int64)
        return labels, [spec.negative[0], spec.positive[0]], scans
    categories = pd.Categorical(as_text(column))
    return categories.codes.astype(np.int64), [str(c) for c in categories.categories], scans


def _groups(spec: TaskFile, scans: pd.DataFrame, file: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the codes of the groups and ``dataset/participant_id`` of each scan.

    Raises UserError if a participant's scans are in several groups.
    """
    participants = (scans["dataset"].astype(str) + "/" + scans["participant_id"].astype(str)).to_numpy()
    if spec.groups == "participant_id":
        return pd.Categorical(participants).codes.astype(np.int64), participants
    written = as_text(scans[spec.groups])
    # A participant whose group is not known is a group of their own, not one of a group of strangers. Their scans without
    # a value take the group of their other scans.
    group_of_participant = dict(zip(participants[written != ""], written[written != ""], strict=True))
    written = pd.Series(
        [text or group_of_participant.get(p, "") for p, text in zip(participants, written, strict=True)], scans.index
    )
    names = np.where(
        written == "", "participant " + participants, "group " + scans["dataset"].astype(str) + "/" + written
    )
    codes = pd.Categorical(names).codes.astype(np.int64)
    groups_of_participant = pd.Series(codes).groupby(participants).nunique()
    if (groups_of_participant > 1).any():
        raise UserError(
            f"{file}: groups: participant {groups_of_participant.idxmax()} has several values of {spec.groups!r}; "
            "choose a column that keeps each participant's scans together"
        )
    return codes, participants


def _small_classes(
    labels: NDArray[Any], groups: NDArray[Any], classes: int, folds: int, test: NDArray[Any] | None
) -> dict[int, int]:
    """Return code -> number of groups of every class that cannot be in the training and in the test scans of every fold.

    With folds a class needs as many groups as there are folds, with a fixed test set one on either side. A class that is in
    a test set without being in the training set is never recognised, and would make a metric worse than the model is.
    """
    counts = {code: len(np.unique(groups[labels == code])) for code in range(classes)}
    if test is None:
        return {code: count for code, count in counts.items() if count < folds}
    both = set(labels[test]) & set(labels[~test])
    return {code: count for code, count in counts.items() if code not in both}


def _check_size(task: Task, spec: TaskFile, file: str, folds: int) -> None:
    """Raise UserError if the task has too few participants for its folds."""
    participants = len(np.unique(task.groups))
    if task.kind == "regression":
        enough = participants >= 2 * folds
        found = f"{participants} participants"
    else:
        counts = [len(np.unique(task.groups[task.labels == code])) for code in range(len(task.classes))]
        enough = len(counts) >= 2 and (min(counts) >= folds or (task.kind == "multiclass" and task.test is not None))
        found = ", ".join([
            *(f"{name} {count}" for name, count in zip(task.classes, counts, strict=True)), *task.left_out,
        ])  # fmt: skip
    if not enough:
        raise UserError(
            f"task {task.name}: too few participants for {folds} folds in splits {', '.join(spec.splits)} of {file} "
            f"({found or 'none'}); build shards with more participants in these splits, or leave the task out"
        )


def _check_test(task: Task, file: str) -> None:
    """Raise UserError if a fixed test set shares participants with the training set, or if either has only one class."""
    if task.test is None:
        return
    both = np.intersect1d(task.participants[task.test], task.participants[~task.test])
    if len(both):
        raise UserError(
            f"{file}: test: {len(both)} participants are in the training and in the test set "
            f"({', '.join(map(str, both[:5]))}); change the query so that each participant's scans stay together"
        )
    for name, chosen in (("test", task.test), ("training", ~task.test)):
        if chosen.sum() < 2 or (task.kind != "regression" and len(np.unique(task.labels[chosen])) < 2):
            raise UserError(
                f"{file}: test: the {name} set has fewer than two classes or scans; change the query so that both sets "
                "have scans of every class"
            )
