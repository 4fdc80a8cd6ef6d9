"""DeLong, paired bootstrap, Holm and permutations against definitions and published examples; error rates by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.statistics.metrics import auc, mae
from evaluation.statistics.paired import (
    delong,
    delong_difference,
    holm,
    paired_bootstrap,
    paired_difference,
    permutation_p,
)


def naive_delong(labels, answers, groups):
    """Obuchowski's covariance by its definition, with loops over pairs and participants; DeLong's if each has one scan."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    m, n = len(positive), len(negative)
    areas, of = [], []
    for scores in answers:
        wins = np.array(
            [[(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for j in negative] for i in positive]
        )
        areas.append(wins.mean())
        of.append({**dict(zip(positive, wins.mean(1), strict=True)), **dict(zip(negative, wins.mean(0), strict=True))})
    people = sorted(set(groups))
    up = [[sum(o[i] - a for i in positive if groups[i] == g) for g in people] for o, a in zip(of, areas, strict=True)]
    down = [[sum(o[j] - a for j in negative if groups[j] == g) for g in people] for o, a in zip(of, areas, strict=True)]
    with_positive, with_negative = len(set(groups[positive])), len(set(groups[negative]))
    covariance = np.zeros((len(answers), len(answers)))
    for a in range(len(answers)):
        for b in range(len(answers)):
            s10 = with_positive / ((with_positive - 1) * m) * sum(x * y for x, y in zip(up[a], up[b], strict=True))
            s01 = with_negative / ((with_negative - 1) * n) * sum(x * y for x, y in zip(down[a], down[b], strict=True))
            mixed = sum(up[a][g] * down[b][g] + down[a][g] * up[b][g] for g in range(len(people)))
            covariance[a, b] = s10 / m + s01 / n + len(people) / (len(people) - 1) * mixed / (m * n)
    return areas, covariance


@pytest.mark.parametrize("scans", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_delong_equals_its_definition(seed, scans):
    generator = np.random.default_rng(seed)
    groups = np.repeat(generator.permutation(20), scans)
    labels = generator.integers(0, 2, len(groups))  # with several scans a participant may have both labels
    answers = np.round(generator.normal(size=(3, len(groups))) + labels, 1)
    areas, covariance = delong(labels, answers, groups)
    expected_areas, expected = naive_delong(labels, answers, groups)
    assert areas == pytest.approx(expected_areas, abs=1e-12)
    assert covariance == pytest.approx(expected, abs=1e-14)
    if scans == 1:
        assert covariance == pytest.approx(delong(labels, answers)[1], abs=1e-15)


def test_delong_on_the_ratings_of_hanley_and_mcneil():
    """109 CT images rated 1 to 5 (Radiology 143, 1982, Table I); DeLong's standard error as statistical packages print it."""
    ratings = np.arange(1, 6)
    normal, abnormal = np.repeat(ratings, [33, 6, 6, 11, 2]), np.repeat(ratings, [3, 2, 2, 11, 33])
    labels = np.repeat([0, 1], [len(normal), len(abnormal)])
    areas, covariance = delong(labels, np.concatenate([normal, abnormal]))
    error = np.sqrt(covariance[0, 0])
    assert areas[0] == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    assert areas[0] - 1.959964 * error == pytest.approx(0.83295, abs=5e-6)
    assert areas[0] + 1.959964 * error == pytest.approx(0.95339, abs=5e-6)


def test_delong_needs_both_classes_and_two_participants_of_each():
    with pytest.raises(ValueError, match="0 positive and 4 negative scans"):
        delong(np.zeros(4), np.arange(4.0))
    assert np.isnan(delong(np.array([0, 0, 1, 1]), np.arange(4.0), np.array([1, 2, 3, 3]))[1]).all()


def two_checkpoints(generator, people, scans, gain):
    """Scores of two checkpoints that mostly agree on each participant; the signal of the second is stronger by ``gain``."""
    groups = np.repeat(np.arange(people), scans)
    labels = (np.arange(people) % 2)[groups]
    person = generator.normal(size=people)[groups]
    noise = generator.normal(size=(2, people))[:, groups] + 0.5 * generator.normal(size=(2, len(groups)))
    return labels, person + noise[0] + labels * 1.2, person + noise[1] + labels * (1.2 + gain), groups


@pytest.mark.parametrize("scans", [1, 3])
def test_tests_of_no_difference_reject_once_in_twenty(scans):
    generator, runs = np.random.default_rng(11), 600
    wrong = {"delong": 0, "bootstrap": 0, "covered": 0, "covered by bootstrap": 0}
    for number in range(runs):
        labels, first, second, groups = two_checkpoints(generator, 80, scans, 0.0)
        by_delong = delong_difference(labels, first, second, groups)
        by_bootstrap = paired_bootstrap(auc, labels, first, second, groups, seed=number, resamples=400)
        wrong["delong"] += by_delong.p < 0.05
        wrong["bootstrap"] += by_bootstrap.p < 0.05
        wrong["covered"] += by_delong.low <= 0 <= by_delong.high
        wrong["covered by bootstrap"] += by_bootstrap.low <= 0 <= by_bootstrap.high
    print(scans, {name: round(count / runs, 3) for name, count in wrong.items()})
    assert 0.02 <= wrong["delong"] / runs <= 0.08
    assert 0.02 <= wrong["bootstrap"] / runs <= 0.08
    assert 0.92 <= wrong["covered"] / runs <= 0.98
    assert 0.92 <= wrong["covered by bootstrap"] / runs <= 0.98


def test_delong_and_bootstrap_agree_and_are_narrower_than_unpaired_intervals():
    labels, first, second, groups = two_checkpoints(np.random.default_rng(2), 160, 1, 0.9)
    by_delong = delong_difference(labels, second, first, groups)
    by_bootstrap = paired_bootstrap(auc, labels, second, first, groups)
    assert by_delong.value == pytest.approx(auc(labels, second) - auc(labels, first))
    assert by_delong.value == pytest.approx(by_bootstrap.value)
    width = by_delong.high - by_delong.low
    assert by_bootstrap.high - by_bootstrap.low == pytest.approx(width, rel=0.15)
    variances = np.diag(delong(labels, np.stack([first, second]))[1])
    assert width < 0.9 * 2 * 1.96 * np.sqrt(variances.sum())
    assert by_delong.p < 0.05
    assert by_bootstrap.p < 0.05


def test_a_checkpoint_does_not_differ_from_itself():
    labels, first, _, groups = two_checkpoints(np.random.default_rng(3), 40, 2, 0.0)
    for found in (
        delong_difference(labels, first, 3 * first + 1, groups),
        paired_bootstrap(auc, labels, first, first, groups),
    ):
        assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired_difference(mae, labels, first, first, groups) == (0.0, 0.0, 0.0)


def test_a_regression_is_compared_by_its_errors():
    generator = np.random.default_rng(4)
    ages = generator.uniform(20, 80, 120)
    good, bad = ages + generator.normal(size=120) * 4, ages + generator.normal(size=120) * 7
    found = paired_bootstrap(mae, ages, good, bad, np.arange(120))
    assert found.value < 0
    assert found.high < 0
    assert found.p == pytest.approx(2 / 2001)


def test_holm_on_a_worked_example_and_against_its_definition():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm(np.array([0.02, np.nan, 0.9, 0.03]))
    assert found[[0, 2, 3]] == pytest.approx([0.06, 0.9, 0.06])
    assert np.isnan(found[1])
    p = np.random.default_rng(0).random(12) ** 4
    rejected = set()  # Holm's definition: step down until a p value is too large
    for step, index in enumerate(np.argsort(p)):
        if p[index] > 0.05 / (12 - step):
            break
        rejected.add(int(index))
    assert rejected
    assert rejected == set(np.flatnonzero(holm(p) <= 0.05).tolist())


def test_permutation_p_of_a_small_case_equals_the_list_of_all_permutations():
    from itertools import permutations

    labels, answers = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.4, 0.3, 0.8, 0.9])
    permuted = [auc(labels[list(order)], answers) for order in permutations(range(5))]
    exact = np.mean(np.array(permuted) >= auc(labels, answers) - 1e-12)
    found = permutation_p(auc, labels, answers, np.arange(5), count=4000)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / 4000))


def test_labels_are_permuted_among_participants():
    """Predictions know the participant, not the label; permuting scans rather than participants rejects too often."""
    p, single = [], []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        groups = np.repeat(np.arange(20), 5)
        labels = (generator.permutation(20) % 2)[groups]
        answers = generator.normal(size=20)[groups] + 0.1 * generator.normal(size=100)
        p.append(permutation_p(auc, labels, answers, groups, count=99))
        single.append(permutation_p(auc, labels, answers, np.arange(100), count=99))
    assert np.mean(np.array(p) <= 0.05) <= 0.1
    assert np.mean(np.array(single) <= 0.05) >= 0.15


def test_permutation_p_of_a_metric_that_is_better_when_low():
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), [1, 2, 3] * 10)
    ages = generator.uniform(20, 80, 30)[groups] + generator.random(60)
    answers = ages + generator.normal(size=60) * 5
    assert permutation_p(mae, ages, answers, groups, higher_is_better=False, count=199) == pytest.approx(1 / 200)
    assert permutation_p(mae, ages, answers, groups, higher_is_better=True, count=199) == 1.0
    assert np.isnan(permutation_p(auc, np.ones(60, int), answers, groups))
