"""A path of ridge regressions gives the predictions of scikit-learn's Ridge."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from evaluation.statistics.ridge import RidgePath


@pytest.mark.parametrize(("scans", "columns"), [(60, 5), (40, 40), (50, 1)])
def test_the_predictions_are_scikit_learns(scans, columns):
    rng = np.random.default_rng(scans)
    features, labels = 3 + rng.normal(size=(scans, columns)), 40 + 10 * rng.normal(size=scans)
    path, asked = RidgePath(features, labels), rng.normal(size=(7, columns))
    for penalty in (1e5, 1.0, 0.1):
        expected = Ridge(alpha=penalty).fit(features, labels).predict(asked)
        np.testing.assert_allclose(path.predict(asked, penalty), expected, rtol=1e-9)
    first = path.predict(asked, 1.0)
    assert (path.predict(asked, 1.0) == first).all(), "a prediction changes the path"
