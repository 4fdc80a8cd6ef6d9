"""The same figure among women, men, age bands and sites, and how far a probability can be taken at its word."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.statistics.intervals import Array, Statistic, with_interval

BANDS = (0.0, 20.0, 40.0, 60.0, 80.0, 120.0)  # years; fixed, so that bands mean the same in every cohort
MINIMUM = 20  # participants; below, an interval says more about luck than about the group
MINIMUM_OF_A_CLASS = 5
COLUMNS = ["by", "group", "participants", "scans", "value", "low", "high", "note"]


def age_bands(ages: Array) -> Array:
    """(N,) texts such as ``40-59``; empty where an age is missing or beyond the bands."""
    names = np.array(["", *(f"{low:.0f}-{high - 1:.0f}" for low, high in pairwise(BANDS)), ""])
    ages = np.asarray(ages, float)
    return np.asarray(names[np.where(np.isfinite(ages), np.digitize(np.nan_to_num(ages), BANDS), 0)])


def subgroup_table(
    statistic: Statistic,
    labels: Array,
    answers: Array,
    groups: Array,
    by: dict[str, Array],
    *,
    classes: bool,
    minimum: int = MINIMUM,
    seed: int = 0,
) -> pd.DataFrame:
    """A row per subgroup: by, group, participants, scans, value, low, high, note (95 % BCa over its participants).

    ``by``: columns (N,) of texts, as in {"sex": …, "age": age_bands(…), "site": …}; empty texts are in no group.
    ``classes``: whether labels are classes, of which each must then have MINIMUM_OF_A_CLASS participants. A group that
    is too small keeps its row and counts, with NaN for figures and the reason in ``note``: nobody has to wonder whether
    it was left out because it looked bad.
    """
    rows = []
    for column, values in by.items():
        texts = np.asarray(pd.Series(values).fillna("").astype(str))
        for text in np.unique(texts[texts != ""]):
            mine = texts == text
            note = _too_small(labels[mine], groups[mine], classes, len(np.unique(labels)), minimum)
            found = (float("nan"),) * 3
            if not note:
                found = with_interval(statistic, labels[mine], answers[mine], groups[mine], seed)
            counts = len(np.unique(groups[mine])), int(mine.sum())
            rows.append(dict(zip(COLUMNS, (column, str(text), *counts, *found, note), strict=True)))
    return pd.DataFrame(rows, columns=COLUMNS)


def calibration_curve(labels: Array, probabilities: Array, groups: Array, bins: int = 10) -> pd.DataFrame:
    """predicted, observed, low, high, scans of up to ``bins`` equally full bins of a binary task's probabilities.

    A probability is calibrated where, of the scans given about 0.8, about 80 % are positive. low and high are Wilson's
    95 % interval for the participants of the bin, so that a person scanned often does not make it narrower.
    """
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, bins + 1)))
    place = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, max(0, len(edges) - 2))
    rows = []
    for number in np.unique(place):
        mine = place == number
        people = len(np.unique(groups[mine]))
        observed = float(labels[mine].mean())
        low, high = wilson(observed, people)
        rows.append((float(probabilities[mine].mean()), observed, low, high, int(mine.sum())))
    return pd.DataFrame(rows, columns=["predicted", "observed", "low", "high", "scans"])


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927) for a share among ``count`` people."""
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return centre - half, centre + half


def _too_small(labels: Array, groups: Array, classes: bool, expected: int, minimum: int) -> str:
    """Why a figure of this group would mean nothing; empty where it does."""
    people = len(np.unique(groups))
    if people < minimum:
        return f"fewer than {minimum} participants"
    if classes:
        each = [len(np.unique(groups[labels == code])) for code in np.unique(labels)]
        if len(each) < 2:
            return "one class only"
        enough = min(each) >= MINIMUM_OF_A_CLASS if expected == 2 else sorted(each)[-2] >= MINIMUM_OF_A_CLASS
        if not enough:
            return f"a class with fewer than {MINIMUM_OF_A_CLASS} participants"
    return ""
