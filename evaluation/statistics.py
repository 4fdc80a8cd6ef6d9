"""Figures of merit and their uncertainty. Participants, not scans, are what is resampled: one person's scans go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[[Array, Array], float]
RESAMPLES = 2000


def auc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def balanced_accuracy(labels: Array, predicted: Array) -> float:
    """Mean over the classes present in ``labels`` of the share of each that is predicted right."""
    classes, codes = np.unique(labels, return_inverse=True)
    right = np.bincount(codes, weights=labels == predicted, minlength=len(classes))
    return float((right / np.bincount(codes, minlength=len(classes))).mean())


def mae(labels: Array, predicted: Array) -> float:
    """Mean absolute error, in the labels' unit."""
    return float(np.abs(labels - predicted).mean())


def r2(labels: Array, predicted: Array) -> float:
    """Share of the labels' variance that the prediction explains; negative where it is worse than their mean."""
    spread = float(((labels - labels.mean()) ** 2).sum())
    return 1.0 - float(((labels - predicted) ** 2).sum()) / spread if spread else float("nan")


# kind of task -> figures, the first being the one by which checkpoints are compared
FIGURES: dict[str, dict[str, Statistic]] = {
    "binary": {"auc": auc},
    "multiclass": {"bacc": balanced_accuracy},
    "regression": {"mae": mae, "r2": r2},
}
HIGHER_IS_BETTER = {"auc": True, "bacc": True, "mae": False, "r2": True}


def resamples(groups: Array, count: int = RESAMPLES, seed: int = 0) -> list[Array]:
    """Index arrays of ``count`` bootstrap samples of participants; the same for the same groups and seed, so paired."""
    people, codes = np.unique(groups, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(people) + 1))
    scans_of = [order[starts[i] : starts[i + 1]] for i in range(len(people))]
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xB007]))
    draws = generator.integers(0, len(people), size=(count, len(people)))
    if len(people) == len(groups):
        return list(order[draws])
    return [np.concatenate([scans_of[person] for person in draw]) for draw in draws]


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values; samples in which the statistic did not exist are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_interval(
    statistic: Statistic, labels: Array, scores: Array, groups: Array, seed: int = 0
) -> tuple[float, float, float]:
    """The statistic and its 95 % interval by a bootstrap over participants."""
    values = np.array([statistic(labels[sample], scores[sample]) for sample in resamples(groups, seed=seed)])
    return statistic(labels, scores), *interval(values)


def paired_difference(
    statistic: Statistic, labels: Array, first: Array, second: Array, groups: Array, seed: int = 0
) -> tuple[float, float, float]:
    """``statistic(first) - statistic(second)`` on the same scans, with its 95 % interval over the same resamples."""
    values = np.array(
        [
            statistic(labels[sample], first[sample]) - statistic(labels[sample], second[sample])
            for sample in resamples(groups, seed=seed)
        ]
    )
    return statistic(labels, first) - statistic(labels, second), *interval(values)
