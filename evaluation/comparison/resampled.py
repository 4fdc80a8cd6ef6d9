"""Intervals and tests of the comparison that include the choice of the training participants."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from numpy.typing import NDArray

from evaluation.comparison.curves import why_draws_differ
from evaluation.comparison.evaluations import CheckpointEvaluation, labels_of, metrics_of
from evaluation.statistics.intervals import Statistic, with_interval
from evaluation.statistics.metrics import HIGHER_IS_BETTER
from evaluation.statistics.training_sets import (
    BOTH,
    KEYS,
    PEOPLE,
    TrainingSetInterval,
    interval_of,
    metric_interval,
    refitted_p,
)


class ShownMetric(NamedTuple):
    """A metric as every table, plot and command shows it: the mean over repeats, and that with the models fixed.

    Without halves both are the first cross-validation, and ``covers`` says what the interval covers.
    """

    value: float
    low: float
    high: float
    covers: str
    fixed_value: float
    fixed_low: float
    fixed_high: float


def shown_metric(evaluation: CheckpointEvaluation, task: str, metric: str) -> ShownMetric:
    """Return a metric of a task with both intervals."""
    over_repeats = metric_interval(evaluation.resamples, task, evaluation.kind(task), metric)
    fixed = _fixed_interval(evaluation, task, metric)
    if over_repeats is None:
        return ShownMetric(*fixed, PEOPLE, *fixed)
    return ShownMetric(over_repeats.value, over_repeats.low, over_repeats.high, BOTH, *fixed)


def shown_value(evaluation: CheckpointEvaluation, task: str, metric: str) -> float:
    """Return the value of ``shown_metric`` without its intervals."""
    over_repeats = metric_interval(evaluation.resamples, task, evaluation.kind(task), metric)
    if over_repeats is not None:
        return over_repeats.value
    logged, key = evaluation.run_of(task)["metrics"], f"{task}.{metric}"
    if key in logged:
        return float(logged[key])
    statistic, answers = _statistic_of(evaluation, task, metric)
    return float(statistic(labels_of(evaluation.predictions_of(task)), answers))


def _statistic_of(evaluation: CheckpointEvaluation, task: str, metric: str) -> tuple[Statistic, NDArray[Any]]:
    """Return the function of a metric and what it is given beside the labels, (N,) or (N, K)."""
    found = {name: (function, values) for name, function, values in metrics_of(evaluation.predictions_of(task))}
    return found[metric]


def _fixed_interval(evaluation: CheckpointEvaluation, task: str, metric: str) -> tuple[float, float, float]:
    """Return the first cross-validation's value with the bootstrap's interval: as logged, or of the stored predictions.

    It is logged as ``TASK.METRIC.fixed`` beside the mean over repeats; earlier versions logged it as ``TASK.METRIC``.
    """
    logged = evaluation.run_of(task)["metrics"]
    for key in (f"{task}.{metric}.fixed", f"{task}.{metric}"):
        if f"{key}.low" in logged:
            return logged[key], logged[f"{key}.low"], logged[f"{key}.high"]
    predictions = evaluation.predictions_of(task)
    statistic, answers = _statistic_of(evaluation, task, metric)
    return with_interval(statistic, labels_of(predictions), answers, predictions["participant"].to_numpy())


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
    interval = interval_of(table, (table["value"] - table["chance"]).to_numpy(float))
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
    interval = interval_of(both, (both["value"] - both["value_other"]).to_numpy(float))
    return interval, "" if interval else "too few common halvings; evaluate both with --halvings=10"


def _resamples(evaluation: CheckpointEvaluation, task: str, metric: str) -> pd.DataFrame:
    """Return the rows of one metric; without any, an empty table with the columns."""
    table = evaluation.resamples
    if not len(table):
        return pd.DataFrame({name: [] for name in (*KEYS, "value", "chance")})
    return table[(table["task"] == task) & (table["metric"] == metric)]
