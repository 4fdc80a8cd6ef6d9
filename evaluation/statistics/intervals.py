"""95 % intervals. Participants, not scans, are what is drawn: one person's scans go together.

Two kinds of chance are told apart. ``with_interval`` answers "had we tested other participants": a bootstrap over the
participants of the test scans, the trained probes fixed. ``corrected_interval`` answers "had we trained and tested on
other splits": the spread over repeated splits, corrected for their overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, overload

import numpy as np
from scipy import stats

from infra import random_streams

Array = np.ndarray[Any, np.dtype[Any]]
RESAMPLES = 2000
LEVEL = 0.95
CELLS = 4_000_000  # weights held at a time: 32 MB


class Statistic(Protocol):
    """A figure of merit: a float, or with weights (R, N) an array (R,) of the figure under each row of weights."""

    @overload
    def __call__(self, labels: Array, answers: Array) -> float: ...

    @overload
    def __call__(self, labels: Array, answers: Array, weights: Array) -> Array: ...


def with_interval(
    statistic: Statistic, labels: Array, answers: Array, groups: Array, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The statistic and its 95 % BCa interval by a bootstrap over participants.

    labels (N,), answers (N,) or (N, K), groups (N,) participant of each scan. The same groups and seed give the same
    samples, so that intervals of several checkpoints come from the same draws.
    """
    return bca(lambda weights: statistic(labels, answers, weights), groups, seed=seed, resamples=resamples)


def bca(
    of_weights: Callable[[Array], Array], groups: Array, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float, float]:
    """Value, low and high of a function of scan weights (R, N) -> (R,), by a bootstrap over the participants.

    Bias-corrected and accelerated (Efron 1987, J. Am. Stat. Assoc. 82): the bias from the share of samples below the
    value, the acceleration from a jackknife that leaves out one participant at a time. Samples in which the statistic
    does not exist (one class only) are left out.
    """
    codes = participant_codes(groups)
    value = float(of_weights(np.ones((1, len(codes))))[0])
    drawn = _gather(of_weights, bootstrap_weights(codes, resamples, seed))
    left_out = _gather(of_weights, jackknife_weights(codes))
    return value, *bca_limits(value, drawn, left_out, level)


def bca_limits(value: float, drawn: Array, left_out: Array, level: float = LEVEL) -> tuple[float, float]:
    """The limits from a statistic's value, its bootstrap values (R,) and its jackknife values (participants,)."""
    drawn, left_out = drawn[np.isfinite(drawn)], left_out[np.isfinite(left_out)]
    if not len(drawn) or not np.isfinite(value):
        return float("nan"), float("nan")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    # Equal values count half, as scipy does: with few distinct values the bias would otherwise be overstated.
    bias = stats.norm.ppf(((drawn < value).mean() + (drawn <= value).mean()) / 2)
    if np.isfinite(bias):
        off = left_out.mean() - left_out if len(left_out) else np.zeros(1)
        spread = float((off**2).sum()) ** 1.5
        acceleration = float((off**3).sum()) / (6 * spread) if spread else 0.0
        shifted = bias + stats.norm.ppf(tails)
        tails = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(drawn, tails)
    return float(low), float(high)


def corrected_interval(
    values: Array, n_train: int, n_test: int, level: float = LEVEL
) -> tuple[float, float, float, float]:
    """Mean over repeated splits of a figure, its interval, and the p of its being 0 (for differences of figures).

    ``values`` (J,): the figure of each of J random splits into ``n_train`` and ``n_test`` participants. The splits share
    scans, so s²/J is too small a variance; Nadeau and Bengio's (1/J + n_test / n_train) s² takes its place, with a
    t distribution of J - 1 degrees of freedom (Machine Learning 52, 2003, Eq. 9). NaN limits where J < 2.

    It presumes that each split draws its test participants anew. Where the test set is fixed, s² holds no chance of that
    set, and the interval is of the mean over training sets for these very test participants.
    """
    values = np.asarray(values, float)
    if n_train < 1 or n_test < 1:
        raise ValueError(f"n_train={n_train}, n_test={n_test}: both must be at least 1")
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan"), float("nan")
    error = float(np.sqrt((1 / count + n_test / n_train) * values.var(ddof=1)))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    chance = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return mean, mean - half, mean + half, chance


def participant_codes(groups: Array) -> Array:
    """(N,) int codes from 0 of the participant of each scan."""
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)


def bootstrap_weights(codes: Array, count: int = RESAMPLES, seed: int = 0) -> Iterator[Array]:
    """``count`` rows of how often each scan is in a sample of participants with replacement, in blocks (r, N).

    The same codes and seed give the same rows, whatever the size of the blocks.
    """
    people = int(codes.max()) + 1
    generator = random_streams.generator(seed, random_streams.BOOTSTRAP)
    block = max(1, CELLS // len(codes))
    for start in range(0, count, block):
        rows = min(block, count - start)
        drawn = generator.integers(0, people, size=(rows, people)) + people * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * people).reshape(rows, people)
        yield times[:, codes].astype(float)


def jackknife_weights(codes: Array) -> Iterator[Array]:
    """For each participant a row of weights that leaves that one out, in blocks (r, N)."""
    people = int(codes.max()) + 1
    block = max(1, CELLS // len(codes))
    for start in range(0, people, block):
        yield (codes[None, :] != np.arange(start, min(start + block, people))[:, None]).astype(float)


def _gather(of_weights: Callable[[Array], Array], blocks: Iterator[Array]) -> Array:
    return np.concatenate([np.asarray(of_weights(block)) for block in blocks])
