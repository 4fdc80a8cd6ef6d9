"""Intervals and tests that include the choice of the training participants, from cross-validations of halves.

Nested cross-validation is run R times on all participants, and once on each half of M random halvings. The two halves share
nobody, so half of their squared difference estimates the variance of a study of half the size without bias: the conservative
estimate of Nadeau and Bengio, Machine Learning 52, 2003. Half of that is taken for the full size. The variance falls as 1 / n
where a metric depends on who is tested, and faster where it depends on who is trained on, so the estimate is rather too
large than too small; it also holds the chance of the folds, of which R repeats leave 1 / R.

Their other correction, (1 / J + n_test / n_train) s² over J folds (``intervals.corrected_interval``), is too small where
the features hold little: the scores of two people depend on each other twice, each through the model that the other
trained. ``python -m tests.benchmarks.studies.null_studies`` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from evaluation.statistics.intervals import LEVEL, UNBOUNDED, limits_in_range
from evaluation.statistics.metrics import value_range

FEWEST_HALVINGS = 5  # with fewer the t distribution is so wide that the interval says nothing
BOTH = "people and training sets"  # what an interval covers
PEOPLE = "people"  # the trained models are taken as given
KEYS = ["kind", "number", "side"]  # of a resample


@dataclass(frozen=True)
class TrainingSetInterval:
    """The mean of a metric, or of a difference, over repeats, with its interval over participants and training sets.

    ``error`` is its standard error and ``freedom`` the degrees of freedom of its t distribution.
    """

    value: float
    low: float
    high: float
    error: float
    freedom: int

    def two_sided(self, null: float = 0.0) -> float:
        """Return the two-sided p value of the mean being ``null``."""
        return self._p(abs(self.value - null), 2)

    def better_than(self, null: float, higher_is_better: bool = True) -> float:
        """Return the one-sided p value of the mean being no better than ``null``."""
        return self._p(self.value - null if higher_is_better else null - self.value, 1)

    def _p(self, distance: float, sides: int) -> float:
        if not np.isfinite(self.error):
            return float("nan")
        if self.error == 0:
            return 1.0 if distance <= 0 else 0.0
        return float(sides * stats.t.sf(distance / self.error, self.freedom))


def training_set_interval(
    repeats: NDArray[Any], halves: NDArray[Any], level: float = LEVEL, bounds: tuple[float, float] = UNBOUNDED
) -> TrainingSetInterval:  # fmt: skip
    """Return the mean over repeats with an interval that covers the choice of test and of training participants.

    The standard error is sqrt(mean over halvings of (first - second)² / 4), with as many degrees of freedom as halvings.

    Args:
        repeats: (R,) the metric of each cross-validation of all participants; NaN is left out.
        halves: (M, 2) the metric of the two halves of each halving; a halving with a NaN is left out.
        level: of the interval.
        bounds: of the metric; the interval stays inside (``intervals.limits_in_range``).

    Returns:
        Limits and error are NaN with fewer than FEWEST_HALVINGS halvings.
    """
    repeats, halves = np.asarray(repeats, float), np.asarray(halves, float).reshape(-1, 2)
    repeats, halves = repeats[np.isfinite(repeats)], halves[np.isfinite(halves).all(1)]
    value = float(repeats.mean()) if len(repeats) else float("nan")
    if len(halves) < FEWEST_HALVINGS or not np.isfinite(value):
        return TrainingSetInterval(value, float("nan"), float("nan"), float("nan"), len(halves))
    error = float(np.sqrt(np.square(halves[:, 0] - halves[:, 1]).mean() / 4))
    half = float(stats.t.ppf((1 + level) / 2, len(halves))) * error
    return TrainingSetInterval(value, *limits_in_range(value, half, bounds), error, len(halves))


def metric_interval(resamples: pd.DataFrame, task: str, kind: str, metric: str) -> TrainingSetInterval | None:
    """Return the mean of a task's metric over repeats, with its interval; None if there are too few halvings.

    This is the value of the metric that evaluation and comparison show.

    Args:
        resamples: table with the columns task, metric, kind (repeat, half or permuted), number, side and value.
        task: name of the task.
        kind: of the task: binary, multiclass or regression.
        metric: name of the metric.
    """
    table = resamples[(resamples["task"] == task) & (resamples["metric"] == metric)] if len(resamples) else resamples
    return interval_of(table, table["value"].to_numpy(float), value_range(kind, metric)) if len(table) else None


def interval_of(
    resamples: pd.DataFrame, values: NDArray[np.float64], bounds: tuple[float, float] = UNBOUNDED
) -> TrainingSetInterval | None:
    """Return the interval of ``values`` (rows,), one for each row of ``resamples``; None if there are too few halvings."""
    kinds, numbers, sides = (resamples[name].to_numpy() for name in KEYS)
    half = kinds == "half"
    halves = pd.DataFrame({"number": numbers[half], "side": sides[half], "value": values[half]})
    pairs = halves.pivot(index="number", columns="side", values="value").dropna()
    if pairs.shape[1] != 2:
        return None
    interval = training_set_interval(values[kinds == "repeat"], pairs.to_numpy(float), bounds=bounds)
    return interval if np.isfinite(interval.error) else None


def refitted_p(value: float, permuted: NDArray[Any], higher_is_better: bool = True) -> float:
    """Return the one-sided p value of a metric among those of models that were fitted again to permuted features.

    p = (1 + permutations at least as good) / (1 + permutations); exact, also for few participants (Phipson and Smyth 2010).
    An undefined permutation counts as at least as good. NaN if the value is undefined or there are no permutations.
    """
    permuted = np.asarray(permuted, float)
    if not len(permuted) or not np.isfinite(value):
        return float("nan")
    sign = 1.0 if higher_is_better else -1.0
    reached = ~np.isfinite(permuted) | (sign * permuted >= sign * value - 1e-12)
    return float((1 + reached.sum()) / (1 + len(permuted)))
