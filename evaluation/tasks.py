"""What is asked of an encoder: a task is a YAML file naming a label, the scans, and what counts as which answer."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_pipeline.manifest import Manifest
from data_pipeline.split import is_healthy
from infra.errors import UserError, nearest
from infra.settings import load_settings

FILES = Path(__file__).parent / "task_files"
Array = np.ndarray[Any, np.dtype[Any]]
_strict = ConfigDict(extra="forbid")


@dataclass(config=_strict)
class Match:
    """Controls matched to patients: each patient takes its ``ratio`` nearest in ``column``, none farther than ``within``."""

    column: str = "age"
    within: float = Field(default=5.0, gt=0)
    ratio: int = Field(default=2, ge=1)


@dataclass(config=_strict)
class TaskFile:
    """The keys of a task's YAML file."""

    title: str
    kind: Literal["binary", "multiclass", "regression"]
    label: str
    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=lambda: ["downstream"])
    healthy: bool = False
    match: Match | None = None


@dataclass(config=ConfigDict(arbitrary_types_allowed=True))
class Task:
    """A task on a manifest: scan rows, labels (0/1, class codes or numbers) and the participant of each scan."""

    name: str
    title: str
    kind: str
    rows: Any  # (N,) int64
    labels: Any  # (N,) float64 or int64
    groups: Any  # (N,) participant codes
    classes: list[str]


def load_task(name: str, manifest: Manifest, folds: int = 5) -> Task:
    """A shipped task by name, or a YAML file by path, applied to a manifest's scans."""
    path = _find(name)
    given = load_settings(TaskFile, path)
    if given.kind == "binary" and not (given.positive and given.negative):
        raise UserError(f"task {name}: a binary task needs values under positive and negative")
    scans = manifest.scans
    if given.label not in scans.columns:
        known = [str(c) for c in scans.columns]
        raise UserError(
            f"task {name}: label {given.label!r} is no column of scans.parquet{nearest(given.label, known)}"
        )
    keep = scans["split"].isin(given.splits) & scans[given.label].notna() & (scans[given.label].astype(str) != "")
    if given.healthy and "diagnosis" in scans.columns:
        keep &= scans["diagnosis"].map(is_healthy)
    chosen = scans[keep]
    labels, classes, chosen = _labels(given, chosen)
    if given.match:
        taken = _matched(chosen, labels, given.match)
        chosen, labels = chosen[taken], labels[taken]
    people = chosen["dataset"].astype(str) + "/" + chosen["participant_id"].astype(str)
    codes = pd.Categorical(people).codes.astype(np.int64)
    task = Task(path.stem, given.title, given.kind, chosen.index.to_numpy(np.int64), labels, codes, classes)
    _check_size(task, given, folds)
    return task


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    shipped = sorted(path.stem for path in FILES.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"task {name!r} is not known{nearest(name, shipped)}; shipped: {', '.join(shipped)}")
    return FILES / f"{name}.yaml"


def _labels(given: TaskFile, scans: pd.DataFrame) -> tuple[Array, list[str], pd.DataFrame]:
    column = scans[given.label]
    if given.kind == "regression":
        numbers = pd.to_numeric(column, errors="coerce")
        if numbers.isna().any():
            raise UserError(
                f"label {given.label!r} holds text such as {column[numbers.isna()].iloc[0]!r}; regression needs numbers"
            )
        return numbers.to_numpy(np.float64), [], scans
    text = column.astype(str)
    if given.kind == "binary":
        positive, negative = ({v.lower() for v in values} for values in (given.positive, given.negative))
        lower = text.str.lower()
        scans = scans[lower.isin(positive | negative)]
        labels = lower[lower.isin(positive | negative)].isin(positive).to_numpy(np.int64)
        return labels, [given.negative[0], given.positive[0]], scans
    categories = pd.Categorical(text)
    return categories.codes.astype(np.int64), [str(c) for c in categories.categories], scans


def _matched(scans: pd.DataFrame, labels: Array, match: Match) -> Array:
    """Which scans stay: all patients with a match, and the controls they took. Deterministic, nearest pairs first."""
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


def _check_size(task: Task, given: TaskFile, folds: int) -> None:
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
            f"task {task.name}: too few participants for {folds} folds in splits {', '.join(given.splits)} "
            f"({found or 'none'}); build shards with more of them there, or leave the task out"
        )
