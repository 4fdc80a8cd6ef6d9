"""Simulated features of people at several sites, and a readout of age that is fitted to them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pretrain.readouts.fit import OwnFeatures, Ranks, fit_group
from pretrain.readouts.targets import Target, TargetGroup, deal_folds
from pretrain.weights.readouts import Readout


class World:
    """Simulated people: 40 features that age changes, and that differ between people, scans and sites."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.of_age = self.rng.normal(size=40) / 20
        self.mixing = self.rng.normal(size=(40, 40)) / 6

    def draw(self, people, sites, site_spread):
        """Return a table of one to three scans of each person, and features (n, 40) of the scans."""
        rng = self.rng
        scans = rng.integers(1, 4, people)
        person = np.repeat(np.arange(people), scans)
        age, site = rng.uniform(18, 85, people)[person], rng.integers(sites, size=people)[person]
        offsets = rng.normal(scale=site_spread, size=(sites, 40))
        individual = rng.normal(size=(people, 40)) @ self.mixing
        features = (
            np.outer(age, self.of_age) + individual[person] + offsets[site] + 0.3 * rng.normal(size=(len(age), 40))
        )
        return pd.DataFrame({"person": person, "age": age, "site": site}), features.astype(np.float32)


def fit(table, features, seed=0, calibration=None):
    """Fit a readout of age to scans, as ``fit_readouts`` does, and return it.

    ``calibration``: (n,) which scans measure the errors and are not fitted to; None: errors out of fold.
    """
    known = np.ones(len(table), bool)
    folds = deal_folds(table["person"].to_numpy(np.int64), known if calibration is None else calibration, seed)
    target = Target("age", table["age"].to_numpy())
    found = fit_group(OwnFeatures(features, known, Ranks()), TargetGroup([target], known, folds, calibration))
    used = folds >= 0
    own = (features * found.fold_coefficients[folds, :, 0]).sum(1) + found.fold_intercepts[folds, 0]
    weights = 1.0 / table.groupby("person")["age"].transform("size").to_numpy()
    return Readout(
        "age", (), float(found.intercepts[0]), found.coefficients[:, 0], found.fold_coefficients[:, :, 0],
        found.fold_intercepts[:, 0], residuals=np.abs(own - target.values)[used], residual_folds=folds[used],
        residual_weights=weights[used], summary={},
    )  # fmt: skip
