"""Intervals and tests of the comparison that include the choice of the training participants."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.comparison.curves import why_draws_differ
from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.statistics.intervals import UNBOUNDED
from evaluation.statistics.metrics import HIGHER_IS_BETTER, value_range
from evaluation.statistics.training_sets import TrainingSetInterval, refitted_p, training_set_interval

BOTH = "people and training sets"  # what an interval covers
PEOPLE = "people"  # the trained models are taken as given
KEYS = ["kind", "number", "side"]


def metric_interval(evaluation: CheckpointEvaluation, task: str, metric: str) -> TrainingSetInterval | None:
    """Return a metric's mean over repeats with its interval; None if the evaluation has too few halvings."""
    table = _resamples(evaluation, task, metric)
    return _interval(table, table["value"].to_numpy(float), value_range(evaluation.kind(task), metric))


def chance_test(evaluation: CheckpointEvaluation, task: str, metric: str) -> tuple[float, str]:
    """Return the one-sided p value of a metric being no better than chance, with all models fitted again; and the test.

    ``refit``: permuted features, exact, if the evaluation has them. ``halves``: from the spread over halves. Empty, and
    NaN, if it has neither.
    """
    table = _resamples(evaluation, task, metric)
    higher = HIGHER_IS_BETTER[metric]
    permuted = table.loc[table["kind"] == "permuted", "value"]
    if len(permuted):
        first = table.loc[(table["kind"] == "repeat") & (table["number"] == 0), "value"]
        return refitted_p(float(first.iloc[0]), permuted.to_numpy(float), higher), "refit"
    interval = _interval(table, (table["value"] - table["chance"]).to_numpy(float))
    return (interval.better_than(0.0, higher), "halves") if interval else (float("nan"), "")


def paired_interval(
    first: CheckpointEvaluation, second: CheckpointEvaluation, task: str, metric: str
) -> tuple[TrainingSetInterval | None, str]:
    """Return the mean of ``first`` minus ``second`` over common repeats with its interval, or None and why there is none."""
    one, other = (_resamples(each, task, metric) for each in (first, second))
    for name, table in ((first.name, one), (second.name, other)):
        if not len(table):
            return None, f"{name} has no halves; evaluate it with a protocol on fixed features and --halvings=10"
    reason = why_draws_differ(first, second, task)
    if reason:
        return None, reason.replace("draws", "halves")
    both = one.merge(other, on=KEYS, suffixes=("", "_other"))
    interval = _interval(both, (both["value"] - both["value_other"]).to_numpy(float))
    return interval, "" if interval else "too few common halvings; evaluate both with --halvings=10"


def _resamples(evaluation: CheckpointEvaluation, task: str, metric: str) -> pd.DataFrame:
    """Return the rows of one metric; without any, an empty table with the columns."""
    table = evaluation.resamples
    if not len(table):
        return pd.DataFrame({name: [] for name in (*KEYS, "value", "chance")})
    return table[(table["task"] == task) & (table["metric"] == metric)]


def _interval(
    table: pd.DataFrame, values: NDArray[np.float64], bounds: tuple[float, float] = UNBOUNDED
) -> TrainingSetInterval | None:
    """Return the interval of ``values`` (rows,), one for each row of ``table``."""
    kinds, numbers, sides = (table[name].to_numpy() for name in KEYS)
    half = kinds == "half"
    halves = pd.DataFrame({"number": numbers[half], "side": sides[half], "value": values[half]})
    pairs = halves.pivot(index="number", columns="side", values="value").dropna()
    if pairs.shape[1] != 2:
        return None
    interval = training_set_interval(values[kinds == "repeat"], pairs.to_numpy(float), bounds=bounds)
    return interval if np.isfinite(interval.error) else None
