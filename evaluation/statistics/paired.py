"""Paired comparison of two checkpoints on the same scans: DeLong's test, a paired bootstrap, Holm's correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.statistics.intervals import (
    RESAMPLES,
    Statistic,
    bca_limits,
    bootstrap_weights,
    jackknife_weights,
    participant_codes,
)
from infra import random_streams


@dataclass(frozen=True)
class Difference:
    """The metric of a first checkpoint minus that of a second, on the same scans, with a 95 % interval."""

    value: float
    low: float
    high: float
    p: float  # two-sided p value of no difference


def paired_difference(
    statistic: Statistic,
    labels: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    groups: NDArray[Any],
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return ``statistic(first) - statistic(second)`` with its 95 % BCa interval; see ``paired_bootstrap``."""
    difference = paired_bootstrap(statistic, labels, first, second, groups, seed)
    return difference.value, difference.low, difference.high


def paired_bootstrap(
    statistic: Statistic,
    labels: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    groups: NDArray[Any],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Return ``statistic(first) - statistic(second)``, both computed on the same resamples of participants.

    The interval is BCa. p is twice the smaller share of resamples on either side of 0, where the data themselves count as
    one more resample, so it is never below 2 / (resamples + 1).

    Args:
        statistic: for example ``metrics.auc``.
        labels: (N,).
        first: predictions of the first checkpoint, (N,) or (N, K).
        second: predictions of the second.
        groups: (N,) participant of each scan.
        seed: of the bootstrap.
        resamples: number of bootstrap samples.
    """
    codes = participant_codes(groups)

    def difference(weights: NDArray[Any]) -> NDArray[Any]:
        """Return the difference (R,) under weights (R, N)."""
        return np.asarray(statistic(labels, first, weights) - statistic(labels, second, weights))

    value = float(difference(np.ones((1, len(codes))))[0])
    resampled = np.concatenate([difference(block) for block in bootstrap_weights(codes, resamples, seed)])
    jackknife = np.concatenate([difference(block) for block in jackknife_weights(codes)])
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Difference(value, float("nan"), float("nan"), float("nan"))
    smaller = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (smaller + 1) / (len(resampled) + 1))
    return Difference(value, *bca_limits(value, resampled, jackknife), p)


def delong(
    labels: NDArray[Any], predictions: NDArray[Any], groups: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the AUCs (K,) of K checkpoints on the same scans, and the covariance (K, K) of these AUCs.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), computed from midranks in O(N log N) as in Sun and Xu,
    IEEE Signal Processing Letters 21 (2014). With ``groups`` the contributions of a participant's scans are summed before
    they are squared: Obuchowski's form for clustered data, Biometrics 53 (1997). With one scan per participant both agree.

    Args:
        labels: (N,) 0 or 1.
        predictions: (K, N) scores.
        groups: (N,) participant of each scan; None: every scan is a participant.

    Returns:
        The AUCs and their covariance, which is NaN if either class has fewer than two participants.

    Raises:
        ValueError: if a class has no scans.
    """
    labels, predictions = np.asarray(labels), np.atleast_2d(np.asarray(predictions, float))
    positive, negative = labels == 1, labels != 1
    m, n = int(positive.sum()), int(negative.sum())
    if not m or not n:
        raise ValueError(f"{m} positive and {n} negative scans: an AUC needs scans of both classes")
    ranks = stats.rankdata(predictions, axis=1)
    # Share of negatives below each positive, and of positives above each negative.
    of_positive = (ranks[:, positive] - stats.rankdata(predictions[:, positive], axis=1)) / n
    of_negative = 1 - (ranks[:, negative] - stats.rankdata(predictions[:, negative], axis=1)) / m
    areas = of_positive.mean(1)
    codes = np.arange(len(labels)) if groups is None else participant_codes(groups)
    up = _sums(of_positive - areas[:, None], codes[positive], int(codes.max()) + 1)
    down = _sums(of_negative - areas[:, None], codes[negative], int(codes.max()) + 1)
    with_positive, with_negative, participants = (
        len(np.unique(members)) for members in (codes[positive], codes[negative], codes)
    )
    if min(with_positive, with_negative) < 2:
        return areas, np.full((len(areas), len(areas)), np.nan)
    covariance = (
        with_positive / (with_positive - 1) * (up @ up.T) / m**2
        + with_negative / (with_negative - 1) * (down @ down.T) / n**2
        + participants / (participants - 1) * (up @ down.T + down @ up.T) / (m * n)
    )
    return areas, covariance


def delong_difference(
    labels: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
    groups: NDArray[Any] | None = None,
    level: float = 0.95,
) -> Difference:
    """Return the difference of two AUCs on the same scans, its normal interval and the p value of DeLong's test.

    Args:
        labels: (N,), 1 for the positive class, else 0.
        first: scores (N,) of the first model.
        second: scores (N,) of the second model.
        groups: (N,) participant of each scan; None: every scan is a participant.
        level: coverage of the interval.

    Raises:
        ValueError: if a class has no scans.
    """
    areas, covariance = delong(labels, np.stack([first, second]), groups)
    value = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if not variance > 1e-15:  # equal rankings
        return Difference(value, value, value, 1.0 if value == 0 else float("nan"))
    error = float(np.sqrt(variance))
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    return Difference(value, value - half, value + half, float(2 * stats.norm.sf(abs(value) / error)))


def holm(p: NDArray[Any]) -> NDArray[Any]:
    """Return Holm's step-down adjusted p values (M,), which control the family-wise error rate of M tests.

    The i-th smallest p value is multiplied by M - i + 1 and raised to the largest adjusted value before it (Holm,
    Scand. J. Stat. 6, 1979). NaN marks a test that was not made; it stays NaN and does not count.
    """
    p = np.asarray(p, float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")[: int((~np.isnan(p)).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def permutation_p(
    statistic: Statistic,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    groups: NDArray[Any],
    *,
    higher_is_better: bool = True,
    count: int = 1000,
    seed: int = 0,
) -> float:
    """Return the one-sided p value of a metric under the null hypothesis that predictions and labels are independent.

    Labels are permuted among participants, not among scans: a participant's scans get the labels of another participant in
    their order, starting again from the first if that participant has fewer scans. The predictions stay fixed, so training
    is not repeated. p = (1 + permutations at least as good) / (1 + count) is never 0 (Phipson and Smyth, Stat. Appl. Genet.
    Mol. Biol. 9, 2010).

    Returns NaN if the metric itself is undefined.
    """
    codes = participant_codes(groups)
    order = np.argsort(codes, kind="stable")
    scans = np.bincount(codes)
    starts = np.cumsum(scans) - scans
    index = np.empty(len(codes), np.int64)  # of a scan among its participant's scans
    index[order] = np.arange(len(codes)) - starts[codes[order]]
    generator = random_streams.generator(seed, random_streams.PERMUTATION)
    sign = 1.0 if higher_is_better else -1.0
    observed, reached = sign * statistic(labels, predictions), 0
    if not np.isfinite(observed):
        return float("nan")
    for _ in range(count):
        donor = generator.permutation(len(scans))[codes]
        permuted = sign * statistic(labels[order[starts[donor] + index % scans[donor]]], predictions)
        reached += bool(not np.isfinite(permuted) or permuted >= observed - 1e-12)
    return (1 + reached) / (1 + count)


def _sums(values: NDArray[Any], codes: NDArray[Any], participants: int) -> NDArray[Any]:
    """Return the sums (K, participants) of values (K, n) over each participant's scans."""
    return np.stack([np.bincount(codes, weights=row, minlength=participants) for row in values])
