"""The intervals of readouts: against loops over the definition, and their coverage of new people at known and new sites."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from pretrain.readouts.solve import FOLDS
from pretrain.weights.readouts import COVERAGE, Readout
from tests.pretrain.readouts.world import World, fit


def readout_of(folds, residuals, weights, features=3, seed=0):
    rng = np.random.default_rng(seed)
    return Readout(
        "age", (), 0.0, rng.normal(size=features), rng.normal(size=(FOLDS, features)), rng.normal(size=FOLDS),
        residuals=residuals, residual_folds=folds, residual_weights=weights, summary={},
    )  # fmt: skip


def test_equal_weights_give_the_quantiles_of_the_paper():
    """Barber et al. 2021, equation of CV+: the ceil((1 - α)(n + 1)) smallest of m + R, and the floor(α (n + 1)) of m - R."""
    rng = np.random.default_rng(1)
    n = 97
    readout = readout_of(rng.integers(FOLDS, size=n), np.abs(rng.normal(size=n)), np.ones(n))
    x = rng.normal(size=(4, 3))
    low, high = readout.interval(x)
    for row in range(4):
        centres = readout.fold_coefficients @ x[row] + readout.fold_intercepts
        above = sorted(centres[k] + r for k, r in zip(readout.residual_folds, readout.residuals, strict=True))
        below = sorted(centres[k] - r for k, r in zip(readout.residual_folds, readout.residuals, strict=True))
        assert high[row] == pytest.approx(above[math.ceil(COVERAGE * (n + 1)) - 1])
        assert low[row] == pytest.approx(below[math.floor((1 - COVERAGE) * (n + 1) + 1e-9) - 1])


def test_a_person_with_three_equal_scans_counts_as_one():
    rng = np.random.default_rng(2)
    folds, residuals = rng.integers(FOLDS, size=40), np.abs(rng.normal(size=40))
    once = readout_of(folds, residuals, np.ones(40))
    thrice = readout_of(np.repeat(folds, 3), np.repeat(residuals, 3), np.full(120, 1 / 3))
    x = rng.normal(size=(5, 3))
    np.testing.assert_allclose(thrice.interval(x), once.interval(x))


def test_twenty_people_are_the_fewest_for_a_finite_interval():
    x = np.zeros((1, 3))
    for people, finite in ((20, True), (18, False)):
        readout = readout_of(np.arange(people) % FOLDS, np.linspace(1, 2, people), np.ones(people))
        assert np.isfinite(readout.interval(x)).all() == finite


def one_scan_each(table):
    """Row numbers of the first scan of each person."""
    return np.flatnonzero(~table["person"].duplicated().to_numpy())


def drawn_by_heart(world, people, known):
    """Return people of a world with two more features near their age, as an encoder that was trained with their ages gives.

    Of people whom it has not seen, these features tell the age less well.
    """
    table, features = world.draw(people, 1, 0.0)
    spread = 2.0 if known else 8.0
    near = table["age"].to_numpy()[:, None] + spread * world.rng.normal(size=(people, 2))[table["person"]]
    return table, np.concatenate([features, near.astype(np.float32)], axis=1)


def test_an_encoder_that_knows_the_ages_needs_calibration_people():
    """95 % intervals hold fewer than 70 % of new people out of fold, 92 to 98 % with people who are not seen: 12 worlds."""
    held, count = {"out of fold": 0.0, "calibrated": 0.0}, 0
    for seed in range(12):
        world = World(seed)
        (known, own), (unseen, other) = drawn_by_heart(world, 200, True), drawn_by_heart(world, 100, False)
        new, features = drawn_by_heart(world, 300, False)
        both = pd.concat([known, unseen.assign(person=unseen["person"] + 200)], ignore_index=True)
        calibration = (both["person"] >= 200).to_numpy()
        readouts = {
            "out of fold": fit(known, own),
            "calibrated": fit(both, np.concatenate([own, other]), calibration=calibration),
        }
        first = one_scan_each(new)
        count += len(first)
        for name, readout in readouts.items():
            low, high = readout.interval(features[first])
            ages = new["age"].to_numpy()[first]
            held[name] += ((low <= ages) & (ages <= high)).sum()
    assert held["out of fold"] / count < 0.7
    assert 0.92 <= held["calibrated"] / count <= 0.98


def test_new_people_of_known_scanners_are_covered():
    """95 % intervals hold 92 to 98 % of new people, also if every scan is shown: 12 worlds, 300 people in each."""
    per_person, per_scan, n_people, n_scans = 0, 0, 0, 0
    for seed in range(12):
        world = World(seed)
        readout = fit(*world.draw(200, 1, 0.0))
        table, features = world.draw(300, 1, 0.0)
        low, high = readout.interval(features)
        held = (low <= table["age"]) & (table["age"] <= high)
        first = one_scan_each(table)
        per_person, n_people = per_person + held.iloc[first].sum(), n_people + len(first)
        per_scan, n_scans = per_scan + held.sum(), n_scans + len(table)
    assert 0.92 <= per_person / n_people <= 0.98
    assert 0.92 <= per_scan / n_scans <= 0.98
