"""Metrics against scikit-learn and naive loops; weights against explicit resamples."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from evaluation.statistics.metrics import (
    HIGHER_IS_BETTER,
    METRICS,
    PROBABILITY_METRICS,
    accuracy_at_zero,
    auc,
    average_precision,
    balanced_accuracy,
    brier,
    macro_auc,
    mae,
    openbhb_score,
    pearson,
    r2,
    site_leakage,
)


def binary(seed, count=60):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    return labels, np.round(1 / (1 + np.exp(-generator.normal(size=count) - labels)), 1)  # with ties


def multiclass(seed, count=80, classes=4):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    raw = np.exp(generator.normal(size=(count, classes)) + np.eye(classes)[labels])
    return labels, raw / raw.sum(1, keepdims=True)


def regression(seed, count=50):
    generator = np.random.default_rng(seed)
    labels = generator.uniform(20, 80, count)
    return labels, 0.7 * labels + 15 + generator.normal(size=count) * 8


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn_and_naive_loops(seed):
    labels, answers = binary(seed)
    pairs = [(a > b) + 0.5 * (a == b) for a in answers[labels == 1] for b in answers[labels == 0]]
    called = (answers - 0.5 > 0).astype(int)
    codes, shares = multiclass(seed)
    truth, guess = regression(seed)
    for found, expected in (
        (auc(labels, answers), np.mean(pairs)),
        (auc(labels, answers), metrics.roc_auc_score(labels, answers)),
        (average_precision(labels, answers), metrics.average_precision_score(labels, answers)),
        (brier(labels, answers), metrics.brier_score_loss(labels, answers)),
        (accuracy_at_zero(labels, answers - 0.5), metrics.balanced_accuracy_score(labels, called)),
        (balanced_accuracy(codes, shares), metrics.balanced_accuracy_score(codes, shares.argmax(1))),
        (balanced_accuracy(codes, shares.argmax(1)), metrics.balanced_accuracy_score(codes, shares.argmax(1))),
        (macro_auc(codes, shares), metrics.roc_auc_score(codes, shares, multi_class="ovr")),
        (brier(codes, shares), np.mean([((s - np.eye(4)[c]) ** 2).sum() for c, s in zip(codes, shares, strict=True)])),
        (mae(truth, guess), metrics.mean_absolute_error(truth, guess)),
        (r2(truth, guess), metrics.r2_score(truth, guess)),
        (pearson(truth, guess), np.corrcoef(truth, guess)[0, 1]),
    ):
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", METRICS)
def test_weights_equal_repeated_scans(kind):
    labels, answers = {"binary": binary, "multiclass": multiclass, "regression": regression}[kind](7)
    weights = np.random.default_rng(0).integers(0, 4, (6, len(labels))).astype(float)
    given = [(*each, answers) for each in PROBABILITY_METRICS[kind].items()]
    given += [(*each, answers.argmax(1) if kind == "multiclass" else answers) for each in METRICS[kind].items()]
    for name, statistic, answers in given:
        assert name in HIGHER_IS_BETTER
        drawn = [statistic(np.repeat(labels, w), np.repeat(answers, w, axis=0)) for w in weights.astype(int)]
        assert statistic(labels, answers, weights) == pytest.approx(drawn, abs=1e-12)


def test_undefined_metrics_are_nan():
    assert np.isnan(auc(np.ones(5), np.arange(5.0)))
    assert np.isnan(average_precision(np.zeros(5), np.arange(5.0)))
    assert np.isnan(brier(np.array([0, 1]), np.array([-0.3, 2.0])))  # decision values
    assert np.isnan(brier(np.array([0, 1]), np.array([0, 1])))  # class codes
    assert np.isnan(macro_auc(np.array([0, 1, 2]), np.array([0, 1, 2])))
    assert np.isnan(r2(np.full(4, 0.1), np.arange(4.0)))
    assert np.isnan(pearson(np.arange(4.0), np.full(4, 0.1)))


def test_openbhb_score_and_site_leakage():
    assert openbhb_score(1.0, 4.0) == 4.0
    assert openbhb_score(0.0, 4.0) == 0.0
    assert openbhb_score(0.5, 4.0) == pytest.approx(4 * 2**-0.3)
    with pytest.raises(ValueError, match=r"site_accuracy=1.2 must lie in \[0, 1\]"):
        openbhb_score(1.2, 4.0)
    sites = np.repeat([0, 1, 2, 3], 5)
    assert site_leakage(sites, sites) == pytest.approx(1.0)
    assert site_leakage(sites, np.zeros(20, int)) == pytest.approx(0.0)
    guess = np.where(np.arange(20) % 5 < 2, sites, (sites + 1) % 4)
    assert site_leakage(sites, guess) == pytest.approx(
        metrics.balanced_accuracy_score(sites, guess, adjusted=True), abs=1e-12
    )
    assert np.isnan(site_leakage(np.zeros(4), np.zeros(4)))
