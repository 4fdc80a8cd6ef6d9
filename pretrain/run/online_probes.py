"""Probes and metrics of the online monitor: any column predicted across folds of participants, and statistics of two views.

n = watched scans, F = encoder features, P = embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra import random_streams
from infra.errors import UserError, nearest
from pretrain.config import MonitorSection
from pretrain.effective_rank import rankme

FOLDS = 5
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass(frozen=True)
class ProbeTarget:
    """A column to predict: its labels (n,), which are valid where ``labelled`` (n,) is True."""

    name: str
    kind: str  # a key of PROBES
    labels: NDArray[Any]
    labelled: NDArray[np.bool_]


@dataclass(frozen=True)
class Watched:
    """The scans that the monitor watches, and their tasks. The score of the first task decides which checkpoint is best.

    Attributes:
        rows: row numbers (n,) of the manifest.
        groups: participant (n,) of each scan.
        every_steps: steps between two looks.
        tasks: the tasks that have enough labels.
        left_out: one line for each task that has not.
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]
    every_steps: int
    tasks: list[ProbeTarget]
    left_out: list[str] = field(default_factory=list)


def check_held_out(settings: MonitorSection, manifest: Manifest, trained: NDArray[np.int64]) -> None:
    """Raise UserError if the monitor's split is missing, or shares participants with the training scans (rows ``trained``).

    If the recipe sets neither ``monitor.every_epochs`` nor ``monitor.split`` and the split is missing, the monitor is off
    (``missing_split`` returns the message to print).
    """
    if settings.every_epochs == 0:
        return
    if missing := missing_split(settings, manifest):
        default = MonitorSection()
        if (settings.every_epochs, settings.split) != (default.every_epochs, default.split):
            raise UserError(missing)
        return
    subjects, rows = manifest.subjects(), manifest.rows(split=settings.split)
    people, shared = np.unique(subjects[rows]), np.intersect1d(subjects[rows], subjects[trained])
    if len(shared):
        raise UserError(
            f"monitor.split={settings.split}: {len(shared)} of its {len(people)} participants are also trained on; name a "
            f"split of other people (there: {_splits_of(manifest)}), or set monitor.every_epochs=0 to train without the monitor"
        )


def missing_split(settings: MonitorSection, manifest: Manifest) -> str:
    """Return one line if the shards lack the monitor's split; empty if they have it or the monitor is off."""
    splits = sorted(set(manifest.scans["split"]))
    if settings.every_epochs == 0 or settings.split in splits:
        return ""
    return (
        f"monitor.split={settings.split} is not in {manifest.url}{nearest(settings.split, splits)}; there: "
        f"{_splits_of(manifest)}; name one that is not trained on, or set monitor.every_epochs=0 to train without the monitor"
    )


def _splits_of(manifest: Manifest) -> str:
    return ", ".join(sorted(set(manifest.scans["split"])))


def watched_scans(settings: MonitorSection, manifest: Manifest, steps_per_epoch: float, seed: int) -> Watched | None:
    """Return the monitor's scans and tasks; None if it is off or the split is missing.

    Raises UserError for a task whose column is missing or does not fit its kind.
    """
    if settings.every_epochs == 0 or settings.split not in set(manifest.scans["split"]):
        return None
    rows, subjects = manifest.rows(split=settings.split), manifest.subjects()
    tasks = [_read_task(entry, manifest, rows) for entry in settings.tasks]
    labelled = np.any([task.labelled for task in tasks], axis=0)
    chosen = np.flatnonzero(labelled)
    if len(chosen) > settings.max_scans:
        generator = random_streams.generator(seed, random_streams.MONITORED_SCANS)
        chosen = np.sort(generator.permutation(chosen)[: settings.max_scans])
    rows, groups = rows[chosen], subjects[rows[chosen]]
    usable, left_out = [], []
    for task in tasks:
        task = _common_classes(ProbeTarget(task.name, task.kind, task.labels[chosen], task.labelled[chosen]), groups)
        people = len(np.unique(groups[task.labelled]))
        if people < 2 * FOLDS or len(set(task.labels[task.labelled])) < 2:
            left_out.append(
                f"monitor task {task.name} is left out: too few labels ({people} participants of split {settings.split})"
            )
        else:
            usable.append(task)
    return Watched(rows, groups, max(1, round(settings.every_epochs * steps_per_epoch)), usable, left_out)


def _read_task(entry: str, manifest: Manifest, rows: NDArray[np.int64]) -> ProbeTarget:
    name, _, kind = entry.partition(":")
    if name not in manifest.scans.columns:
        columns = [str(column) for column in manifest.scans.columns]
        raise UserError(f"monitor.tasks: {name!r} is not a column of the scan table{nearest(name, columns)}")
    column = manifest.scans[name].iloc[rows]
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    kind = kind or ("regression" if numeric and column.nunique() > 2 else "classes")
    if kind not in PROBES or (kind == "regression" and not numeric):
        problem = "holds no numbers" if kind in PROBES else "has an unknown kind"
        raise UserError(f"monitor.tasks: {entry!r} {problem}; write {name}, or {name}:classes, or name another column")
    if kind == "regression":
        labels = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return ProbeTarget(name, kind, labels, np.isfinite(labels))
    text = column.astype("string").fillna("").to_numpy(dtype=str)
    return ProbeTarget(name, kind, text, text != "")


def _common_classes(task: ProbeTarget, groups: NDArray[np.int64]) -> ProbeTarget:
    """Drop the classes with fewer participants than folds."""
    if task.kind != "classes":
        return task
    labelled = task.labelled.copy()
    for label in np.unique(task.labels[labelled]):
        if len(np.unique(groups[labelled & (task.labels == label)])) < FOLDS:
            labelled &= task.labels != label
    return ProbeTarget(task.name, task.kind, task.labels, labelled)


def probe_metrics(features: NDArray[np.float32], watched: Watched) -> dict[str, float]:
    """Return the out-of-fold scores of each task, and the spread and the effective rank (RankMe) of the features (n, F).

    The spread is the standard deviation of a feature across scans, averaged over features and divided by the features'
    root mean square. Near 0 the encoder maps all scans to the same features.
    """
    metrics: dict[str, float] = {}
    for task in watched.tasks:
        chosen = task.labelled
        scores = PROBES[task.kind](features[chosen], task.labels[chosen], watched.groups[chosen])
        metrics |= {f"monitor/{task.name}_{name}": score for name, score in scores.items()}
    size = float(np.sqrt(np.square(features).mean())) or 1.0
    return {**metrics, "monitor/spread": float(features.std(axis=0).mean()) / size, "monitor/rankme": rankme(features)}


def score_of(task: ProbeTarget) -> tuple[str, int]:
    """Return the metric that decides which checkpoint is best for a task, and 1 if more is better, else -1."""
    name, sign = {"regression": ("mae", -1), "classes": ("balanced_accuracy", 1)}[task.kind]
    return f"monitor/{task.name}_{name}", sign


def _regression(features: NDArray[np.float32], labels: NDArray[Any], groups: NDArray[np.int64]) -> dict[str, float]:
    """Return mean absolute error and R² of ridge regression; the penalty is chosen within each training fold."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted = np.empty(len(labels))
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(features, labels, groups):
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        predicted[test] = model.fit(features[train], labels[train]).predict(features[test])
    residual = labels - predicted
    return {
        "mae": float(np.abs(residual).mean()),
        "r2": float(1.0 - np.square(residual).mean() / labels.var()),
    }


def _classes(features: NDArray[np.float32], labels: NDArray[Any], groups: NDArray[np.int64]) -> dict[str, float]:
    """Return the balanced accuracy of logistic regression (chance: 1 / classes); for two classes also the ROC AUC."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = np.unique(labels)
    predicted, scores = np.empty(len(labels), dtype=labels.dtype), np.zeros(len(labels))
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(features, labels, groups):
        # A fixed penalty that suits some hundred scans with some hundred features keeps a look short.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
        model.fit(features[train], labels[train])
        predicted[test] = model.predict(features[test])
        if len(classes) == 2:
            scores[test] = model.decision_function(features[test])
    metrics = {"balanced_accuracy": float(balanced_accuracy_score(labels, predicted))}
    if len(classes) == 2:
        metrics["auc"] = float(roc_auc_score(labels == classes[1], scores))
    return metrics


# (features, labels, groups) -> scores, by kind of task
PROBES: dict[str, Callable[[NDArray[np.float32], NDArray[Any], NDArray[np.int64]], dict[str, float]]] = {
    "regression": _regression, "classes": _classes,
}  # fmt: skip


def view_metrics(views_2nP: torch.Tensor) -> dict[str, float]:
    """Return alignment, uniformity and standard deviation of the embeddings (2, n, P) after L2 normalisation, and their rank.

    - ``alignment``: mean squared distance between the two views of a scan; 0 if they are equal.
    - ``uniformity``: logarithm of the mean of exp(-2 d²) over pairs of scans, averaged over both views; 0 if all
      embeddings are equal, about -4 if they are spread evenly over the sphere.
    - ``embedding_std``: standard deviation over scans, averaged over dimensions and multiplied by √P; 1 for an even
      spread, 0 if all embeddings are equal.

    - ``embedding_rankme``: effective rank of the first views' embeddings before normalisation; 1 if all have one direction.

    Wang & Isola 2020, arXiv:2005.10242, with α = 2 and t = 2; Garrido et al. 2023, arXiv:2210.02885.
    """
    z = torch.nn.functional.normalize(views_2nP.double(), dim=-1)
    alignment = (z[0] - z[1]).square().sum(dim=1).mean()
    uniformity = torch.stack([torch.pdist(view).square().mul(-2).exp().mean().log() for view in z]).mean()
    std = z.std(dim=1, unbiased=False).mean() * math.sqrt(z.shape[-1])
    return {
        "monitor/alignment": float(alignment),
        "monitor/uniformity": float(uniformity),
        "monitor/embedding_std": float(std),
        "monitor/embedding_rankme": rankme(views_2nP[0].double().numpy()),
    }
