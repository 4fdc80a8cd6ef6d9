"""What the monitor asks of an encoder: probes of any column by participants' folds, and figures of two views' embeddings.

Legend: n watched scans, F encoder features, P embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_pipeline.storage.manifest import Manifest
from infra import random_streams
from infra.errors import UserError, nearest
from pretrain.config import Monitor

Array = np.ndarray[Any, np.dtype[Any]]
FOLDS = 5
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass(frozen=True)
class Task:
    """A column to be predicted: its labels (n,), NaN or None where ``known`` is False."""

    name: str
    kind: str  # a key of PROBES
    labels: Array
    known: Array


@dataclass(frozen=True)
class Watched:
    """Which scans are watched, and what is asked of them; the first task's score says which checkpoint is best."""

    rows: Array
    groups: Array
    every_steps: int
    tasks: list[Task]
    left_out: list[str] = field(default_factory=list)  # tasks that cannot be asked, each with the reason


def check_held_out(settings: Monitor, manifest: Manifest, trained: Array) -> None:
    """UserError where the monitor's split is asked for and not there, or holds people of the scans ``trained`` on (rows).

    A recipe that says nothing of the monitor asks for no split: on shards without ``monitor`` it goes on without
    (``missing_split`` has the line to print).
    """
    if settings.every_epochs == 0:
        return
    if missing := missing_split(settings, manifest):
        usual = Monitor()
        if (settings.every_epochs, settings.split) != (usual.every_epochs, usual.split):
            raise UserError(missing)
        return
    subjects, rows = manifest.subjects(), manifest.rows(split=settings.split)
    people, shared = np.unique(subjects[rows]), np.intersect1d(subjects[rows], subjects[trained])
    if len(shared):
        raise UserError(
            f"monitor.split={settings.split}: {len(shared)} of its {len(people)} participants are also trained on; name a "
            f"split of other people (there: {_splits_of(manifest)}), or set monitor.every_epochs=0 to train without the monitor"
        )


def missing_split(settings: Monitor, manifest: Manifest) -> str:
    """One line where the shards lack the monitor's split; empty where they have it, or the monitor is off."""
    known = sorted(set(manifest.scans["split"]))
    if settings.every_epochs == 0 or settings.split in known:
        return ""
    return (
        f"monitor.split={settings.split} is not in {manifest.url}{nearest(settings.split, known)}; there: "
        f"{_splits_of(manifest)}; name one that is not trained on, or set monitor.every_epochs=0 to train without the monitor"
    )


def _splits_of(manifest: Manifest) -> str:
    return ", ".join(sorted(set(manifest.scans["split"])))


def watched_scans(settings: Monitor, manifest: Manifest, steps_per_epoch: float, seed: int) -> Watched | None:
    """The monitor's scans and tasks; None where it is off or the split is not there. UserError for a column that is not."""
    if settings.every_epochs == 0 or settings.split not in set(manifest.scans["split"]):
        return None
    rows, subjects = manifest.rows(split=settings.split), manifest.subjects()
    tasks = [_read_task(entry, manifest, rows) for entry in settings.tasks]
    labelled = np.any([task.known for task in tasks], axis=0)
    chosen = np.flatnonzero(labelled)
    if len(chosen) > settings.max_scans:
        generator = random_streams.generator(seed, random_streams.MONITORED_SCANS)
        chosen = np.sort(generator.permutation(chosen)[: settings.max_scans])
    rows, groups = rows[chosen], subjects[rows[chosen]]
    usable, left_out = [], []
    for task in tasks:
        task = _common_classes(Task(task.name, task.kind, task.labels[chosen], task.known[chosen]), groups)
        people = len(np.unique(groups[task.known]))
        if people < 2 * FOLDS or len(set(task.labels[task.known])) < 2:
            left_out.append(
                f"monitor task {task.name} is left out: too few labels ({people} participants of split {settings.split})"
            )
        else:
            usable.append(task)
    return Watched(rows, groups, max(1, round(settings.every_epochs * steps_per_epoch)), usable, left_out)


def _read_task(entry: str, manifest: Manifest, rows: Array) -> Task:
    name, _, kind = entry.partition(":")
    if name not in manifest.scans.columns:
        known = [str(column) for column in manifest.scans.columns]
        raise UserError(f"monitor.tasks: {name!r} is no column of the scan table{nearest(name, known)}")
    column = manifest.scans[name].iloc[rows]
    number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    kind = kind or ("regression" if number and column.nunique() > 2 else "classes")
    if kind not in PROBES or (kind == "regression" and not number):
        what = "holds no numbers" if kind in PROBES else "is of a kind that is not known"
        raise UserError(f"monitor.tasks: {entry!r} {what}; write {name}, or {name}:classes, or name another column")
    if kind == "regression":
        labels = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return Task(name, kind, labels, np.isfinite(labels))
    text = column.astype("string").fillna("").to_numpy(dtype=str)
    return Task(name, kind, text, text != "")


def _common_classes(task: Task, groups: Array) -> Task:
    """Without the classes of fewer participants than there are folds."""
    if task.kind != "classes":
        return task
    known = task.known.copy()
    for label in np.unique(task.labels[known]):
        if len(np.unique(groups[known & (task.labels == label)])) < FOLDS:
            known &= task.labels != label
    return Task(task.name, task.kind, task.labels, known)


def probe_figures(features: Array, watched: Watched) -> dict[str, float]:
    """Each task's scores out of fold, and the spread of the features (n, F).

    The spread is the mean over features of their standard deviation across scans, divided by their root mean square:
    near 0, all scans look alike to the encoder.
    """
    figures: dict[str, float] = {}
    for task in watched.tasks:
        found = PROBES[task.kind](features[task.known], task.labels[task.known], watched.groups[task.known])
        figures |= {f"monitor/{task.name}_{name}": value for name, value in found.items()}
    size = float(np.sqrt(np.square(features).mean())) or 1.0
    return {**figures, "monitor/spread": float(features.std(axis=0).mean()) / size}


def score_of(task: Task) -> tuple[str, int]:
    """The figure by which a task's best checkpoint is told, and 1 where more of it is better, else -1."""
    name, sign = {"regression": ("mae", -1), "classes": ("balanced_accuracy", 1)}[task.kind]
    return f"monitor/{task.name}_{name}", sign


def _regression(features: Array, labels: Array, groups: Array) -> dict[str, float]:
    """Mean absolute error and R² of ridge regression; the penalty is chosen inside each fold."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    answers = np.empty(len(labels))
    for fit, ask in GroupKFold(FOLDS, shuffle=True, random_state=0).split(features, labels, groups):
        model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS))
        answers[ask] = model.fit(features[fit], labels[fit]).predict(features[ask])
    residual = labels - answers
    return {
        "mae": float(np.abs(residual).mean()),
        "r2": float(1.0 - np.square(residual).mean() / labels.var()),
    }


def _classes(features: Array, labels: Array, groups: Array) -> dict[str, float]:
    """Balanced accuracy of logistic regression, chance at 1 / classes; for two classes also the area under the ROC."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = np.unique(labels)
    answers, chances = np.empty(len(labels), dtype=labels.dtype), np.zeros(len(labels))
    for fit, ask in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(features, labels, groups):
        # One strength that suits some hundred scans of some hundred features: a look is to be short.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
        model.fit(features[fit], labels[fit])
        answers[ask] = model.predict(features[ask])
        if len(classes) == 2:
            chances[ask] = model.decision_function(features[ask])
    figures = {"balanced_accuracy": float(balanced_accuracy_score(labels, answers))}
    if len(classes) == 2:
        figures["auc"] = float(roc_auc_score(labels == classes[1], chances))
    return figures


PROBES: dict[str, Callable[[Array, Array, Array], dict[str, float]]] = {
    "regression": _regression, "classes": _classes,
}  # fmt: skip


def view_figures(views_2nP: torch.Tensor) -> dict[str, float]:
    """Alignment and uniformity (Wang & Isola 2020, arXiv:2005.10242, α = 2, t = 2) and the spread of embeddings.

    Of the embeddings' directions on the sphere: alignment is the mean squared distance of a scan's two views (0: the
    same), uniformity the logarithm of the mean of exp(-2 d²) over pairs of scans, the mean of both views (0: all in one
    point; about -4 at most for an even spread), ``embedding_std`` the standard deviation over scans, averaged over
    dimensions and multiplied by √P (1: even spread; 0: all in one point).
    """
    z = torch.nn.functional.normalize(views_2nP.double(), dim=-1)
    alignment = (z[0] - z[1]).square().sum(dim=1).mean()
    uniformity = torch.stack([torch.pdist(view).square().mul(-2).exp().mean().log() for view in z]).mean()
    std = z.std(dim=1, unbiased=False).mean() * math.sqrt(z.shape[-1])
    return {
        "monitor/alignment": float(alignment),
        "monitor/uniformity": float(uniformity),
        "monitor/embedding_std": float(std),
    }
