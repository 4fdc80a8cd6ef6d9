"""Figures against naive loops and scikit-learn; intervals by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from evaluation.statistics import (
    auc,
    balanced_accuracy,
    interval,
    mae,
    paired_difference,
    r2,
    resamples,
    with_interval,
)


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn_and_naive_loops(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 40)
    scores = np.round(generator.normal(size=40) + labels, 1)  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    classes, guessed = generator.integers(0, 4, 60), generator.integers(0, 4, 60)
    assert balanced_accuracy(classes, guessed) == pytest.approx(balanced_accuracy_score(classes, guessed), abs=1e-12)
    truth, answer = generator.normal(size=30), generator.normal(size=30)
    assert r2(truth, answer) == pytest.approx(r2_score(truth, answer), abs=1e-12)
    assert mae(truth, answer) == pytest.approx(np.mean(np.abs(truth - answer)), abs=1e-12)


def test_one_class_has_no_auc():
    assert np.isnan(auc(np.ones(5), np.arange(5.0)))


def test_participants_are_resampled_whole():
    groups = np.array([3, 3, 3, 1, 1, 7])
    for sample in resamples(groups, count=50):
        people = groups[sample]
        for person, size in ((3, 3), (1, 2), (7, 1)):
            assert (people == person).sum() % size == 0
        assert len(np.unique(sample)) == sum({3: 3, 1: 2, 7: 1}[p] for p in np.unique(people))
    assert all(np.array_equal(a, b) for a, b in zip(resamples(groups, 5), resamples(groups, 5), strict=True))


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    truth, hits, runs = 0.760250, 0, 200  # AUC of two unit normals one apart: Phi(1 / sqrt 2)
    for _ in range(runs):
        labels = np.repeat([0, 1], 60)
        scores = generator.normal(size=120) + labels
        values = np.array([auc(labels[s], scores[s]) for s in resamples(np.arange(120), count=200)])
        low, high = interval(values)
        hits += low <= truth <= high
    assert 0.89 <= hits / runs <= 0.99  # 0.95 ± four standard errors


def test_interval_of_several_scans_a_person_is_wider_than_if_they_were_people():
    generator = np.random.default_rng(1)
    person = np.repeat(np.arange(30), 4)
    labels = (person % 2).astype(int)
    scores = np.repeat(generator.normal(size=30), 4) + 0.8 * labels
    grouped = with_interval(auc, labels, scores, person)
    single = with_interval(auc, labels, scores, np.arange(120))
    assert grouped[0] == single[0]
    assert grouped[2] - grouped[1] > 1.4 * (single[2] - single[1])


def test_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(2)
    labels = np.repeat([0, 1], 80)
    base = generator.normal(size=160) + 0.8 * labels
    better = base + 0.35 * labels
    value, low, high = paired_difference(auc, labels, better, base, np.arange(160))
    assert value == pytest.approx(auc(labels, better) - auc(labels, base))
    assert 0 < low < value < high
    assert paired_difference(auc, labels, base, base, np.arange(160)) == (0.0, 0.0, 0.0)
