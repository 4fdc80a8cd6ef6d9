"""L2-penalised logistic regression of two classes by Newton's method, started from the solution for another penalty.

A search fits hundreds of small models, on which scikit-learn spends more time on checks than on the fit. The solution is the
same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit

STEPS = 100
# Newton's method ends with a step that promises to lower the loss per scan by less than this; the error is its square.
TOLERANCE = 1e-8


def fit_logistic(
    features: NDArray[np.float64], labels: NDArray[np.float64], penalty: float, start: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the weights and, last, the intercept (F + 1,) of the model with the lowest penalised loss.

    The loss is ``sum_i s_i log(1 + exp(-z_i)) + penalty / 2 |weights|^2``, where z_i is the decision value of scan i, times -1
    for label 0. ``s_i = n / (2 n_c)`` gives both classes the same total weight, as ``class_weight="balanced"``
    does in scikit-learn; ``C`` is ``1 / penalty`` there. The intercept is not penalised.

    Args:
        features: (n, F).
        labels: (n,) of 0 and 1, both present.
        penalty: above 0.
        start: (F + 1,) to start from, for example the solution for a neighbouring penalty; zeros if it is None or worse.
    """
    design = np.column_stack([features, np.ones(len(features))])
    positive = labels > 0
    counts = np.array([np.sum(~positive), np.sum(positive)])
    weights = len(labels) / (2.0 * counts)[positive.astype(np.int64)]
    penalties = np.full(design.shape[1], penalty)
    penalties[-1] = 0.0
    signs = np.where(positive, 1.0, -1.0)
    solution = np.zeros(design.shape[1])
    scores = design @ solution
    loss = _loss(scores, weights, solution, penalties)
    if start is not None and (lower := _loss(signs * (design @ start), weights, start, penalties)) < loss:
        solution, scores, loss = start, design @ start, lower
    for _ in range(STEPS):
        probability = expit(scores)
        gradient = design.T @ (weights * (probability - positive)) + penalties * solution
        curvature = weights * probability * (1.0 - probability)
        step = _newton_step(design, curvature, penalties, gradient)
        decrease = float(gradient @ step)
        if decrease < TOLERANCE * len(labels):
            return solution - step
        size = 1.0
        while True:
            candidate = solution - size * step
            scores = design @ candidate
            lower = _loss(signs * scores, weights, candidate, penalties)
            if lower <= loss - 1e-4 * size * decrease or size < 1e-6:
                break
            size /= 2.0
        solution, loss = candidate, lower
    return solution


def _loss(
    margins: NDArray[np.float64],
    weights: NDArray[np.float64],
    solution: NDArray[np.float64],
    penalties: NDArray[np.float64],
) -> float:
    return float(weights @ np.logaddexp(0.0, -margins) + 0.5 * penalties @ np.square(solution))


def _newton_step(
    design: NDArray[np.float64],
    curvature: NDArray[np.float64],
    penalties: NDArray[np.float64],
    gradient: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the step (F + 1,) that Newton's method subtracts."""
    scaled = design * np.sqrt(curvature)[:, None]
    hessian = scaled.T @ scaled  # NumPy computes half of a product of a matrix with itself
    hessian[np.diag_indices_from(hessian)] += penalties
    try:
        return np.asarray(cho_solve(cho_factor(hessian, check_finite=False), gradient, check_finite=False))
    except LinAlgError:  # all probabilities are 0 or 1, which leaves the intercept without curvature
        return np.asarray(np.linalg.lstsq(hessian, gradient, rcond=None)[0])
