"""Logistic regression by Newton's method gives scikit-learn's solution, from any start."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from evaluation.statistics.logistic import MANY_COLUMNS, Curvature, fit_logistic


def scikit_learn(features, labels, penalty):
    model = LogisticRegression(
        C=1 / penalty, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(features, labels)
    return np.append(model.coef_[0], model.intercept_)


def data(seed, scans, columns, share=0.5, noise=1.0):
    """Return features (scans, columns) and labels that depend on the first column."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(scans, columns))
    score = features[:, 0] + noise * rng.normal(size=scans)
    return features, (score > np.quantile(score, 1 - share)).astype(float)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0, 1e5])
@pytest.mark.parametrize(
    ("scans", "columns", "share", "noise"),
    [(60, 5, 0.5, 1.0), (200, 40, 0.1, 1.0), (30, 29, 0.5, 0.0), (40, 3, 0.05, 0.0), (25, 60, 0.4, 1.0)],
)
def test_the_solution_is_scikit_learns(scans, columns, share, noise, penalty):
    features, labels = data(scans, scans, columns, share, noise)
    expected = scikit_learn(features, labels, penalty)
    found = fit_logistic(features, labels, penalty)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_the_start_does_not_change_the_solution():
    features, labels = data(0, 80, 30, noise=0.2)
    cold = fit_logistic(features, labels, 0.1)
    for start in (
        fit_logistic(features, labels, 1e5),
        50 * np.ones(31),
        np.random.default_rng(1).normal(size=31) * 1e3,
    ):
        assert np.allclose(fit_logistic(features, labels, 0.1, start), cold, rtol=1e-5, atol=1e-6 * np.abs(cold).max())


@pytest.mark.parametrize(("scans", "noise"), [(400, 1.0), (300, 0.0)])
def test_a_path_of_penalties_with_many_columns_is_scikit_learns(scans, noise):
    features, labels = data(7, scans, MANY_COLUMNS + 50, 0.3, noise)
    features[:, 3] *= 1e4  # as covariates, which are hardly penalised
    curvature, last, computed = Curvature(), None, []
    for penalty in (1e5, 1e3, 10.0, 1.0, 0.1):
        last = fit_logistic(features, labels, penalty, last, curvature)
        computed.append(curvature.products)
        expected = scikit_learn(features, labels, penalty)
        assert np.allclose(
            features @ last[:-1] + last[-1], features @ expected[:-1] + expected[-1], rtol=1e-4, atol=1e-5
        )
    assert computed[0] is computed[1], "the second derivatives were computed again for a similar fit"


def test_the_curvature_of_another_fit_does_not_change_the_solution():
    features, labels = data(8, 300, MANY_COLUMNS + 20)
    cold = fit_logistic(features, labels, 1.0)
    for wrong in (np.eye(MANY_COLUMNS + 21), np.zeros((MANY_COLUMNS + 21, MANY_COLUMNS + 21))):
        found = fit_logistic(features, labels, 1.0, None, Curvature(wrong))
        assert np.allclose(found, cold, rtol=1e-5, atol=1e-6 * np.abs(cold).max())


def test_a_column_of_large_values_is_hardly_penalised():
    features, labels = data(3, 100, 4, noise=0.5)
    scaled = features * np.array([1e4, 1, 1, 1])
    found = fit_logistic(scaled, labels, 1e5)
    assert np.allclose(found, scikit_learn(scaled, labels, 1e5), rtol=1e-4, atol=1e-9)
    assert abs(found[0]) * 1e4 > 10 * np.abs(found[1:4]).max()


def test_the_gradient_at_the_solution_is_zero():
    features, labels = data(5, 50, 8, share=0.3)
    penalty, solution = 2.0, fit_logistic(*data(5, 50, 8, share=0.3), 2.0)
    weights = np.where(labels == 1, 50 / (2 * labels.sum()), 50 / (2 * (1 - labels).sum()))
    probability = 1 / (1 + np.exp(-(features @ solution[:-1] + solution[-1])))
    residuals = weights * (probability - labels)
    assert np.abs(features.T @ residuals + penalty * solution[:-1]).max() < 1e-6
    assert abs(residuals.sum()) < 1e-6
