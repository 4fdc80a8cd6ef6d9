"""Learning curves: AUC over the number of training scans, and which checkpoint is better at each."""

from __future__ import annotations

import pandas as pd

from evaluation.intervals import corrected_interval
from evaluation.paired import holm
from evaluation.tables import Judged, pairs

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


def curve_differences(judged: list[Judged], against: str | None = None) -> pd.DataFrame:
    """DIFFERENCE_COLUMNS: mean over the draws that both had of the first's AUC less the second's, with the same interval.

    p_holm is corrected over all rows. Draws are paired by their number: same training scans, same test scans.
    """
    rows = []
    for first, second in pairs(judged, against):
        if not len(first.curve) or not len(second.curve):
            continue
        both = first.curve.merge(second.curve, on=["task", "n_train", "draw"], suffixes=("", "_other"))
        for (task, size), part in _parts(both):
            if set(first.of(task)["key"]) != set(second.of(task)["key"]):
                continue  # judged on different scans: the draws differ though their numbers do not
            gaps = (part["auc"] - part["auc_other"]).to_numpy(float)
            value, low, high, p = corrected_interval(gaps, size, _test_people(first.of(task)))
            rows.append((task, size, first.name, second.name, len(part), value, low, high, p))
    table = pd.DataFrame(rows, columns=[name for name in DIFFERENCE_COLUMNS if name != "p_holm"])
    return table.assign(p_holm=holm(table["p"].to_numpy(float)))


def _parts(curve: pd.DataFrame) -> list[tuple[tuple[str, int], pd.DataFrame]]:
    if not len(curve):
        return []
    grouped = curve.groupby(["task", "n_train"], sort=True)
    return [((str(task), int(str(size))), part) for (task, size), part in grouped]


def _test_people(part: pd.DataFrame) -> int:
    """Participants that one draw is tested on: a fold's; a third of all where folds were not stored."""
    if "fold" in part:
        return max(1, round(float(part.groupby("fold")["participant"].nunique().mean())))
    return max(1, int(part["participant"].nunique()) // 3)
