"""Intervals over halves against loops, and their level where the models are really fitted again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from evaluation.statistics.training_sets import metric_interval, refitted_p, training_set_interval
from tests.benchmarks.studies.null_studies import Cell, summary_of


def naive_interval(repeats, halves):
    """The same in loops."""
    mean = sum(repeats) / len(repeats)
    total = 0.0
    for first, second in halves:
        variance_of_a_half = ((first - (first + second) / 2) ** 2 + (second - (first + second) / 2) ** 2) / 1
        total += variance_of_a_half / 2
    error = (total / len(halves)) ** 0.5
    t = stats.t(len(halves))
    return mean, mean - t.ppf(0.975) * error, mean + t.ppf(0.975) * error, 2 * (1 - t.cdf(abs(mean) / error))


@pytest.mark.parametrize(("repeats", "halvings"), [(1, 5), (3, 10), (7, 20)])
def test_the_interval_is_that_of_loops(repeats, halvings):
    generator = np.random.default_rng(halvings)
    values, halves = generator.normal(0.1, 0.1, repeats), generator.normal(0.1, 0.2, (halvings, 2))
    interval = training_set_interval(values, halves)
    given = interval.value, interval.low, interval.high, interval.two_sided()
    assert given == pytest.approx(naive_interval(values, halves))
    inside = interval.better_than(interval.value - interval.error)
    assert inside == pytest.approx(stats.t.sf(1, halvings))
    assert interval.better_than(interval.value - interval.error, higher_is_better=False) == pytest.approx(1 - inside)


def test_the_interval_of_a_metric_is_that_of_its_rows_in_the_table_of_resamples():
    generator = np.random.default_rng(3)
    repeats, halves = generator.uniform(0.6, 0.8, 3), generator.uniform(0.5, 0.9, (6, 2))
    rows = [("ad", "auc", "repeat", number, 0, value) for number, value in enumerate(repeats)]
    rows += [("ad", "auc", "half", number, side, halves[number, side]) for number in range(6) for side in (0, 1)]
    rows += [
        ("ad", "auc", "permuted", 0, 0, 0.1),
        ("ad", "bacc", "repeat", 0, 0, 0.2),
        ("scz", "auc", "half", 0, 0, 0.3),
    ]
    table = pd.DataFrame(rows, columns=["task", "metric", "kind", "number", "side", "value"]).sample(
        frac=1, random_state=0
    )
    assert metric_interval(table, "ad", "binary", "auc") == training_set_interval(repeats, halves, bounds=(0.0, 1.0))
    assert metric_interval(table, "scz", "binary", "auc") is None
    assert metric_interval(table, "age", "regression", "mae") is None
    assert metric_interval(pd.DataFrame(), "ad", "binary", "auc") is None


def test_the_variance_of_a_mean_is_estimated_without_bias():
    generator = np.random.default_rng(0)
    estimates, means = [], []
    for _ in range(2000):
        people = generator.normal(size=40)
        halves = []
        for _ in range(5):
            order = generator.permutation(40)
            halves.append([people[order[:20]].mean(), people[order[20:]].mean()])
        interval = training_set_interval(np.array([people.mean()]), np.array(halves))
        estimates.append(interval.error**2)
        means.append(people.mean())
    assert np.mean(estimates) == pytest.approx(1 / 40, rel=0.05)
    assert np.var(means) == pytest.approx(1 / 40, rel=0.1)


def test_undefined_halves_are_left_out_and_too_few_give_no_interval():
    halves = np.full((9, 2), 0.5) + np.arange(9)[:, None] * [0.01, 0.02]
    halves[::3, 1] = np.nan
    six = training_set_interval(np.array([0.5, np.nan, 0.7]), halves)
    assert six.freedom == 6
    assert six.value == pytest.approx(0.6)
    four = training_set_interval(np.array([0.5]), halves[:6])
    assert four.freedom == 4
    assert np.isnan([four.low, four.high, four.two_sided(), four.better_than(0.5)]).all()
    assert np.isnan(training_set_interval(np.array([np.nan]), np.ones((9, 2))).low)
    assert training_set_interval(np.array([]), np.ones((9, 2))).freedom == 9


def test_equal_halves_leave_no_doubt():
    certain = training_set_interval(np.array([0.8]), np.full((10, 2), 0.8))
    assert (certain.low, certain.high) == (0.8, 0.8)
    assert (certain.two_sided(0.8), certain.two_sided(0.5)) == (1.0, 0.0)
    assert (certain.better_than(0.5), certain.better_than(0.9)) == (0.0, 1.0)


def test_the_p_value_of_refitted_models_is_their_share():
    permuted = np.array([0.4, 0.5, 0.6, np.nan])
    assert refitted_p(0.55, permuted) == (1 + 2) / 5  # the undefined one counts
    assert refitted_p(0.6, permuted) == (1 + 2) / 5  # so does the equal one
    assert refitted_p(0.45, permuted, higher_is_better=False) == (1 + 2) / 5
    assert np.isnan(refitted_p(0.6, np.array([])))
    assert np.isnan(refitted_p(np.nan, permuted))


def test_a_null_study_goes_through_the_whole_path():
    shares = summary_of(Cell("binary", 40, 0.5), studies=3, seed=5)
    assert set(shares) == {"auc", "bacc"}
    # Nine pairs and nine intervals of three studies: most must be right.
    assert all(shares[metric][name] <= 4 / 9 for metric in shares for name in ("different", "missed", "chance"))
    found = summary_of(Cell("regression", 40, 0.5, (0.0, 4.0)), studies=2)["mae"]
    assert found["different"] == 1.0


@pytest.mark.slow
def test_null_studies_keep_their_level_where_fixed_models_do_not():
    """The table of docs/evaluation.md comes from more studies."""
    summary = summary_of(Cell("binary", 40, 0.5), studies=60, seed=5)["auc"]
    assert summary["different"] <= 0.10
    assert summary["missed"] <= 0.10
    assert summary["different_fixed"] > summary["different"]
