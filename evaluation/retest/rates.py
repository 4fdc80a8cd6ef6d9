"""Errors of repeated predictions, identification of people, and prediction of the scanner; with intervals over people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.retest.design import Block, Codes
from evaluation.statistics.intervals import LEVEL

Floats = NDArray[np.float64]
FOLDS, INNER_FOLDS = 5, 3
PENALTIES = tuple(10.0**power for power in range(-3, 3))  # times the mean squared length of a scan's features


class Estimate(NamedTuple):
    """A value with the limits of its 95 % interval over people."""

    value: float
    low: float
    high: float


def retest_errors(values: Floats, blocks: Sequence[Block]) -> dict[str, Estimate]:
    """Return how much a prediction changes between scans of one person, in its own unit.

    ``sd``: the within-person standard deviation (the typical error): the root of the mean variance of a person's measurements.
    ``difference``: the mean absolute difference between two scans of a person. Both are means over people and blocks. The
    interval leaves out each person in turn, on the logarithmic scale, with a t distribution; its limits are NaN if one
    person alone has all of the change.

    Args:
        values: (N,) prediction of each scan, minus the true value if that changes between the scans.
        blocks: of people who all have the same measurements.
    """
    people = np.unique(np.concatenate([block.people for block in blocks]))
    variances, differences, counts = (np.zeros(len(people)) for _ in range(3))
    for block in blocks:
        measured, places = values[block.scans], np.searchsorted(people, block.people)
        first, second = np.triu_indices(measured.shape[1], 1)
        variances[places] += measured.var(1, ddof=1)
        differences[places] += np.abs(measured[:, first] - measured[:, second]).mean(1)
        counts[places] += 1
    return {
        "sd": _positive(variances, counts, power=0.5),
        "difference": _positive(differences, counts, power=1.0),
    }


def _positive(sums: Floats, counts: Floats, power: float) -> Estimate:
    """Return (sum of sums / sum of counts) ** power with its interval; sums and counts (n,) are of people."""
    people = len(sums)
    value = float(sums.sum() / counts.sum()) ** power
    left_out = np.maximum((sums.sum() - sums) / (counts.sum() - counts), 0.0) ** power
    if value <= 0:
        return Estimate(value, value, value)
    if left_out.min() <= 0:  # all of the change is one person's, which says nothing about other people
        return Estimate(value, np.nan, np.nan)
    logs = np.log(left_out)
    error = float(np.sqrt((people - 1) / people * ((logs - logs.mean()) ** 2).sum()))
    half = float(stats.t.ppf((1 + LEVEL) / 2, people - 1)) * error
    return Estimate(value, value * float(np.exp(-half)), value * float(np.exp(half)))


def proportion(hits: Floats, people: Codes) -> Estimate:
    """Return the mean of hits (N,), each 0 to 1, with Wilson's interval for the effective number of independent scans.

    That number is p (1 - p) / V with the variance V of the mean over people (Franco, Little, Louis and Slud, Journal of Survey
    Statistics and Methodology 7, 2019); at 0 and 1, where V is 0, it is the number of people.
    """
    _, codes = np.unique(people, return_inverse=True)
    count = int(codes.max()) + 1
    value = float(hits.mean())
    residuals = np.bincount(codes, hits - value)
    variance = count / max(count - 1, 1) * float((residuals**2).sum()) / len(hits) ** 2
    effective = min(value * (1 - value) / variance, float(len(hits))) if variance > 0 else float(count)
    z = float(stats.t.ppf((1 + LEVEL) / 2, max(count - 1, 1)))
    centre = (value + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(value * (1 - value) / effective + z**2 / (4 * effective**2))
    return Estimate(value, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def identify(features: NDArray[np.floating], people: Codes, scanners: Codes) -> tuple[Floats, Floats]:
    """Return whether each scan's nearest scan from another scanner is of the same person, and the chance of that, both (N,).

    Distances are Euclidean. If nobody has scans of two scanners, the nearest of all other scans is taken. A scan without
    another of its person among the candidates has NaN. Of several nearest scans, the share of the person's own counts.

    Args:
        features: (N, F), each with variance 1.
        people: (N,) codes.
        scanners: (N,) codes.
    """
    own = people[:, None] == people[None, :]
    candidates = scanners[:, None] != scanners[None, :]
    if not (own & candidates).any():
        candidates = ~np.eye(len(people), dtype=bool)
    squares = np.einsum("nf,nf->n", features, features, dtype=np.float64)
    distances = squares[:, None] + squares[None, :] - 2.0 * (features @ features.T).astype(np.float64)
    distances = np.where(candidates, distances, np.inf)
    nearest = candidates & (distances <= distances.min(1, keepdims=True))
    possible = (own & candidates).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        hits = (nearest & own).sum(1) / nearest.sum(1)
        chance = possible / candidates.sum(1)
    return np.where(possible > 0, hits, np.nan), np.where(possible > 0, chance, np.nan)


def predict_scanners(features: NDArray[np.floating], people: Codes, scanners: Codes) -> Codes:
    """Return the scanner (N,) that a linear classifier predicts for each scan from those of other people.

    A ridge regression on the scanners' indicator columns, in folds of whole people; its penalty is chosen on inner folds.

    Args:
        features: (N, F), each with variance 1.
        people: (N,) codes.
        scanners: (N,) codes.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GridSearchCV, GroupKFold

    predicted = np.empty_like(scanners)
    size = float(np.square(features).sum()) / len(features)  # the number of features, if each has variance 1
    grid = {"alpha": [penalty * size for penalty in PENALTIES]}
    outer = GroupKFold(min(FOLDS, len(np.unique(people))))
    for train, test in outer.split(features, scanners, people):
        inner = GroupKFold(min(INNER_FOLDS, len(np.unique(people[train]))))
        search = GridSearchCV(RidgeClassifier(), grid, cv=inner, scoring="balanced_accuracy")
        search.fit(features[train], scanners[train], groups=people[train])
        predicted[test] = search.predict(features[test])
    return predicted
