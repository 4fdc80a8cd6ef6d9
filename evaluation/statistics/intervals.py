"""95 % confidence intervals. Participants are resampled, not scans: all scans of a participant stay together.

Two sources of chance are kept apart. ``with_interval`` describes the choice of test participants: it resamples the
participants of the test scans while the trained models stay fixed. ``corrected_interval`` describes the choice of the
split: it is the spread over repeated splits, corrected for their overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from infra import random_streams

RESAMPLES = 2000
LEVEL = 0.95
UNBOUNDED = (-np.inf, np.inf)
WIDEST = 3.0  # half width of an interval on the scale of its bounds: 20 times the distance from the bound, or its odds
MOST_WEIGHTS = 4_000_000  # held in memory at a time: 32 MB


class Statistic(Protocol):
    """A metric: labels (N,) and predictions -> a float; with weights (R, N) -> an array (R,), one value per row."""

    @overload
    def __call__(self, labels: NDArray[Any], predictions: NDArray[Any]) -> float: ...

    @overload
    def __call__(self, labels: NDArray[Any], predictions: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]: ...


def with_interval(
    statistic: Statistic,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    groups: NDArray[Any],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """Return a statistic with its 95 % BCa interval from a bootstrap over participants: value, low, high.

    Args:
        statistic: for example ``metrics.auc``.
        labels: (N,).
        predictions: (N,) or (N, K).
        groups: (N,) participant of each scan. Equal groups and seeds give equal resamples, so the intervals of several
            checkpoints are based on the same resamples.
        seed: of the bootstrap.
        resamples: number of bootstrap samples.
    """
    return bca(lambda weights: statistic(labels, predictions, weights), groups, seed=seed, resamples=resamples)


def bca(
    of_weights: Callable[[NDArray[Any]], NDArray[Any]],
    groups: NDArray[Any],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Return value, low and high of a function of scan weights (R, N) -> (R,), from a bootstrap over participants.

    The interval is bias-corrected and accelerated (Efron, J. Am. Stat. Assoc. 82, 1987): the bias comes from the share of
    resamples below the value, the acceleration from a jackknife over participants. Resamples for which the statistic is
    undefined (a single class) are left out.
    """
    codes = participant_codes(groups)
    value = float(of_weights(np.ones((1, len(codes))))[0])
    resampled = _apply_to_blocks(of_weights, bootstrap_weights(codes, resamples, seed))
    jackknife = _apply_to_blocks(of_weights, jackknife_weights(codes))
    return value, *bca_limits(value, resampled, jackknife, level)


def bca_limits(
    value: float, resampled: NDArray[Any], jackknife: NDArray[Any], level: float = LEVEL
) -> tuple[float, float]:
    """Return the BCa limits of a statistic from its bootstrap values (R,) and its jackknife values (participants,).

    Both limits are NaN if the value is not finite or no resample is.
    """
    resampled, jackknife = resampled[np.isfinite(resampled)], jackknife[np.isfinite(jackknife)]
    if not len(resampled) or not np.isfinite(value):
        return float("nan"), float("nan")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    # Ties count half, as in scipy; otherwise the bias is overestimated if there are few distinct values.
    bias = stats.norm.ppf(((resampled < value).mean() + (resampled <= value).mean()) / 2)
    if np.isfinite(bias):
        influence = jackknife.mean() - jackknife if len(jackknife) else np.zeros(1)
        spread = float((influence**2).sum()) ** 1.5
        acceleration = float((influence**3).sum()) / (6 * spread) if spread else 0.0
        shifted = bias + stats.norm.ppf(tails)
        tails = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(resampled, tails)
    return float(low), float(high)


def limits_in_range(value: float, half: float, bounds: tuple[float, float] = UNBOUNDED) -> tuple[float, float]:
    """Return the limits of an interval of half the width ``half`` around ``value`` that stay inside ``bounds``.

    Between two bounds a and b the interval is symmetric on the logit scale, log((v - a) / (b - v)); with one bound, on the
    logarithm of the distance from it. Its half width there is ``half`` times the derivative (the delta method; for the AUC see
    Pepe, The Statistical Evaluation of Medical Tests, 2003, Section 5.2; on (-1, 1) it is Fisher's z). The derivative says
    little about an interval whose half width is above WIDEST on the scale: its limits are no farther from the value than
    ``half``, or than those of the half width WIDEST if these are farther. A value at a bound has the plain limits, cut off at
    the bounds.
    """
    low, high = bounds
    if np.isnan(value) or np.isnan(half):
        return float("nan"), float("nan")
    if not low < value < high or np.isinf(half) or not (np.isfinite(low) or np.isfinite(high)):
        return float(np.clip(value - half, low, high)), float(np.clip(value + half, low, high))
    reach = half * (1 / (value - low) + 1 / (high - value))  # on the scale; a bound that is infinite adds nothing
    lower, upper = _at_reach(value, -reach, bounds), _at_reach(value, reach, bounds)
    if reach > WIDEST:
        lower = max(lower, min(value - half, _at_reach(value, -WIDEST, bounds)))
        upper = min(upper, max(value + half, _at_reach(value, WIDEST, bounds)))
    return lower, upper


def _at_reach(value: float, reach: float, bounds: tuple[float, float]) -> float:
    """The point whose distance from ``value`` is ``reach`` on the scale of the bounds, one of which is finite at least."""
    low, high = bounds
    if np.isinf(high):
        return low + (value - low) * float(np.exp(min(reach, 700.0)))
    if np.isinf(low):
        return high - (high - value) * float(np.exp(min(-reach, 700.0)))
    share = (value - low) / (high - low)
    return float(low + (high - low) * special.expit(special.logit(share) + reach))


def corrected_interval(
    values: NDArray[Any], n_train: int, n_test: int, level: float = LEVEL, bounds: tuple[float, float] = UNBOUNDED
) -> tuple[float, float, float, float]:
    """Return mean, low, high and the p value of a zero mean for a metric (or a difference of metrics) over random splits.

    The splits share scans, so s²/J underestimates the variance of the mean. It is replaced by (1/J + n_test / n_train) s²
    with a t distribution of J - 1 degrees of freedom (Nadeau and Bengio, Machine Learning 52, 2003, Eq. 9).

    The correction assumes that each split draws its test participants anew. With a fixed test set, s² does not contain the
    chance of choosing that set, and the interval describes the mean over training sets for these test participants.

    Args:
        values: (J,) the metric of each of J splits; with J < 2 low, high and p are NaN.
        n_train: number of training participants of each split.
        n_test: number of test participants of each split.
        level: of the interval.
        bounds: of the metric; the interval stays inside (``limits_in_range``).

    Raises:
        ValueError: if ``n_train`` or ``n_test`` is below 1.
    """
    values = np.asarray(values, float)
    if n_train < 1 or n_test < 1:
        raise ValueError(f"n_train={n_train}, n_test={n_test}: both must be at least 1")
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan"), float("nan")
    error = float(np.sqrt((1 / count + n_test / n_train) * values.var(ddof=1)))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return (mean, *limits_in_range(mean, half, bounds), p)


def participant_codes(groups: NDArray[Any]) -> NDArray[np.int64]:
    """Return integer codes (N,), from 0, of the participant of each scan."""
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)


def bootstrap_weights(codes: NDArray[Any], count: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield blocks (r, N) of how often each scan is in a sample of participants with replacement, ``count`` rows in all.

    Equal codes and seeds give equal rows for every size of the blocks.
    """
    participants = int(codes.max()) + 1
    generator = random_streams.generator(seed, random_streams.BOOTSTRAP)
    block = max(1, MOST_WEIGHTS // len(codes))
    for start in range(0, count, block):
        rows = min(block, count - start)
        drawn = generator.integers(0, participants, size=(rows, participants)) + participants * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * participants).reshape(rows, participants)
        yield times[:, codes].astype(float)


def jackknife_weights(codes: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Yield blocks (r, N) of leave-one-participant-out weights, one row per left-out participant."""
    participants = int(codes.max()) + 1
    block = max(1, MOST_WEIGHTS // len(codes))
    for start in range(0, participants, block):
        yield (codes[None, :] != np.arange(start, min(start + block, participants))[:, None]).astype(float)


def _apply_to_blocks(
    of_weights: Callable[[NDArray[Any]], NDArray[Any]], blocks: Iterator[NDArray[Any]]
) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(of_weights(block)) for block in blocks])
