"""Learning curves: AUC by the number of training scans, and paired differences at each number."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.pairs import pairs
from evaluation.statistics.intervals import corrected_interval
from evaluation.statistics.paired import holm

CURVE_COLUMNS = ["checkpoint", "task", "n_train", "draws", "auc", "low", "high"]
CURVE_DIFFERENCE_COLUMNS = [
    "task", "n_train", "first", "second", "draws", "difference", "low", "high", "p", "p_holm",
]  # fmt: skip


def curves_table(evaluations: list[CheckpointEvaluation]) -> pd.DataFrame:
    """Return CURVE_COLUMNS: mean AUC over the draws of each training size, with Nadeau and Bengio's 95 % interval."""
    rows = []
    for evaluation in evaluations:
        for task, size, draws in _by_task_and_size(evaluation.curve):
            aucs, test_people = draws["auc"].to_numpy(float), _test_people(evaluation.predictions_of(task))
            value, low, high, _ = corrected_interval(aucs, size, test_people, bounds=(0.0, 1.0))
            rows.append((evaluation.name, task, size, len(draws), value, low, high))
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def curve_differences(
    evaluations: list[CheckpointEvaluation], against: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Return CURVE_DIFFERENCE_COLUMNS: mean AUC of ``first`` minus ``second`` over their common draws, with interval.

    ``p_holm`` is corrected over all rows. Draws are paired by number if equal numbers mean the same training and test
    scans in both evaluations. Also returns a line for each pair whose draws differ. Pairs on different scans are left
    out here, because ``differences_table`` reports them.
    """
    rows, unpaired = [], []
    for first, second in pairs(evaluations, against):
        if not len(first.curve) or not len(second.curve):
            continue
        both = first.curve.merge(second.curve, on=["task", "n_train", "draw"], suffixes=("", "_other"))
        reasons = {
            task: why_draws_differ(first, second, task)
            for task in dict.fromkeys(both["task"])
            if set(first.predictions_of(task)["key"]) == set(second.predictions_of(task)["key"])
        }
        unpaired += [
            f"{task}: learning curves of {first.name} and {second.name}: {reason}"
            for task, reason in reasons.items()
            if reason
        ]
        for task, size, draws in _by_task_and_size(both):
            if reasons.get(task) == "":
                differences = (draws["auc"] - draws["auc_other"]).to_numpy(float)
                value, low, high, p = corrected_interval(differences, size, _test_people(first.predictions_of(task)))
                rows.append((task, size, first.name, second.name, len(draws), value, low, high, p))
    table = pd.DataFrame(rows, columns=[name for name in CURVE_DIFFERENCE_COLUMNS if name != "p_holm"])
    return table.assign(p_holm=holm(table["p"].to_numpy(float))), unpaired


def why_draws_differ(first: CheckpointEvaluation, second: CheckpointEvaluation, task: str) -> str:
    """Say why equal draw numbers mean different scans in the two evaluations; empty if they mean the same.

    A draw depends on the order, labels and folds of the scans and on the seed. It does not depend on the number of draws:
    the first 10 of 20 draws equal 10 draws.
    """
    for name, default in (("seed", ""), ("folds", ""), ("leave_site_out", "False")):
        one, other = (each.run_of(task)["params"].get(name, default) for each in (first, second))
        if one != other:
            option = f"--{name.replace('_', '-')}"
            return f"{option} was {one or 'not logged'} and {other or 'not logged'}, so the draws differ"
    one, other = first.predictions_of(task), second.predictions_of(task)
    folds_known = all("fold" in each and each["fold"].notna().all() for each in (one, other))
    columns = ["key", "label", *["fold"] * folds_known]
    if not all(np.array_equal(one[column].to_numpy(), other[column].to_numpy()) for column in columns):
        return "the folds or labels of their scans differ, so the draws differ"
    return ""


def _by_task_and_size(curve: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    if not len(curve):
        return []
    grouped = curve.groupby(["task", "n_train"], sort=True)
    return [(str(task), int(str(size)), draws) for (task, size), draws in grouped]


def _test_people(predictions: pd.DataFrame) -> int:
    """Mean number of test participants of a draw: those of a fold, or a third of all if folds were not stored."""
    if "fold" in predictions and predictions["fold"].notna().all():
        return max(1, round(float(predictions.groupby("fold")["participant"].nunique().mean())))
    return max(1, int(predictions["participant"].nunique()) // 3)
