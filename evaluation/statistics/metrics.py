"""Metrics of predictions. Each takes weights too, so a bootstrap over participants is computed in one call.

A metric of ``METRICS`` is called with labels (N,) and predictions (N,): for a binary task a score that rises with the
positive class and is 0 at the threshold, for a multiclass task class codes, for a regression numbers. A metric of
``PROBABILITY_METRICS`` is called with probabilities instead: of the positive class (N,), or of every class (N, K).

Without weights a metric is a float. With weights (R, N) it is an array (R,): row r is the metric of a sample that holds
scan n ``weights[r, n]`` times. It is NaN where the metric is undefined, for example the AUC of a single class or the Brier
score of numbers that are not probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Statistic, with_interval
from evaluation.statistics.paired import paired_difference

__all__ = [
    "HIGHER_IS_BETTER", "METRICS", "PROBABILITY_METRICS", "RANGES", "Statistic", "above_chance", "accuracy_at_zero", "auc",
    "average_precision", "balanced_accuracy", "brier", "chance_level", "interval_text", "macro_auc", "mae", "openbhb_score",
    "paired_difference", "pearson", "r2", "site_leakage", "value_range", "with_interval",
]  # fmt: skip


def _metric(weighted: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[Any]]) -> Statistic:
    """Let a metric of weights (R, N) be called without weights too."""

    @wraps(weighted)
    def metric(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any] | None = None) -> Any:
        """Call the metric, with all weights 1 if there are none."""
        labels, predictions = np.asarray(labels), np.asarray(predictions)
        if weights is None:
            return float(weighted(labels, predictions, np.ones((1, len(labels))))[0])
        return weighted(labels, predictions, weights)

    return cast(Statistic, metric)


@_metric
def auc(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the area under the ROC curve: the probability that a positive scores above a negative; ties count half.

    AUC = Σ_i Σ_j [s_i > s_j] + ½ [s_i = s_j] over positives i and negatives j, divided by the number of pairs (Hanley and
    McNeil, Radiology 143, 1982). Scores need not be probabilities.
    """
    positive, negative = _by_score(labels, predictions, weights)
    below = np.cumsum(negative, axis=1) - negative
    return _ratio((positive * (below + negative / 2)).sum(1), positive.sum(1) * negative.sum(1))


@_metric
def average_precision(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the average precision Σ_t (recall_t - recall_{t-1}) precision_t over the distinct scores t, in falling order.

    Its chance level is the share of positives, so tasks can be compared only if that share is equal.
    """
    positive, negative = (counts[:, ::-1] for counts in _by_score(labels, predictions, weights))
    above = np.cumsum(positive, axis=1)
    precision = np.nan_to_num(_ratio(above, above + np.cumsum(negative, axis=1)))
    return _ratio((positive * precision).sum(1), positive.sum(1))


@_metric
def balanced_accuracy(labels: NDArray[Any], predicted: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the mean recall over the classes present in ``labels``.

    ``predicted`` holds class codes (N,) or probabilities (N, K); of these the most probable class is taken.
    """
    codes = predicted.argmax(1) if predicted.ndim == 2 else predicted
    correct = weights * (labels == codes)
    recalls = [_ratio(correct[:, labels == c].sum(1), weights[:, labels == c].sum(1)) for c in np.unique(labels)]
    return _finite_mean(recalls)


@_metric
def accuracy_at_zero(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the balanced accuracy of a binary task, labels (N,) of 0 and 1, with the threshold at score (N,) 0."""
    return balanced_accuracy(labels, (predictions > 0).astype(np.int64), weights)


@_metric
def brier(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the Brier score: the mean of (p - y)²; 0 is perfect, 0.25 is that of p = 0.5.

    ``predictions`` are probabilities of the positive class (N,), or of every class (N, K), for labels (N,). For K classes
    it is the mean of Σ_k (p_k - [y = k])², from 0 to 2. Source: Brier, Monthly Weather Review 78 (1950),
    whose sum over two classes is twice the binary form used here.
    """
    if not _are_probabilities(predictions):
        return np.full(len(weights), np.nan)
    if predictions.ndim == 2:
        errors = ((predictions - (labels[:, None] == np.arange(predictions.shape[1]))) ** 2).sum(1)
    else:
        errors = (predictions - labels) ** 2
    return _ratio(weights @ errors, weights.sum(1))


@_metric
def macro_auc(labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the mean over the classes of the AUC of one class against the rest; ``predictions``: probabilities (N, K)."""
    if predictions.ndim != 2:
        return np.full(len(weights), np.nan)
    return _finite_mean(
        [auc((labels == c).astype(np.int64), predictions[:, c], weights) for c in range(predictions.shape[1])]
    )


@_metric
def mae(labels: NDArray[Any], predicted: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return the mean absolute error of predictions (N,) of labels (N,), in the unit of the labels."""
    return _ratio(weights @ np.abs(labels - predicted), weights.sum(1))


@_metric
def r2(labels: NDArray[Any], predicted: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return R²: the share of the variance of labels (N,) that predictions (N,) explain; negative if worse than the mean."""
    # Labels are centred to avoid cancellation in the difference of squares.
    total, centred = weights.sum(1), labels - labels.mean()
    variance = _variance(centred, _ratio(weights @ centred, total), weights, total)
    return 1.0 - _ratio(_ratio(weights @ (labels - predicted) ** 2, total), variance)


@_metric
def pearson(labels: NDArray[Any], predicted: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Return Pearson's correlation of labels (N,) and predictions (N,).

    Unlike MAE and R² it does not see a wrong scale or offset.
    """
    total = weights.sum(1)
    x, y = labels - labels.mean(), predicted - predicted.mean()
    mean_x, mean_y = _ratio(weights @ x, total), _ratio(weights @ y, total)
    variance_x, variance_y = (_variance(values, mean, weights, total) for values, mean in ((x, mean_x), (y, mean_y)))
    return _ratio(_ratio(weights @ (x * y), total) - mean_x * mean_y, np.sqrt(variance_x * variance_y))


# Kind of task -> metrics of its predictions. Checkpoints are compared by the first.
METRICS: dict[str, dict[str, Statistic]] = {
    "binary": {"auc": auc, "bacc": accuracy_at_zero, "ap": average_precision},
    "multiclass": {"bacc": balanced_accuracy},
    "regression": {"mae": mae, "r2": r2, "pearson": pearson},
}
# Kind of task -> metrics of its probabilities: of the positive class (N,), or of every class (N, K).
PROBABILITY_METRICS: dict[str, dict[str, Statistic]] = {
    "binary": {"brier": brier},
    "multiclass": {"auc": macro_auc, "brier": brier},
    "regression": {},
}
HIGHER_IS_BETTER = {
    "auc": True, "bacc": True, "ap": True, "brier": False, "mae": False, "r2": True, "pearson": True,
}  # fmt: skip


RANGES = {
    "auc": (0.0, 1.0), "bacc": (0.0, 1.0), "ap": (0.0, 1.0), "brier": (0.0, 1.0), "mae": (0.0, np.inf), "r2": (-np.inf, 1.0),
    "pearson": (-1.0, 1.0),
}  # fmt: skip


def value_range(kind: str, metric: str) -> tuple[float, float]:
    """Return the least and the greatest value of a metric for a kind of task; the Brier score of K classes goes up to 2."""
    return (0.0, 2.0) if (kind, metric) == ("multiclass", "brier") else RANGES[metric]


def interval_text(metric: str, value: float, low: float, high: float) -> str:
    """Format a metric as ``0.812 [0.75, 0.87]``, an MAE as ``5.52 [4.9, 6.3]``, a missing value as ``-``."""
    if value is None or not np.isfinite(value):
        return "-"
    if metric == "mae":
        return f"{value:.2f} [{low:.1f}, {high:.1f}]"
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def chance_level(kind: str, labels: NDArray[Any]) -> float:
    """Return a task's first metric of uninformative answers: AUC 0.5, balanced accuracy 1/K, MAE of the labels' median."""
    if kind == "binary":
        return 0.5
    if kind == "multiclass":
        return 1 / len(np.unique(labels))
    return float(np.abs(labels - np.median(labels)).mean())


def site_leakage(labels: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Return how well a probe recognises the site from the features: 0 is chance, 1 is perfect.

    ``above_chance`` of the balanced accuracy over the sites in ``labels``.
    """
    return above_chance(balanced_accuracy(labels, predicted), len(np.unique(labels)))


def above_chance(accuracy: float, classes: int) -> float:
    """Return (balanced accuracy - 1/K) / (1 - 1/K) of K classes: 0 by chance, 1 if perfect; NaN if there is only one class."""
    if classes < 2:
        return float("nan")
    return float((accuracy - 1 / classes) / (1 - 1 / classes))


def openbhb_score(site_accuracy: float, external_mae: float) -> float:
    """Return the score of the OpenBHB challenge, lower is better: (site balanced accuracy)^0.3 x (age MAE on unseen sites).

    ``external_mae`` is in years. Source: Dufumier et al., NeuroImage 263 (2022) 119637. Raises ValueError if
    ``site_accuracy`` is not in [0, 1] or ``external_mae`` is negative.
    """
    if not 0 <= site_accuracy <= 1 or external_mae < 0:
        raise ValueError(
            f"site_accuracy={site_accuracy} must lie in [0, 1], external_mae={external_mae} must not be negative"
        )
    return float(site_accuracy**0.3 * external_mae)


def _by_score(
    labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the weights of positives and of negatives (R, T) at each of the T distinct scores, in rising order."""
    order = np.argsort(predictions, kind="stable")
    ranked = predictions[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    ordered, positive = weights[:, order], labels[order] == 1
    if len(starts) == len(order):
        return ordered * positive, ordered * ~positive
    return np.add.reduceat(ordered * positive, starts, axis=1), np.add.reduceat(ordered * ~positive, starts, axis=1)


def _are_probabilities(predictions: NDArray[Any]) -> bool:
    """Return whether predictions can be probabilities: floats in [0, 1] and not class codes."""
    return bool(
        predictions.dtype.kind == "f" and len(predictions) and predictions.min() >= 0 and predictions.max() <= 1
    )


def _finite_mean(values: list[NDArray[Any]]) -> NDArray[Any]:
    """Return the mean over a list of arrays (R,), ignoring NaN."""
    stacked = np.stack(values)
    finite = np.isfinite(stacked)
    return _ratio(np.where(finite, stacked, 0).sum(0), finite.sum(0))


def _variance(values: NDArray[Any], mean: NDArray[Any], weights: NDArray[Any], total: NDArray[Any]) -> NDArray[Any]:
    """Return the weighted variance (R,) of values (N,); 0 if it is a rounding error."""
    variance = _ratio(weights @ values**2, total) - mean**2
    return np.where(variance > 1e-12 * np.mean(values**2), variance, 0.0)


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[Any]:
    """Return the quotient, NaN where the denominator is not positive."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1), np.nan)


def inner_metric(labels: NDArray[Any], predicted: NDArray[Any], kind: str) -> float:
    """Return the score by which params are chosen, higher is better: AUC, balanced accuracy or minus the MAE."""
    if kind == "binary":
        return auc(labels, predicted)
    return balanced_accuracy(labels, predicted) if kind == "multiclass" else -mae(labels, predicted)
