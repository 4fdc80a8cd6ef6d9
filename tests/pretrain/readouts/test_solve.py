"""The streaming ridge regression against scikit-learn's, and the nested choice of the penalty against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from pretrain.readouts.solve import FOLDS, GRID, Moments, Samples, nested_ridge

# scans, features: fewer features than scans, more, and as many
SHAPES = [(120, 30), (60, 150), (80, 80)]


def simulate(scans, features, seed=0, targets=2):
    """Features far from zero with very different scales, one of them constant; targets that depend on some of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(scans, features)) * 10.0 ** rng.uniform(-2, 2, features) + rng.normal(scale=30, size=features)
    x[:, 3] = 7.0
    x = x.astype(np.float32)
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    y = z @ rng.normal(size=(features, targets)) / np.sqrt(features) + 0.3 * rng.normal(size=(scans, targets))
    return x, 40.0 + 10.0 * y, rng.permutation(scans) % FOLDS


def moments(x, y, folds, pieces=1):
    data = Moments.empty(x[:5].mean(0), y.mean(0))
    for rows in np.array_split(np.arange(len(x)), pieces):
        data.add(x[rows], y[rows], folds[rows])
    return data


def data_of(kind, x, y, folds):
    return Samples(x, y, folds) if kind == "samples" else moments(x, y, folds, pieces=7)


def by_sklearn(x, y, rows, scale, penalty):
    """Return the predictions for all scans of scikit-learn's Ridge on scaled features of some scans."""
    x = x.astype(np.float64)
    mean, deviation = x[rows].mean(0), x[rows].std(0)
    if scale == "all":
        deviation = np.full_like(deviation, np.sqrt(np.square(deviation).mean()))
    deviation = np.where(deviation < 1e-8, 1.0, deviation)
    model = Ridge(alpha=penalty, solver="svd").fit((x[rows] - mean) / deviation, y[rows])
    return model.predict((x - mean) / deviation)


@pytest.mark.parametrize("kind", ["moments", "samples"])
@pytest.mark.parametrize(("scans", "features"), SHAPES)
def test_every_entry_of_the_grid_is_the_ridge_of_scikit_learn(kind, scans, features):
    x, y, folds = simulate(scans, features)
    chosen = [0, 2, 3]
    fits = data_of(kind, x, y, folds).fit(chosen)
    rows = np.flatnonzero(np.isin(folds, chosen))
    for entry, (scale, penalty) in enumerate(GRID):
        expected = by_sklearn(x, y, rows, scale, penalty)
        found = x.astype(np.float64) @ fits.coefficients[entry] + fits.intercepts[entry]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * y.std())


@pytest.mark.parametrize("kind", ["moments", "samples"])
def test_squared_errors_are_those_of_the_predictions(kind):
    x, y, folds = simulate(100, 40)
    data = data_of(kind, x, y, folds)
    fits = data.fit([0, 1])
    held_out = folds == 4
    predicted = x[held_out].astype(np.float64) @ fits.coefficients + fits.intercepts[:, None]
    expected = np.square(predicted - y[held_out]).sum(1)
    np.testing.assert_allclose(data.squared_errors(4, fits), expected, rtol=1e-7)


def naive_nested(x, y, folds):
    """Nested cross-validation with scikit-learn, one target, one fit at a time."""

    def errors(left_out, tested):
        rows = np.flatnonzero(~np.isin(folds, left_out))
        test = folds == tested
        return np.array([np.square(by_sklearn(x, y, rows, *entry)[test] - y[test]).sum() for entry in GRID])

    entries = [
        int(np.argmin(sum(errors([fold, other], other) for other in range(FOLDS) if other != fold)))
        for fold in range(FOLDS)
    ]
    final = int(np.argmin(sum(errors([fold], fold) for fold in range(FOLDS))))
    predicted = np.empty(len(y))
    for fold, entry in enumerate(entries):
        test = folds == fold
        predicted[test] = by_sklearn(x, y, np.flatnonzero(~test), *GRID[entry])[test]
    return final, by_sklearn(x, y, np.arange(len(y)), *GRID[final]), predicted


@pytest.mark.parametrize(("kind", "scans", "features"), [("moments", 75, 20), ("samples", 40, 60)])
def test_the_nested_choice_equals_plain_loops_over_folds(kind, scans, features):
    x, y, folds = simulate(scans, features, seed=3)
    y[:, 1] = np.random.default_rng(5).normal(size=scans)  # noise: another penalty than the first target's
    found = nested_ridge(data_of(kind, x, y, folds))
    assert found.entries[0] != found.entries[1]
    for target in range(2):
        final, everybody, out_of_fold = naive_nested(x, y[:, target], folds)
        assert found.entries[target] == final
        predicted = x.astype(np.float64) @ found.coefficients[:, target] + found.intercepts[target]
        np.testing.assert_allclose(predicted, everybody, rtol=1e-6, atol=1e-6)
        weights, offsets = found.fold_coefficients[folds, :, target], found.fold_intercepts[folds, target]
        own = (x.astype(np.float64) * weights).sum(1) + offsets
        np.testing.assert_allclose(own, out_of_fold, rtol=1e-6, atol=1e-6)


def test_the_sums_do_not_depend_on_the_pieces_they_are_collected_in():
    x, y, folds = simulate(90, 12)
    first, second = moments(x, y, folds), moments(x, y, folds, pieces=11)
    for name in ("count", "x", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-9, atol=1e-9)
