"""The tables of the second experiment, from the stored answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from evaluation.experiments.bootstrap import BootstrapMetrics, Cell
from evaluation.experiments.plan import DISEASES
from evaluation.experiments.second.comparisons import ALL, METHOD_TITLES, PRIMARY, SECONDARY, TESTED, Method
from evaluation.experiments.second.plan import LEVELS, MIDDLE, WHOLE, SecondPlan
from evaluation.experiments.tables import TITLES
from evaluation.statistics.paired import holm

SIGNIFICANT = 0.05  # of a corrected p: the difference counts as found
DIFFERENCE_COLUMNS = ["difference", "low", "high", "p", "draws won"]


def cell_of(level: str, method: Method, disease: str, size: int) -> Cell:
    """Return where the answers of a method lie."""
    return Cell(level, method.method, method.features, disease, size)


def auc_table(metrics: BootstrapMetrics, plan: SecondPlan) -> pd.DataFrame:
    """AUC of every measured method at every level with its 95 % interval."""
    rows = []
    for level in LEVELS:
        for disease, size in _cells(plan):
            for method in ALL:
                cell = cell_of(level, method, disease, size)
                if cell in metrics.values:
                    seeds, draws = metrics.values[cell].shape
                    mean = metrics.mean(cell)
                    rows.append((level, TITLES[disease], size, method.title, seeds, draws, *mean))
    return pd.DataFrame(rows, columns=["level", "task", "n_train", "method", "seeds", "draws", "auc", "low", "high"])


def primary_table(metrics: BootstrapMetrics, plan: SecondPlan) -> pd.DataFrame:
    """The comparisons named beforehand, at the middle level; ``p_holm`` is corrected over all of them.

    A comparison that is not measured yet is a row without numbers, and counts with p = 1 in the correction.
    """
    table = _differences(metrics, plan, [(TESTED, other) for other in PRIMARY], MIDDLE)
    p = table["p"].fillna(1.0).to_numpy(float)
    return table.assign(p_holm=np.where(table["p"].isna(), np.nan, holm(p)))


def secondary_table(metrics: BootstrapMetrics, plan: SecondPlan) -> pd.DataFrame:
    """The other comparisons at the middle level, without correction; those that are not measured are left out."""
    return _differences(metrics, plan, SECONDARY, MIDDLE).dropna(subset="difference")


def levels_table(metrics: BootstrapMetrics, plan: SecondPlan) -> pd.DataFrame:
    """The primary comparisons at every level, without correction; those that are not measured are left out."""
    tables = [_differences(metrics, plan, [(TESTED, other) for other in PRIMARY], level) for level in LEVELS]
    return pd.concat(tables, ignore_index=True).dropna(subset="difference")


def hopes_table(primary: pd.DataFrame, complete: bool = True) -> pd.DataFrame:
    """For every primary comparison: in how many cells y-aware is above, and found above, beside what was hoped for.

    ``fulfilled`` is empty until all cells are measured, and if the measurement is not ``complete``: seeds are missing.
    """
    rows = []
    for other, (above, found) in PRIMARY.items():
        cells = primary[primary["minus"] == other.title]
        is_above = cells["difference"] > 0
        is_found = is_above & (cells["p_holm"] < SIGNIFICANT)
        measured = int(cells["difference"].notna().sum())
        fulfilled = is_above.sum() >= min(above, len(cells)) and is_found.sum() >= min(found, len(cells))
        answer = ("yes" if fulfilled else "no") if complete and measured == len(cells) else ""
        rows.append(
            (other.title, measured, f"{is_above.sum()} ({above})", f"{is_found.sum()} ({found or '-'})", answer)
        )  # fmt: skip
    columns = ["y-aware, spatial + readout, minus", "cells", "above (hoped for)", "found (hoped for)", "fulfilled"]
    return pd.DataFrame(rows, columns=columns)


def age_table(metrics: BootstrapMetrics) -> pd.DataFrame:
    """Mean absolute error in years of the predicted age of healthy people at the test sites, which nothing was fitted to."""
    order = list(METHOD_TITLES)
    cells = [cell for cell in metrics.values if cell.task == "age"]
    cells.sort(key=lambda cell: (list(LEVELS).index(cell.clinic), order.index(cell.method)))
    rows = [
        (
            cell.clinic,
            METHOD_TITLES[cell.method] + ("" if cell.variant == WHOLE else ", readout"),
            metrics.values[cell].shape[0],
            *metrics.mean(cell),
        )
        for cell in cells
    ]
    return pd.DataFrame(rows, columns=["level", "method", "seeds", "mae", "low", "high"])


def wide(table: pd.DataFrame, rows: list[str], value: str, digits: int = 3) -> pd.DataFrame:
    """Return a long table with a column for each disease and size, and cells such as ``0.712 [0.690, 0.734]``.

    ``rows`` are the columns that name a row. A corrected p, where there is one, stands behind the interval.
    """
    corrected = "p_holm" in table
    text = [
        "" if np.isnan(row[value]) else
        f"{row[value]:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        + (f" p {row['p_holm']:.4f}" if corrected else "")
        for row in table.to_dict("records")
    ]  # fmt: skip
    columns = table["task"] + ", " + table["n_train"].astype(str)
    shown = table[rows].assign(column=columns, text=text)
    pivoted = shown.pivot_table("text", rows, "column", aggfunc="first", sort=False).fillna("")
    return pivoted[list(dict.fromkeys(columns))].reset_index()


def _differences(
    metrics: BootstrapMetrics, plan: SecondPlan, pairs: Iterator[tuple[Method, Method]] | list[tuple[Method, Method]]
    | tuple[tuple[Method, Method], ...], level: str,
) -> pd.DataFrame:  # fmt: skip
    """Return a row for every pair, disease and size: first minus second; without numbers where one is not measured."""
    rows = []
    pairs = list(pairs)
    for disease, size in _cells(plan):
        for first, second in pairs:
            cells = [cell_of(level, method, disease, size) for method in (first, second)]
            if all(cell in metrics.values for cell in cells):
                won, draws = metrics.draws_won(cells[0], cells[1])
                values = (*metrics.difference(cells[0], cells[1]), f"{won} of {draws}")
            else:
                values = (np.nan, np.nan, np.nan, np.nan, "")
            rows.append((level, TITLES[disease], size, first.title, second.title, *values))
    return pd.DataFrame(rows, columns=["level", "task", "n_train", "method", "minus", *DIFFERENCE_COLUMNS])


def _cells(plan: SecondPlan) -> list[tuple[str, int]]:
    return [(disease, size) for disease in DISEASES for size in plan.sizes]
