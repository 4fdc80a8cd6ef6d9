"""What is asked of an encoder: a task is a YAML file naming a label, the scans, and what counts as which answer."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_pipeline.cohort.split import is_healthy
from data_pipeline.storage.manifest import Manifest
from evaluation.tasks.columns import as_numbers, as_strata, spelling
from infra.errors import UserError, nearest
from infra.settings import load_settings

FILES = Path(__file__).parent / "files"
Array = np.ndarray[Any, np.dtype[Any]]
_strict = ConfigDict(extra="forbid")


@dataclass(config=_strict)
class Match:
    """Controls matched to patients: each takes its ``ratio`` nearest free ones in ``column``, none beyond ``within``."""

    column: str = "age"
    within: float = Field(default=5.0, gt=0)
    ratio: int = Field(default=2, ge=1)


@dataclass(config=_strict)
class TaskFile:
    """The keys of a task's YAML file."""

    title: str
    kind: Literal["binary", "multiclass", "regression"]
    label: str  # a column of scans.parquet
    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=lambda: ["downstream"])
    query: str | None = None  # pandas query over the columns: the scans of the task
    test: str | None = None  # pandas query: scans that are tested on only, in place of folds (held-out sites, say)
    groups: str = "participant_id"  # no value of it on both sides of a fold; a family's number keeps families together
    strata: list[str] = field(default_factory=list)  # columns that folds and draws spread alike, beside the label
    sites: str = "site"  # the column that --leave-site-out goes by
    covariates: list[str] = field(default_factory=list)  # given to the model beside the features, unpenalised
    confounds: list[str] = field(default_factory=list)  # regressed out of the features, fitted inside each fold
    healthy: bool = False
    match: Match | None = None


@dataclass(config=ConfigDict(arbitrary_types_allowed=True))
class Task:
    """A task on a manifest: scan rows, labels (0/1, class codes or numbers), and what folds and models go by."""

    name: str
    title: str
    kind: str
    rows: Any  # (N,) int64
    labels: Any  # (N,) float64 or int64
    groups: Any  # (N,) codes of what must not be on both sides of a fold
    classes: list[str]
    participants: Any = None  # (N,) dataset/participant_id
    strata: Any = None  # (N,) codes; None: the label alone
    sites: Any = None  # (N,) names; None: the manifest has no such column
    test: Any = None  # (N,) bool: tested on only; None: folds
    covariates: Any = None  # (N, C) float64, NaN where missing
    confounds: Any = None  # (N, D) float64


def load_task(name: str, manifest: Manifest, folds: int = 5) -> Task:
    """A shipped task by name, or a YAML file by path, applied to a manifest's scans.

    UserError, naming the file and the field, for whatever does not fit the manifest.
    """
    path = _find(name)
    given = _read(path)
    keep = _select(given, manifest, path.name)
    chosen = manifest.scans[keep]
    labels, classes, chosen = _labels(given, chosen, path.name)
    if given.match:
        taken = _matched(chosen, labels, given.match)
        chosen, labels = chosen[taken], labels[taken]
    groups, people = _groups(given, chosen, path.name)
    test = None
    if given.test is not None and len(chosen):
        test = _query(chosen, given.test, path.name, "test")
    task = Task(
        path.stem, given.title, given.kind, chosen.index.to_numpy(np.int64), labels, groups, classes, people,
        as_strata(labels, given.kind, chosen, given.strata) if given.strata and len(chosen) else None,
        chosen[given.sites].astype(str).to_numpy() if given.sites in chosen else None,
        test, as_numbers(chosen, given.covariates), as_numbers(chosen, given.confounds),
    )  # fmt: skip
    _check_size(task, given, path.name, folds)
    _check_test(task, path.name)
    return task


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"task file {name} is not there; give a shipped task's name or the path of a YAML file")
        return Path(name)
    shipped = sorted(path.stem for path in FILES.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"task {name!r} is not known{nearest(name, shipped)}; shipped: {', '.join(shipped)}")
    return FILES / f"{name}.yaml"


def _read(path: Path) -> TaskFile:
    try:
        given = load_settings(TaskFile, path)
    except UserError as error:
        # A task has no overrides on the command line, which the recipes' message would offer.
        raise UserError(str(error).partition("; set it in the recipe")[0]) from None
    for key in ("positive", "negative") if given.kind == "binary" else ():
        if not getattr(given, key):
            raise UserError(f"{path.name}: {key} is empty; a binary task needs values under positive and negative")
    both = {spelling(value) for value in given.positive} & {spelling(value) for value in given.negative}
    if both:
        raise UserError(f"{path.name}: negative: {min(both)!r} is under positive too; leave it under one of them")
    if given.match and given.kind != "binary":
        raise UserError(f"{path.name}: match goes with kind binary alone, found {given.kind}; leave it out")
    return given


def _select(given: TaskFile, manifest: Manifest, where: str) -> Any:
    """Which scans have a label and are in the task's splits and query: (all scans,) bool."""
    scans = manifest.scans
    known = [str(column) for column in scans.columns]
    named = {"label": [given.label], "groups": [given.groups], "strata": given.strata, "covariates": given.covariates}
    named |= {"confounds": given.confounds, "match.column": [given.match.column] if given.match else []}
    for key, columns in named.items():
        for column in columns:
            if column not in known:
                raise UserError(f"{where}: {key}: {column!r} is no column of scans.parquet{nearest(column, known)}")
    for key in ("covariates", "confounds"):
        if given.label in getattr(given, key):
            raise UserError(f"{where}: {key}: {given.label!r} is the label itself; leave it out")
    label = scans[given.label]
    keep = scans["split"].isin(given.splits) & label.notna() & (label.astype(str) != "")
    if given.query is not None:
        keep &= pd.Series(_query(scans, given.query, where, "query"), scans.index)
    if given.healthy and "diagnosis" in scans.columns:
        keep &= scans["diagnosis"].map(is_healthy)
    return keep


def _query(scans: pd.DataFrame, query: str, where: str, key: str) -> Array:
    try:
        found = scans.query(query).index
    except Exception as error:  # pandas passes on whatever its parser or the columns raise
        raise UserError(
            f"{where}: {key}: {query!r} does not work on scans.parquet: {' '.join(str(error).split())}"
        ) from None
    return np.asarray(scans.index.isin(found))


def _labels(given: TaskFile, scans: pd.DataFrame, where: str) -> tuple[Array, list[str], pd.DataFrame]:
    column = scans[given.label]
    if given.kind == "regression":
        numbers = pd.to_numeric(column, errors="coerce")
        if numbers.isna().any():
            raise UserError(
                f"{where}: label: {given.label!r} holds text such as {column[numbers.isna()].iloc[0]!r}; "
                "regression needs numbers"
            )
        return numbers.to_numpy(np.float64), [], scans
    if given.kind == "binary":
        positive, negative = ({spelling(v) for v in values} for values in (given.positive, given.negative))
        text = column.map(spelling)
        scans = scans[text.isin(positive | negative)]
        labels = text[text.isin(positive | negative)].isin(positive).to_numpy(np.int64)
        return labels, [given.negative[0], given.positive[0]], scans
    categories = pd.Categorical(column.astype(str))
    return categories.codes.astype(np.int64), [str(c) for c in categories.categories], scans


def _groups(given: TaskFile, scans: pd.DataFrame, where: str) -> tuple[Array, Array]:
    """Codes of the groups, and ``dataset/participant_id``; a group of participants holds each of them whole."""
    people = (scans["dataset"].astype(str) + "/" + scans["participant_id"].astype(str)).to_numpy()
    if given.groups == "participant_id":
        return pd.Categorical(people).codes.astype(np.int64), people
    names = scans["dataset"].astype(str) + "/" + scans[given.groups].astype(str)
    codes = pd.Categorical(names).codes.astype(np.int64)
    split = pd.Series(codes).groupby(people).nunique()
    if (split > 1).any():
        raise UserError(
            f"{where}: groups: participant {split.idxmax()} has several values of {given.groups!r}; "
            "choose a column that keeps each participant's scans together"
        )
    return codes, people


def _matched(scans: pd.DataFrame, labels: Array, match: Match) -> Array:
    """Which scans stay: all patients with a match, and the controls they took.

    Patients choose in the order of the rows, every one its first control before any its second. Scans are matched: a
    patient with two sessions brings controls for each.
    """
    values = scans[match.column].to_numpy(np.float64)
    patients, controls = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    keep = np.zeros(len(scans), dtype=bool)
    free = np.ones(len(controls), dtype=bool)
    for round_ in range(match.ratio):
        for patient in patients:
            if round_ and not keep[patient]:
                continue
            gap = np.abs(values[controls] - values[patient])
            distance = np.where(free & np.isfinite(gap), gap, np.inf)
            best = int(np.argmin(distance)) if len(controls) else 0
            if len(controls) and distance[best] <= match.within:
                keep[patient] = keep[controls[best]] = True
                free[best] = False
    return keep


def _check_size(task: Task, given: TaskFile, where: str, folds: int) -> None:
    people = len(np.unique(task.groups))
    if task.kind == "regression":
        enough = people >= 2 * folds
        found = f"{people} participants"
    else:
        each = [len(np.unique(task.groups[task.labels == code])) for code in range(len(task.classes))]
        enough = len(each) >= 2 and min(each) >= folds if task.kind == "binary" else sum(n >= folds for n in each) >= 2
        found = ", ".join(f"{name} {count}" for name, count in zip(task.classes, each, strict=True))
    if not enough:
        raise UserError(
            f"task {task.name}: too few participants for {folds} folds in splits {', '.join(given.splits)} of {where} "
            f"({found or 'none'}); build shards with more of them there, or leave the task out"
        )


def _check_test(task: Task, where: str) -> None:
    """UserError where a fixed test set shares participants with the rest, or leaves either side without a class."""
    if task.test is None:
        return
    both = np.intersect1d(task.participants[task.test], task.participants[~task.test])
    if len(both):
        raise UserError(
            f"{where}: test: {len(both)} participants are on both sides ({', '.join(map(str, both[:5]))}); "
            "let the query keep each participant's scans together"
        )
    for side, chosen in (("tested on", task.test), ("fitted to", ~task.test)):
        if chosen.sum() < 2 or (task.kind != "regression" and len(np.unique(task.labels[chosen])) < 2):
            raise UserError(f"{where}: test: of one class or none is {side}; let the query leave both on either side")
