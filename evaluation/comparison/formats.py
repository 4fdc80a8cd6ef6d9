"""Numbers and labels of the comparison as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from evaluation.statistics.metrics import HIGHER_IS_BETTER

LABELS = {
    "auc": "AUC", "bacc": "balanced accuracy", "ap": "average precision", "brier": "Brier score", "mae": "MAE",
    "r2": "R²", "pearson": "Pearson r",
}  # fmt: skip
# One sentence each on what the two kinds of intervals and tests cover; shown by report, terminal and LaTeX.
COVERS_BOTH = (
    "Interval and p cover new participants and new training sets: nested cross-validation repeated on all participants, with "
    "the variance from random halves of them."
)
COVERS_PEOPLE = (
    "With models fixed they cover new test participants only (DeLong's test, or a bootstrap or permutation over participants), "
    "and find differences too often."
)
NOT_TESTED = "not tested: training sets not resampled"
LEVEL = 0.05  # of Holm's corrected p, at or below which a difference counts as found


def signed(value: float, low: float, high: float) -> str:
    """Format a difference as ``+0.021 [-0.050, +0.093]``, or without an interval as ``+0.021 [-]``."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{value:+.3f} [-]"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def number(value: float, digits: int = 2) -> str:
    """Format a number; ``-`` if it is NaN."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def p_text(p: float) -> str:
    """Format a p value as ``0.031`` or ``< 0.001``; ``-`` if there was no test."""
    if not np.isfinite(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(row: Any) -> str:
    """Say which checkpoint of a row of ``differences`` is better, if Holm's corrected p shows a difference."""
    if not np.isfinite(row.p_holm):
        return NOT_TESTED
    if not row.p_holm <= LEVEL:
        return "no difference shown"
    higher, lower = (row.first, row.second) if row.difference > 0 else (row.second, row.first)
    if row.metric == "bacc":
        return f"{higher} higher"  # good for a diagnosis, bad for a site
    return f"{higher if HIGHER_IS_BETTER[row.metric] else lower} better"


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """Yield a table's rows with its columns as attributes."""
    yield from table.itertuples()
