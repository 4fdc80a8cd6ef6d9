"""Learning curves: AUC over the number of training scans, and which checkpoint is better at each."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.comparison.tables import Judged, pairs
from evaluation.statistics.intervals import corrected_interval
from evaluation.statistics.paired import holm

CURVE_COLUMNS = ["checkpoint", "task", "n_train", "draws", "auc", "low", "high"]
DIFFERENCE_COLUMNS = ["task", "n_train", "first", "second", "draws", "difference", "low", "high", "p", "p_holm"]


def curves_table(judged: list[Judged]) -> pd.DataFrame:
    """CURVE_COLUMNS: mean AUC over the draws of each training size, with Nadeau and Bengio's interval."""
    rows = []
    for each in judged:
        for (task, size), part in _parts(each.curve):
            value, low, high, _ = corrected_interval(part["auc"].to_numpy(float), size, _test_people(each.of(task)))
            rows.append((each.name, task, size, len(part), value, low, high))
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def curve_differences(judged: list[Judged], against: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """DIFFERENCE_COLUMNS: mean over the draws that both had of the first's AUC less the second's, with the same interval.

    p_holm is corrected over all rows. Draws are paired by their number where that means the same training and test scans;
    the list says which pairs had other draws. Pairs judged on different scans are left to ``differences_table`` to name.
    """
    rows, left_out = [], []
    for first, second in pairs(judged, against):
        if not len(first.curve) or not len(second.curve):
            continue
        both = first.curve.merge(second.curve, on=["task", "n_train", "draw"], suffixes=("", "_other"))
        tasks = [
            task for task in dict.fromkeys(both["task"]) if set(first.of(task)["key"]) == set(second.of(task)["key"])
        ]
        reasons = {task: _other_draws(first, second, task) for task in tasks}
        left_out += [
            f"{task}: learning curves of {first.name} and {second.name}: {reason}"
            for task, reason in reasons.items() if reason
        ]  # fmt: skip
        for (task, size), part in _parts(both):
            if reasons.get(task, "other scans"):
                continue
            gaps = (part["auc"] - part["auc_other"]).to_numpy(float)
            value, low, high, p = corrected_interval(gaps, size, _test_people(first.of(task)))
            rows.append((task, size, first.name, second.name, len(part), value, low, high, p))
    table = pd.DataFrame(rows, columns=[name for name in DIFFERENCE_COLUMNS if name != "p_holm"])
    return table.assign(p_holm=holm(table["p"].to_numpy(float))), left_out


def _other_draws(first: Judged, second: Judged, task: str) -> str:
    """Why draws of one number are not the same scans in both; empty where they are.

    A draw depends on the scans in their order, their labels and folds, and the seed. It does not depend on how many draws
    were asked for: of 10 and 20 draws the first 10 are the same.
    """
    for name, default in (("seed", ""), ("folds", ""), ("leave_site_out", "False")):
        one, other = (each.run_of(task)["params"].get(name, default) for each in (first, second))
        if one != other:
            return (
                f"--{name.replace('_', '-')} was {one or 'not logged'} and {other or 'not logged'}, so the draws differ"
            )
    one, other = first.of(task), second.of(task)
    columns = ["key", "label", *["fold"] * all("fold" in part and part["fold"].notna().all() for part in (one, other))]
    if not all(np.array_equal(one[column].to_numpy(), other[column].to_numpy()) for column in columns):
        return "their scans are in other folds or have other labels, so the draws differ"
    return ""


def _parts(curve: pd.DataFrame) -> list[tuple[tuple[str, int], pd.DataFrame]]:
    if not len(curve):
        return []
    grouped = curve.groupby(["task", "n_train"], sort=True)
    return [((str(task), int(str(size))), part) for (task, size), part in grouped]


def _test_people(part: pd.DataFrame) -> int:
    """Participants that one draw is tested on: a fold's; a third of all where folds were not stored."""
    if "fold" in part and part["fold"].notna().all():
        return max(1, round(float(part.groupby("fold")["participant"].nunique().mean())))
    return max(1, int(part["participant"].nunique()) // 3)
