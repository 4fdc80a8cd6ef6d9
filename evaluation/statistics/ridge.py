"""Ridge regression of one number with several penalties: the products of the features are computed once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve


class RidgePath:
    """Ridge regressions of the same labels on the same features, with an intercept that is not penalised.

    The solutions are those of scikit-learn's ``Ridge``, by the same operations.

    Args:
        features: (n, F), F at most n.
        labels: (n,).
    """

    def __init__(self, features: NDArray[np.float64], labels: NDArray[np.float64]) -> None:
        self._mean, self._label_mean = features.mean(0), labels.mean()
        centred = features - self._mean
        self._products = centred.T @ centred
        self._right = centred.T @ (labels - self._label_mean)

    def predict(self, features: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        """Return the predictions (m,) for features (m, F) of the regression with this penalty, above 0."""
        penalised = self._products.copy()
        penalised[np.diag_indices_from(penalised)] += penalty
        weights = solve(penalised, self._right, assume_a="pos", overwrite_a=True, check_finite=False)
        return np.asarray(features @ weights + (self._label_mean - self._mean @ weights))
