"""Intervals against scipy and by hand, and their coverage on simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import intervals
from evaluation.statistics.intervals import (
    bca_limits,
    bootstrap_weights,
    corrected_interval,
    jackknife_weights,
    limits_in_range,
    participant_codes,
    with_interval,
)
from evaluation.statistics.metrics import METRICS, PROBABILITY_METRICS, auc, mae, pearson


def test_bca_limits_equal_scipy_on_the_same_samples():
    data = np.random.default_rng(0).exponential(size=40)  # skewed data, for which bias and acceleration matter
    found = stats.bootstrap((data,), np.mean, method="BCa", n_resamples=999, rng=np.random.default_rng(1))
    left_out = np.array([np.delete(data, i).mean() for i in range(40)])
    limits = bca_limits(data.mean(), found.bootstrap_distribution, left_out)
    assert limits == pytest.approx(tuple(found.confidence_interval), abs=1e-12)
    assert limits != pytest.approx(tuple(np.quantile(found.bootstrap_distribution, [0.025, 0.975])), abs=1e-3)


def test_all_scans_of_a_participant_are_resampled_together(monkeypatch):
    codes = participant_codes(np.array(["c", "c", "c", "a", "a", "g"]))
    weights = np.concatenate(list(bootstrap_weights(codes, 300)))
    assert weights.shape == (300, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    people = weights[:, [0, 3, 5]]
    assert (people.sum(1) == 3).all()
    assert people.mean(0) == pytest.approx([1, 1, 1], abs=0.15)
    assert len(np.unique(people, axis=0)) == 10  # all multisets of 3 out of 3
    monkeypatch.setattr(intervals, "MOST_WEIGHTS", 60)
    assert np.array_equal(weights, np.concatenate(list(bootstrap_weights(codes, 300))))
    left = np.concatenate(list(jackknife_weights(codes)))
    assert left.tolist() == [[1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_treating_scans_as_participants_makes_intervals_too_narrow():
    generator = np.random.default_rng(1)
    person = np.repeat(np.arange(30), 4)
    labels = (person % 2).astype(int)
    answers = np.repeat(generator.normal(size=30), 4) + 0.8 * labels
    grouped = with_interval(auc, labels, answers, person)
    single = with_interval(auc, labels, answers, np.arange(120))
    assert grouped[0] == single[0]
    assert grouped[2] - grouped[1] > 1.4 * (single[2] - single[1])


def test_intervals_of_constant_and_undefined_metrics():
    labels = np.repeat([0, 1], 10)
    assert with_interval(auc, labels, labels.astype(float), np.arange(20)) == (1.0, 1.0, 1.0)
    assert all(np.isnan(with_interval(auc, np.ones(20), labels, np.arange(20))))
    assert with_interval(mae, labels, labels, np.arange(20)) == (0.0, 0.0, 0.0)


def test_corrected_interval_by_hand():
    # 3 splits of 80 / 20: mean 0.8, s² = 0.01; Nadeau and Bengio's variance is (1/3 + 20/80) 0.01.
    mean, low, high, p = corrected_interval(np.array([0.7, 0.8, 0.9]), 80, 20)
    error = np.sqrt((1 / 3 + 0.25) * 0.01)
    assert mean == pytest.approx(0.8)
    assert (high - low) / 2 == pytest.approx(4.302652729911275 * error)  # t of 2 degrees of freedom at 0.975
    assert (low + high) / 2 == pytest.approx(0.8)
    assert p == pytest.approx(2 * stats.t.sf(0.8 / error, 2))
    assert np.isnan(corrected_interval(np.array([0.7]), 80, 20)[1])
    assert corrected_interval(np.zeros(4), 80, 20)[1:] == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="n_train=0"):
        corrected_interval(np.ones(3), 0, 20)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, np.inf), (-np.inf, 1.0), (-np.inf, np.inf)])
def test_limits_stay_in_the_range_and_are_symmetric_on_its_scale(bounds):
    def scale(v):  # each scale by its definition
        low, high = bounds
        if np.isfinite(low) and np.isfinite(high):
            return np.log((v - low) / (high - v))
        return np.log(v - low) if np.isfinite(low) else -np.log(high - v) if np.isfinite(high) else v

    value, half, step = 0.7, 0.45, 1e-6
    low, high = limits_in_range(value, half, bounds)
    assert bounds[0] < low < value < high < bounds[1]
    slope = (scale(value + step) - scale(value - step)) / (2 * step)
    np.testing.assert_allclose([scale(low), scale(high)], scale(value) + np.array([-1, 1]) * half * slope, rtol=1e-6)
    narrow = limits_in_range(value, 1e-5, bounds)  # a narrow interval is the plain one
    np.testing.assert_allclose(narrow, [value - 1e-5, value + 1e-5], rtol=1e-8)
    assert limits_in_range(1.0, 0.2, (0.0, 1.0)) == (0.8, 1.0)
    assert np.isnan(limits_in_range(0.7, float("nan"), bounds)).all()


@pytest.mark.parametrize(
    ("value", "half", "bounds", "expected"),
    [
        (8.0, 900.0, (0.0, np.inf), (8 * np.exp(-900 / 8), 908.0)),
        # A half width of 3 on the scale reaches farther than the plain limit.
        (8.0, 30.0, (0.0, np.inf), (8 * np.exp(-30 / 8), 8 * np.exp(3))),
        (0.7, 9.0, (-np.inf, 1.0), (-8.3, 1 - 0.3 * np.exp(-9 / 0.3))),
        (0.98, 0.1, (0.0, 1.0), tuple(1 / (1 + np.exp(-(np.log(49) + reach))) for reach in (-3, 0.1 / (0.98 * 0.02)))),
        (1.2, 0.5, (0.0, 1.0), (0.7, 1.0)),
        (-1.0, 0.5, (0.0, np.inf), (0.0, 0.0)),
        (0.7, np.inf, (0.0, 1.0), (0.0, 1.0)),
        (8.0, 0.0, (0.0, np.inf), (8.0, 8.0)),
    ],
)
def test_wide_intervals_reach_no_farther_than_plain_ones_or_than_the_widest_on_the_scale(value, half, bounds, expected):
    assert limits_in_range(value, half, bounds) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, np.inf), (-np.inf, 1.0), (-np.inf, np.inf)])
@pytest.mark.parametrize("value", [0.02, 0.5, 0.7, 0.98])
def test_a_wider_interval_contains_the_narrower_one_without_a_jump(bounds, value):
    limits = np.array([limits_in_range(value, half, bounds) for half in np.linspace(0, 3, 3001)])
    steps = np.diff(limits, axis=0)
    assert (steps[:, 0] <= 1e-12).all()
    assert (steps[:, 1] >= -1e-12).all()
    assert np.abs(steps).max() < 0.0202  # exp(3) times the step of ``half``
    assert bounds[0] <= limits.min()
    assert limits.max() <= bounds[1]


@pytest.mark.parametrize("shape", [1, 2, 4])  # of a gamma distribution; 1 is the exponential
@pytest.mark.parametrize("splits", [2, 3])
def test_intervals_of_errors_from_few_splits_cover_their_mean(shape, splits):
    generator, truth = np.random.default_rng(3), 8.0
    found = [
        corrected_interval(generator.gamma(shape, truth / shape, splits), 10**9, 1, bounds=(0.0, np.inf))
        for _ in range(2000)
    ]
    lows, highs = np.array([(low, high) for _, low, high, _ in found]).T
    assert 0.93 <= np.mean((lows <= truth) & (truth <= highs)) <= 0.97
    assert highs.max() < 1000  # the logarithm's limits are up to 10^20 times the mean


@pytest.mark.parametrize("mean", [0.3, 0.8, 1.2])
def test_corrected_intervals_on_the_logit_scale_cover_the_truth_inside_the_range(mean):
    """The sign of the training set's mean is the prediction for the test set; the metric is the share that has it."""
    generator, n_train, n_test, splits, runs = np.random.default_rng(9), 32, 8, 15, 600
    right = stats.norm.cdf(mean * np.sqrt(n_train))
    share = stats.norm.cdf(mean)
    truth = right * share + (1 - right) * (1 - share)
    covered = outside = plain_covered = 0
    for _ in range(runs):
        orders = generator.permuted(np.tile(generator.normal(mean, 1, n_train + n_test), (splits, 1)), axis=1)
        sign = np.sign(orders[:, :n_train].mean(1, keepdims=True))
        metric = (np.sign(orders[:, n_train:]) == sign).mean(1)
        _, low, high, _ = corrected_interval(metric, n_train, n_test, bounds=(0.0, 1.0))
        covered += low <= truth <= high
        assert 0 <= low <= high <= 1
        plain = corrected_interval(metric, n_train, n_test)
        outside += plain[2] > 1
        plain_covered += plain[1] <= truth <= plain[2]
    assert 0.92 <= covered / runs <= 0.98
    if mean > 0.5:
        assert outside > 0.1 * runs
        assert covered > plain_covered


def unit(generator, kind, people, scans):
    """Simulate labels, predictions and participants; most of the noise is shared by a participant's scans."""
    groups = np.repeat(np.arange(people), scans)
    shared = generator.normal(size=people)[groups] * (scans > 1) * 0.8
    noise = shared + generator.normal(size=len(groups)) * (0.6 if scans > 1 else 1.0)  # variance 1 either way
    if kind == "regression":
        labels = generator.normal(size=people)[groups] * 2
        return labels, labels + noise, groups
    labels = (generator.random(people) < 0.4).astype(int)[groups]
    decision = noise + labels
    # The posterior probability of two unit normals one apart with 40 % positives is calibrated by construction.
    return labels, 1 / (1 + np.exp(-(decision - 0.5 + np.log(0.4 / 0.6)))), groups


def as_prediction(name, answers):
    """Turn a probability into a score with threshold 0 for balanced accuracy; other metrics take the probability."""
    return answers - 0.5 if name == "bacc" else answers


def coverage(kind, names, people, scans, runs, resamples, seed):
    """Return the share of simulated studies whose interval contains the metric of a study of 400,000 participants."""
    big = unit(np.random.default_rng(99), kind, 400_000, 1)  # the metrics do not depend on the scans per participant
    statistics = {**METRICS[kind], **PROBABILITY_METRICS[kind]}
    truth = {name: statistics[name](big[0], as_prediction(name, big[1])) for name in names}
    generator, hits = np.random.default_rng(seed), dict.fromkeys(names, 0)
    for number in range(runs):
        labels, answers, groups = unit(generator, kind, people, scans)
        for name in names:
            _, low, high = with_interval(
                statistics[name], labels, as_prediction(name, answers), groups, number, resamples
            )
            hits[name] += low <= truth[name] <= high
    return {name: count / runs for name, count in hits.items()}


# Standard error of a share of 0.95 over 600 studies: 0.009.
@pytest.mark.parametrize(
    ("kind", "names", "scans"),
    [("binary", ("auc",), 1), ("binary", ("auc",), 3), ("regression", ("mae",), 1), ("regression", ("mae",), 3)],
)
def test_intervals_cover_the_truth_nineteen_times_in_twenty(kind, names, scans):
    for share in coverage(kind, names, 100, scans, 600, 600, seed=5).values():
        assert 0.92 <= share <= 0.98


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scans", [1, 3])
@pytest.mark.parametrize("people", [60, 150])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_intervals_of_every_metric_cover_the_truth(kind, people, scans):
    found = coverage(kind, (*METRICS[kind], *PROBABILITY_METRICS[kind]), people, scans, 1000, 800, seed=6)
    print(kind, people, scans, found)
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


def test_intervals_over_scans_miss_the_truth_too_often():
    generator, hits = np.random.default_rng(3), 0
    for number in range(200):
        labels, answers, _ = unit(generator, "binary", 100, 3)
        _, low, high = with_interval(auc, labels, answers, np.arange(300), number, 400)
        hits += low <= stats.norm.cdf(1 / np.sqrt(2)) <= high
    assert hits / 200 < 0.88


def test_the_corrected_interval_covers_the_truth_and_the_uncorrected_does_not():
    """The mean of the training set predicts the test set, in 15 overlapping splits of 60 values; the truth is known."""
    generator, corrected, plain = np.random.default_rng(8), 0, 0
    n_train, n_test, splits, runs = 48, 12, 15, 600
    truth = 1 + 1 / n_train  # expected squared error of the mean of 48 unit normals
    for _ in range(runs):
        sample = generator.normal(size=60)
        orders = generator.permuted(np.tile(sample, (splits, 1)), axis=1)
        errors = ((orders[:, n_train:] - orders[:, :n_train].mean(1, keepdims=True)) ** 2).mean(1)
        _, low, high, _ = corrected_interval(errors, n_train, n_test)
        corrected += low <= truth <= high
        half = stats.t.ppf(0.975, splits - 1) * errors.std(ddof=1) / np.sqrt(splits)
        plain += abs(errors.mean() - truth) <= half
    assert 0.92 <= corrected / runs <= 0.98
    assert plain / runs < 0.85


def test_the_interval_of_a_high_correlation_is_wider_towards_zero():
    generator = np.random.default_rng(2)
    labels = generator.normal(size=80)
    value, low, high = with_interval(pearson, labels, labels + generator.normal(size=80) * 0.2, np.arange(80))
    assert value - low > high - value  # a symmetric interval is not
    assert high < 1
