"""Numbers and labels of the comparison as text, and its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.statistics.metrics import HIGHER_IS_BETTER
from infra.files import atomic_write

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


def csv_files(tables: Mapping[str, pd.DataFrame], page: Path) -> dict[Path, bytes]:
    """Return the tables with rows as CSV files beside a page: ``report.html`` -> ``report_NAME.csv``."""
    return {
        page.with_name(f"{page.stem}_{name}.csv"): table.to_csv(index=False).encode()
        for name, table in tables.items()
        if len(table)
    }


def write_files(files: Mapping[Path, bytes], possible: Iterable[Path]) -> None:
    """Write files, and remove those of ``possible`` that are not among them: they are of an earlier report."""
    for path, data in files.items():
        with atomic_write(path) as stream:
            stream.write(data)
    for path in possible:
        if path not in files and path.is_file():
            path.unlink()


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """Yield a table's rows with its columns as attributes."""
    yield from table.itertuples()
