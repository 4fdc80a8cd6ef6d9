"""The comparison's tables of metrics: values with intervals, paired differences, subgroups and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.comparison import resampled
from evaluation.comparison.evaluations import CheckpointEvaluation, labels_of, metrics_of, probabilities_of
from evaluation.comparison.pairs import pairs
from evaluation.statistics import fairness
from evaluation.statistics.fairness import fairness_table
from evaluation.statistics.metrics import HIGHER_IS_BETTER, chance_level
from evaluation.statistics.paired import Difference, delong_difference, holm, paired_bootstrap, permutation_p
from evaluation.statistics.subgroups import COLUMNS, MINIMUM, age_bands, calibration_curve, subgroup_table

METRIC_COLUMNS = [
    "checkpoint", "task", "title", "metric", "value", "low", "high", "covers", "fixed_value", "fixed_low", "fixed_high",
    "chance", "p_chance", "chance_test", "p_fixed",
]  # fmt: skip
DIFFERENCE_COLUMNS = [
    "task", "metric", "first", "second", "difference", "low", "high", "p", "p_holm", "test", "fixed_difference", "fixed_low",
    "fixed_high", "fixed_p", "fixed_test", "boot_low", "boot_high",
]  # fmt: skip
SUBGROUP_COLUMNS = ["checkpoint", "task", "metric", *COLUMNS]
FAIRNESS_COLUMNS = ["checkpoint", "task", *fairness.COLUMNS]
CALIBRATION_COLUMNS = ["checkpoint", "task", "predicted", "observed", "low", "high", "scans"]
MOST_BINS = 10
PARTICIPANTS_PER_BIN = 20


def metrics_table(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return METRIC_COLUMNS: a row for every checkpoint, task and metric.

    ``value``, ``low`` and ``high`` are over repeats and cover participants and training sets, if the evaluation has halves;
    else they are the fixed ones, and ``covers`` says so: see ``resampled.shown_metric``. ``fixed_value``, ``fixed_low`` and
    ``fixed_high`` take the trained models as given. ``chance`` (the expected value of uninformative answers), ``p_chance`` (see
    ``resampled.chance_test``) and ``p_fixed`` (labels permuted, models fixed) are given for each task's primary metric, and NaN
    for the others.
    """
    rows = []
    for evaluation in evaluations:
        for task in evaluation.tasks:
            predictions = evaluation.predictions_of(task)
            labels, people = labels_of(predictions), predictions["participant"].to_numpy()
            for number, (metric, statistic, answers) in enumerate(metrics_of(predictions)):
                chance = p_fixed = p_chance = float("nan")
                test = ""
                if number == 0:
                    chance = chance_level(str(predictions["kind"].iloc[0]), labels)
                    p_fixed = permutation_p(
                        statistic, labels, answers, people, higher_is_better=HIGHER_IS_BETTER[metric]
                    )  # fmt: skip
                    p_chance, test = resampled.chance_test(evaluation, task, metric)
                shown = resampled.shown_metric(evaluation, task, metric)
                rows.append((
                    evaluation.name, task, predictions["title"].iloc[0], metric, *shown, chance, p_chance, test, p_fixed,
                ))  # fmt: skip
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def differences_table(
    evaluations: list[CheckpointEvaluation], against: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Return DIFFERENCE_COLUMNS: ``first`` minus ``second`` by the primary metric of each task, for each of ``pairs``.

    ``difference``, ``low``, ``high`` and ``p`` are over repeats and include the training sets (``test`` is ``halves``). If
    one of the evaluations has no halves, ``test`` is ``none``, and limits and p values are NaN. The columns ``fixed_`` take
    the trained models as given. AUC: DeLong's test and interval over participants; other metrics: paired bootstrap over
    participants, whose interval is also given for AUC in ``boot_low`` and ``boot_high``. ``p_holm`` is corrected over all
    rows with a ``p``. ``against`` keeps the pairs with this checkpoint only. Also returns a line for each pair that was
    evaluated on different scans, or that has no halves in common.
    """
    rows, unpaired = [], []
    for first, second in pairs(evaluations, against):
        for task in [task for task in first.tasks if task in second.tasks]:
            both = _paired_predictions(first, second, task)
            if both is None:
                unpaired.append(f"{task}: {first.name} and {second.name} were evaluated on different scans or labels")
            else:
                metric, *fixed = _fixed_difference(both)
                interval, reason = resampled.paired_interval(first, second, task, metric)
                nan = float("nan")
                shown = (fixed[0], nan, nan, nan, "none")
                if interval:
                    shown = (interval.value, interval.low, interval.high, interval.two_sided(), "halves")
                else:
                    unpaired.append(f"{task}: training sets of {first.name} and {second.name}: {reason}")
                rows.append((task, metric, first.name, second.name, *shown, *fixed))
    table = pd.DataFrame(rows, columns=[column for column in DIFFERENCE_COLUMNS if column != "p_holm"])
    table["p_holm"] = holm(table["p"].to_numpy(float))
    tasks = dict.fromkeys(task for evaluation in evaluations for task in evaluation.tasks)
    order = {task: number for number, task in enumerate(tasks)}
    table = table.sort_values("task", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    return table[DIFFERENCE_COLUMNS], unpaired


def _paired_predictions(first: CheckpointEvaluation, second: CheckpointEvaluation, task: str) -> pd.DataFrame | None:
    """Join both predictions of a task by scan; None if their scans, labels or participants differ."""
    one, other = first.predictions_of(task), second.predictions_of(task)
    columns = ["key", "label", "participant", "answer"]
    both = one.merge(other[columns], on=["key", "label", "participant"], suffixes=("", "_other"))
    return both if len(both) == len(one) == len(other) else None


def _fixed_difference(both: pd.DataFrame) -> tuple[Any, ...]:
    """Return metric, difference, low, high, p, test, boot_low, boot_high of one pair, with the models taken as given."""
    metric, statistic, one = next(metrics_of(both))
    labels, other, people = labels_of(both), both["answer_other"].to_numpy(), both["participant"].to_numpy()
    bootstrap = paired_bootstrap(statistic, labels, one, other, people)
    result: Difference = delong_difference(labels, one, other, people) if metric == "auc" else bootstrap
    test = "DeLong" if metric == "auc" else "bootstrap"
    return metric, result.value, result.low, result.high, result.p, test, bootstrap.low, bootstrap.high


def subgroups_table(evaluations: list[CheckpointEvaluation], minimum: int = MINIMUM) -> pd.DataFrame:
    """Return SUBGROUP_COLUMNS: each task's primary metric within every sex, age band and site.

    A group of fewer than ``minimum`` participants, or with too few of a class, keeps its row: its values are NaN and
    ``note`` says why.
    """
    tables = []
    for evaluation in evaluations:
        for task in evaluation.tasks:
            predictions = evaluation.predictions_of(task)
            metric, statistic, answers = next(metrics_of(predictions))
            by = {
                name: predictions[name].to_numpy() for name in ("sex", "site") if name in predictions and name != task
            }
            if "age" in predictions:
                by["age"] = age_bands(predictions["age"].to_numpy(float))
            table = subgroup_table(
                statistic, labels_of(predictions), answers, predictions["participant"].to_numpy(),
                {name: by[name] for name in ("sex", "age", "site") if name in by},
                classes=evaluation.kind(task) != "regression", minimum=minimum,
            )  # fmt: skip
            tables.append(table.assign(checkpoint=evaluation.name, task=task, metric=metric))
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True)[SUBGROUP_COLUMNS] if tables else pd.DataFrame(columns=SUBGROUP_COLUMNS)


def _binary_tasks(
    evaluations: list[CheckpointEvaluation],
) -> Iterator[tuple[CheckpointEvaluation, str, pd.DataFrame, NDArray[Any]]]:
    """Yield evaluation, task, predictions and probabilities of each binary task whose probabilities are stored."""
    for evaluation in evaluations:
        for task in evaluation.tasks:
            predictions = evaluation.predictions_of(task)
            probabilities = probabilities_of(predictions)
            if evaluation.kind(task) != "binary" or probabilities is None:
                continue
            yield evaluation, task, predictions, probabilities


def fairness_gaps(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return FAIRNESS_COLUMNS: gaps of binary tasks with stored probabilities over sex, age band and site."""
    tables = []
    for evaluation, task, predictions, probabilities in _binary_tasks(evaluations):
        by = {name: predictions[name].to_numpy() for name in ("sex", "site") if name in predictions and name != task}
        if "age" in predictions:
            by["age"] = age_bands(predictions["age"].to_numpy(float))
        table = fairness_table(
            labels_of(predictions), predictions["answer"].to_numpy(), probabilities,
            predictions["participant"].to_numpy(), {name: by[name] for name in ("sex", "age", "site") if name in by},
        )  # fmt: skip
        tables.append(table.assign(checkpoint=evaluation.name, task=task))
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True)[FAIRNESS_COLUMNS] if tables else pd.DataFrame(columns=FAIRNESS_COLUMNS)


def calibration_table(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return CALIBRATION_COLUMNS: mean probability and share of positives in bins of equally many scans.

    For binary tasks with stored probabilities. A bin has at least PARTICIPANTS_PER_BIN participants on average, and there
    are 2 to MOST_BINS bins. ``low`` and ``high``: Wilson's 95 % interval.
    """
    tables = []
    for evaluation, task, predictions, probabilities in _binary_tasks(evaluations):
        people = predictions["participant"].to_numpy()
        bins = int(np.clip(len(np.unique(people)) // PARTICIPANTS_PER_BIN, 2, MOST_BINS))
        curve = calibration_curve(labels_of(predictions), probabilities, people, bins)
        tables.append(curve.assign(checkpoint=evaluation.name, task=task))
    if not tables:
        return pd.DataFrame(columns=CALIBRATION_COLUMNS)
    return pd.concat(tables, ignore_index=True)[CALIBRATION_COLUMNS]
