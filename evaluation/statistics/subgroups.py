"""Metrics within subgroups (sex, age bands, sites), and the calibration of probabilities."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from evaluation.statistics.intervals import Statistic, with_interval

BANDS = (0.0, 20.0, 40.0, 60.0, 80.0, 120.0)  # years; the same in every cohort
MINIMUM = 20  # participants; intervals of smaller groups are too wide to be useful
MINIMUM_OF_A_CLASS = 5
COLUMNS = ["by", "group", "participants", "scans", "value", "low", "high", "note"]


def age_bands(ages: NDArray[Any]) -> NDArray[Any]:
    """Return the age band (N,) of each age, for example ``40-59``; empty if the age is missing or outside the bands."""
    names = np.array(["", *(f"{low:.0f}-{high - 1:.0f}" for low, high in pairwise(BANDS)), ""])
    ages = np.asarray(ages, float)
    return np.asarray(names[np.where(np.isfinite(ages), np.digitize(np.nan_to_num(ages), BANDS), 0)])


def subgroup_table(
    statistic: Statistic,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    groups: NDArray[Any],
    by: dict[str, NDArray[Any]],
    *,
    classes: bool,
    minimum: int = MINIMUM,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the metric within each subgroup, with its 95 % BCa interval over the participants of the subgroup.

    A group that is too small keeps its row and its counts, with NaN as metric and the reason in ``note``, so that a missing
    value is not mistaken for a hidden one.

    Args:
        statistic: for example ``metrics.auc``.
        labels: (N,).
        predictions: (N,) or (N, K).
        groups: (N,) participant of each scan.
        by: columns (N,) of text to group by, for example {"sex": ..., "age": age_bands(...)}; empty text is in no group.
        classes: whether labels are classes; each must then have MINIMUM_OF_A_CLASS participants in the group.
        minimum: number of participants that a group needs.
        seed: of the bootstrap.

    Returns:
        A row per subgroup with the columns by, group, participants, scans, value, low, high and note.
    """
    rows = []
    for column, values in by.items():
        texts = np.asarray(pd.Series(values).fillna("").astype(str))
        for text in np.unique(texts[texts != ""]):
            members = texts == text
            note = _too_small(labels[members], groups[members], classes, len(np.unique(labels)), minimum)
            interval = (float("nan"),) * 3
            if not note:
                interval = with_interval(statistic, labels[members], predictions[members], groups[members], seed)
            counts = len(np.unique(groups[members])), int(members.sum())
            rows.append(dict(zip(COLUMNS, (column, str(text), *counts, *interval, note), strict=True)))
    return pd.DataFrame(rows, columns=COLUMNS)


def calibration_curve(
    labels: NDArray[Any], probabilities: NDArray[Any], groups: NDArray[Any], bins: int = 10
) -> pd.DataFrame:
    """Return the calibration of a binary task's probabilities in up to ``bins`` bins with equally many scans.

    Probabilities are calibrated if about 80 % of the scans with a probability near 0.8 are positive, and so on.

    Args:
        labels: (N,) 0 or 1.
        probabilities: (N,) of the positive class.
        groups: (N,) participant of each scan.
        bins: number of bins; equal probabilities are never split, so there may be fewer.

    Returns:
        A row per bin: predicted (mean probability), observed (share of positives), low and high (Wilson's 95 % interval for
        the number of participants, so repeated scans do not narrow it) and scans.
    """
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, bins + 1)))
    bin_of = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, max(0, len(edges) - 2))
    rows = []
    for number in np.unique(bin_of):
        members = bin_of == number
        observed = float(labels[members].mean())
        low, high = wilson(observed, len(np.unique(groups[members])))
        rows.append((float(probabilities[members].mean()), observed, low, high, int(members.sum())))
    return pd.DataFrame(rows, columns=["predicted", "observed", "low", "high", "scans"])


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (J. Am. Stat. Assoc. 22, 1927) of a share observed among ``count`` participants."""
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return centre - half, centre + half


def _too_small(labels: NDArray[Any], groups: NDArray[Any], classes: bool, expected: int, minimum: int) -> str:
    """Return why a group is too small for a metric; empty if it is not."""
    if len(np.unique(groups)) < minimum:
        return f"fewer than {minimum} participants"
    if classes:
        counts = [len(np.unique(groups[labels == code])) for code in np.unique(labels)]
        if len(counts) < 2:
            return "one class only"
        enough = min(counts) >= MINIMUM_OF_A_CLASS if expected == 2 else sorted(counts)[-2] >= MINIMUM_OF_A_CLASS
        if not enough:
            return f"a class with fewer than {MINIMUM_OF_A_CLASS} participants"
    return ""
