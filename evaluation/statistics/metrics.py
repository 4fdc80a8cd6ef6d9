"""Figures of merit. Each takes weights too, which is how a bootstrap over participants is computed in one go.

A figure is called with labels (N,) and answers (N,): for a binary task a score that rises with the positive class and is 0
at the threshold, for a multiclass one the class codes, for a regression the numbers. ``PROBABILITY_METRICS`` are called with
probabilities instead: of the positive class (N,), or of every class (N, K).
Without weights a figure is a float. With weights (R, N) it is (R,): row r is the figure of a sample that holds scan n
``weights[r, n]`` times, which is what drawing participants with replacement comes to. NaN stands where a figure does not
exist, such as the AUC of a single class, or the Brier score of numbers that are no probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import numpy as np

from evaluation.statistics.intervals import Array, Statistic, with_interval
from evaluation.statistics.paired import paired_difference

__all__ = [
    "METRICS", "HIGHER_IS_BETTER", "PROBABILITY_METRICS", "Statistic", "accuracy_at_zero", "auc", "average_precision",
    "balanced_accuracy", "brier", "macro_auc", "mae", "openbhb_score", "paired_difference", "pearson", "r2",
    "site_leakage", "with_interval",
]  # fmt: skip


def _metric(core: Callable[[Array, Array, Array], Array]) -> Statistic:
    """Let a figure written for weights (R, N) be called without them too."""

    @wraps(core)
    def both(labels: Array, answers: Array, weights: Array | None = None) -> Any:
        labels, answers = np.asarray(labels), np.asarray(answers)
        if weights is None:
            return float(core(labels, answers, np.ones((1, len(labels))))[0])
        return core(labels, answers, weights)

    return cast(Statistic, both)


@_metric
def auc(labels: Array, answers: Array, weights: Array) -> Array:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    AUC = Σ_i Σ_j [s_i > s_j] + ½ [s_i = s_j] over positives i and negatives j, divided by their number (Hanley and
    McNeil 1982). Any score will do, not only a probability.
    """
    positive, negative = _by_score(labels, answers, weights)
    below = np.cumsum(negative, axis=1) - negative
    return _ratio((positive * (below + negative / 2)).sum(1), positive.sum(1) * negative.sum(1))


@_metric
def average_precision(labels: Array, answers: Array, weights: Array) -> Array:
    """Average precision Σ_t (recall_t - recall_{t-1}) precision_t over the distinct scores t, from the highest down.

    Its value by chance is the share of positives, so it can be compared between tasks only where that share is equal.
    """
    positive, negative = (part[:, ::-1] for part in _by_score(labels, answers, weights))
    above = np.cumsum(positive, axis=1)
    precision = np.nan_to_num(_ratio(above, above + np.cumsum(negative, axis=1)))
    return _ratio((positive * precision).sum(1), positive.sum(1))


@_metric
def balanced_accuracy(labels: Array, predicted: Array, weights: Array) -> Array:
    """Mean over the classes present in ``labels`` of the share of each that is predicted right.

    ``predicted``: class codes (N,), or probabilities (N, K), of which the largest counts.
    """
    codes = predicted.argmax(1) if predicted.ndim == 2 else predicted
    right = weights * (labels == codes)
    recalls = [_ratio(right[:, labels == c].sum(1), weights[:, labels == c].sum(1)) for c in np.unique(labels)]
    return _mean_of_known(recalls)


@_metric
def accuracy_at_zero(labels: Array, answers: Array, weights: Array) -> Array:
    """Balanced accuracy of a binary task when a score above 0 is called positive."""
    return balanced_accuracy(labels, (answers > 0).astype(np.int64), weights)


@_metric
def brier(labels: Array, answers: Array, weights: Array) -> Array:
    """Brier score: mean of (p - y)²; 0 is perfect, 0.25 is a coin's. For K classes Σ_k (p_k - [y = k])², from 0 to 2.

    Source: Brier, Monthly Weather Review 78 (1950), whose two-class sum is twice the binary form.
    """
    if not _probabilities(answers):
        return np.full(len(weights), np.nan)
    if answers.ndim == 2:
        errors = ((answers - (labels[:, None] == np.arange(answers.shape[1]))) ** 2).sum(1)
    else:
        errors = (answers - labels) ** 2
    return _ratio(weights @ errors, weights.sum(1))


@_metric
def macro_auc(labels: Array, answers: Array, weights: Array) -> Array:
    """Mean over the classes of the AUC of one class against the rest; ``answers`` are probabilities (N, K)."""
    if answers.ndim != 2:
        return np.full(len(weights), np.nan)
    return _mean_of_known(
        [auc((labels == c).astype(np.int64), answers[:, c], weights) for c in range(answers.shape[1])]
    )


@_metric
def mae(labels: Array, predicted: Array, weights: Array) -> Array:
    """Mean absolute error, in the labels' unit."""
    return _ratio(weights @ np.abs(labels - predicted), weights.sum(1))


@_metric
def r2(labels: Array, predicted: Array, weights: Array) -> Array:
    """Share of the labels' variance that the prediction explains; negative where it is worse than their mean."""
    total, shifted = weights.sum(1), labels - labels.mean()  # shifted, so that a difference of squares loses no digits
    spread = _spread(shifted, _ratio(weights @ shifted, total), weights, total)
    return 1.0 - _ratio(_ratio(weights @ (labels - predicted) ** 2, total), spread)


@_metric
def pearson(labels: Array, predicted: Array, weights: Array) -> Array:
    """Pearson's correlation; blind to a wrong scale or offset, which MAE and R² see."""
    total = weights.sum(1)
    x, y = labels - labels.mean(), predicted - predicted.mean()
    mean_x, mean_y = _ratio(weights @ x, total), _ratio(weights @ y, total)
    spread_x, spread_y = (_spread(part, mean, weights, total) for part, mean in ((x, mean_x), (y, mean_y)))
    return _ratio(_ratio(weights @ (x * y), total) - mean_x * mean_y, np.sqrt(spread_x * spread_y))


# kind of task -> figures of its answers, the first being the one by which checkpoints are compared
METRICS: dict[str, dict[str, Statistic]] = {
    "binary": {"auc": auc, "bacc": accuracy_at_zero, "ap": average_precision},
    "multiclass": {"bacc": balanced_accuracy},
    "regression": {"mae": mae, "r2": r2, "pearson": pearson},
}
# kind of task -> figures of its probabilities: (N,) of the positive class, (N, K) of every class
PROBABILITY_METRICS: dict[str, dict[str, Statistic]] = {
    "binary": {"brier": brier},
    "multiclass": {"auc": macro_auc, "brier": brier},
    "regression": {},
}
HIGHER_IS_BETTER = {
    "auc": True, "bacc": True, "ap": True, "brier": False, "mae": False, "r2": True, "pearson": True,
}  # fmt: skip


def site_leakage(labels: Array, predicted: Array) -> float:
    """How much of the site a probe can read from the features: 0 is chance, 1 every scan's site.

    (balanced accuracy - 1/K) / (1 - 1/K) over the K sites in ``labels``; NaN where there is one site.
    """
    sites = len(np.unique(labels))
    if sites < 2:
        return float("nan")
    return float((balanced_accuracy(labels, predicted) - 1 / sites) / (1 - 1 / sites))


def openbhb_score(site_accuracy: float, external_mae: float) -> float:
    """The OpenBHB challenge's score, lower is better: (site balanced accuracy)^0.3 x (age MAE on unseen sites).

    ``external_mae`` in years. Source: Dufumier et al., NeuroImage 263 (2022) 119637.
    """
    if not 0 <= site_accuracy <= 1 or external_mae < 0:
        raise ValueError(f"site_accuracy={site_accuracy} must lie in [0, 1] and external_mae={external_mae} above 0")
    return float(site_accuracy**0.3 * external_mae)


def _by_score(labels: Array, answers: Array, weights: Array) -> tuple[Array, Array]:
    """Weights of positives and of negatives (R, T) at each distinct score, from the lowest up."""
    order = np.argsort(answers, kind="stable")
    ranked = answers[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    ordered, positive = weights[:, order], labels[order] == 1
    if len(starts) == len(order):
        return ordered * positive, ordered * ~positive
    return np.add.reduceat(ordered * positive, starts, axis=1), np.add.reduceat(ordered * ~positive, starts, axis=1)


def _probabilities(answers: Array) -> bool:
    """Whether these can be probabilities: within [0, 1], and fractions rather than class codes."""
    return bool(answers.dtype.kind == "f" and len(answers) and answers.min() >= 0 and answers.max() <= 1)


def _mean_of_known(values: list[Array]) -> Array:
    """Mean over a list of (R,), leaving out NaN."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    return _ratio(np.where(known, stacked, 0).sum(0), known.sum(0))


def _spread(values: Array, mean: Array, weights: Array, total: Array) -> Array:
    """Weighted variance (R,) of values (N,); 0 where it is rounding alone."""
    spread = _ratio(weights @ values**2, total) - mean**2
    return np.where(spread > 1e-12 * np.mean(values**2), spread, 0.0)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, NaN where the denominator is not positive."""
    good = denominator > 0
    return np.where(good, numerator / np.where(good, denominator, 1), np.nan)
