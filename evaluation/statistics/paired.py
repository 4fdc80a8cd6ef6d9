"""Is A better than B? Two checkpoints on the same scans: DeLong's test, a paired bootstrap, and Holm's correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from evaluation.statistics.intervals import (
    RESAMPLES,
    Array,
    Statistic,
    bca_limits,
    bootstrap_weights,
    jackknife_weights,
    participant_codes,
)
from infra import random_streams


@dataclass(frozen=True)
class Difference:
    """A figure of a first checkpoint less that of a second, on the same scans."""

    value: float
    low: float
    high: float
    p: float  # two-sided, of no difference


def paired_difference(
    statistic: Statistic, labels: Array, first: Array, second: Array, groups: Array, seed: int = 0
) -> tuple[float, float, float]:
    """``statistic(first) - statistic(second)`` with its 95 % BCa interval; see ``paired_bootstrap``."""
    found = paired_bootstrap(statistic, labels, first, second, groups, seed)
    return found.value, found.low, found.high


def paired_bootstrap(
    statistic: Statistic,
    labels: Array,
    first: Array,
    second: Array,
    groups: Array,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """``statistic(first) - statistic(second)``: both are taken on the same samples of participants.

    The interval is BCa. p is twice the smaller share of samples on either side of 0, counting the data themselves as one
    more sample, so it is never below 2 / (resamples + 1).
    """
    codes = participant_codes(groups)

    def gap(weights: Array) -> Array:
        return statistic(labels, first, weights) - statistic(labels, second, weights)

    value = float(gap(np.ones((1, len(codes))))[0])
    drawn = np.concatenate([gap(block) for block in bootstrap_weights(codes, resamples, seed)])
    left_out = np.concatenate([gap(block) for block in jackknife_weights(codes)])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Difference(value, float("nan"), float("nan"), float("nan"))
    smaller = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (smaller + 1) / (len(drawn) + 1))
    return Difference(value, *bca_limits(value, drawn, left_out), p)


def delong(labels: Array, answers: Array, groups: Array | None = None) -> tuple[Array, Array]:
    """AUC (K,) of K checkpoints' answers (K, N) on the same scans, and the covariance (K, K) of these AUCs.

    DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), from midranks in O(N log N) as in Sun and Xu (IEEE Signal
    Processing Letters 21, 2014). With ``groups`` (N,) a participant's scans are summed before they are squared, which is
    Obuchowski's form for clustered data (Biometrics 53, 1997); with one scan a participant it is DeLong's own.
    """
    labels, answers = np.asarray(labels), np.atleast_2d(np.asarray(answers, float))
    positive, negative = labels == 1, labels != 1
    m, n = int(positive.sum()), int(negative.sum())
    if not m or not n:
        raise ValueError(f"{m} positive and {n} negative scans: an AUC needs both")
    together = stats.rankdata(answers, axis=1)
    # The share of negatives below each positive, and of positives above each negative.
    of_positive = (together[:, positive] - stats.rankdata(answers[:, positive], axis=1)) / n
    of_negative = 1 - (together[:, negative] - stats.rankdata(answers[:, negative], axis=1)) / m
    areas = of_positive.mean(1)
    codes = np.arange(len(labels)) if groups is None else participant_codes(groups)
    up = _sums(of_positive - areas[:, None], codes[positive], int(codes.max()) + 1)
    down = _sums(of_negative - areas[:, None], codes[negative], int(codes.max()) + 1)
    with_positive, with_negative, people = (len(np.unique(part)) for part in (codes[positive], codes[negative], codes))
    if min(with_positive, with_negative) < 2:
        return areas, np.full((len(areas), len(areas)), np.nan)
    covariance = (
        with_positive / (with_positive - 1) * (up @ up.T) / m**2
        + with_negative / (with_negative - 1) * (down @ down.T) / n**2
        + people / (people - 1) * (up @ down.T + down @ up.T) / (m * n)
    )
    return areas, covariance


def delong_difference(
    labels: Array, first: Array, second: Array, groups: Array | None = None, level: float = 0.95
) -> Difference:
    """Difference of two AUCs on the same scans, its normal interval and the p of DeLong's test."""
    areas, covariance = delong(labels, np.stack([first, second]), groups)
    value = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if not variance > 1e-15:  # the same ranking: there is nothing that could differ
        return Difference(value, value, value, 1.0 if value == 0 else float("nan"))
    error = float(np.sqrt(variance))
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    return Difference(value, value - half, value + half, float(2 * stats.norm.sf(abs(value) / error)))


def holm(p: Array) -> Array:
    """Holm's step-down adjusted p values (M,): each may be read at the 5 % level though M tests were made.

    The i-th smallest is multiplied by M - i + 1, and none may be below a smaller one's (Scand. J. Stat. 6, 1979). NaN
    marks a test that was not made; it stays NaN and is not counted.
    """
    p = np.asarray(p, float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")[: int((~np.isnan(p)).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def permutation_p(
    statistic: Statistic,
    labels: Array,
    answers: Array,
    groups: Array,
    *,
    higher_is_better: bool = True,
    count: int = 1000,
    seed: int = 0,
) -> float:
    """One-sided p of a figure under "the answers know nothing of the labels".

    Labels are dealt anew among participants, never among scans: a person's scans get another person's labels in their
    order (of a person with fewer scans, from the first again). p = (1 + dealings at least as good) / (1 + count), never 0
    (Phipson and Smyth 2010). The answers stay as they are: this tests these predictions and repeats no training.
    """
    codes = participant_codes(groups)
    order = np.argsort(codes, kind="stable")
    scans = np.bincount(codes)
    starts = np.cumsum(scans) - scans
    number = np.empty(len(codes), np.int64)  # which of its participant's scans each one is
    number[order] = np.arange(len(codes)) - starts[codes[order]]
    generator = random_streams.generator(seed, random_streams.PERMUTATION)
    sign = 1.0 if higher_is_better else -1.0
    observed, reached = sign * statistic(labels, answers), 0
    if not np.isfinite(observed):
        return float("nan")
    for _ in range(count):
        donor = generator.permutation(len(scans))[codes]
        found = sign * statistic(labels[order[starts[donor] + number % scans[donor]]], answers)
        reached += bool(not np.isfinite(found) or found >= observed - 1e-12)
    return (1 + reached) / (1 + count)


def _sums(values: Array, codes: Array, people: int) -> Array:
    """(K, people) sums over each participant's scans of values (K, n)."""
    return np.stack([np.bincount(codes, weights=row, minlength=people) for row in values])
