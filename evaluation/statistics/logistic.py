"""L2-penalised logistic regression of two classes by Newton's method, started from the solution for another penalty.

A search fits hundreds of small models, on which scikit-learn spends more time on checks than on the fit. The solution is the
same.

The matrix of second derivatives of many columns costs more than all else. It is therefore computed seldom: the steps are solved
by conjugate gradients, with the matrix of an earlier step or penalty as preconditioner. F = features, n = scans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit

STEPS = 100
# Newton's method ends with a step that promises to lower the loss per scan by less than this; the error is its square.
TOLERANCE = 1e-8
# With fewer columns the matrix is computed at every step: that takes less time than conjugate gradients.
MANY_COLUMNS = 200


@dataclass
class Curvature:
    """Second derivatives of the loss without its penalty, from an earlier fit to the same scans; the next fit starts from them.

    They change how long a fit takes. The solution is the same up to the tolerance of the fit.
    """

    products: NDArray[np.float64] | None = None  # (F + 1, F + 1)


def fit_logistic(
    features: NDArray[np.float64], labels: NDArray[np.float64], penalty: float, start: NDArray[np.float64] | None = None,
    curvature: Curvature | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Return the weights and, last, the intercept (F + 1,) of the model with the lowest penalised loss.

    The loss is ``sum_i s_i log(1 + exp(-z_i)) + penalty / 2 |weights|^2``, where z_i is the decision value of scan i, times -1
    for label 0. ``s_i = n / (2 n_c)`` gives both classes the same total weight, as ``class_weight="balanced"``
    does in scikit-learn; ``C`` is ``1 / penalty`` there. The intercept is not penalised.

    Args:
        features: (n, F).
        labels: (n,) of 0 and 1, both present.
        penalty: above 0.
        start: (F + 1,) to start from, for example the solution for a neighbouring penalty; zeros if it is None or worse.
        curvature: of a fit to these scans with another penalty; it is updated.
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
    solver = _NewtonSolver(design, penalties, curvature or Curvature())
    for _ in range(STEPS):
        probability = expit(scores)
        gradient = design.T @ (weights * (probability - positive)) + penalties * solution
        step = solver.step(weights * probability * (1.0 - probability), gradient)
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


class _NewtonSolver:
    """Solves for the steps of Newton's method for one penalty.

    Args:
        design: (n, F + 1), the features and a column of ones.
        penalties: (F + 1,) of the columns.
        curvature: of an earlier fit; updated when the second derivatives are computed.
    """

    def __init__(self, design: NDArray[np.float64], penalties: NDArray[np.float64], curvature: Curvature) -> None:
        self.design, self.penalties, self.curvature = design, penalties, curvature
        self.most = (
            4 + design.shape[1] // 64
        )  # conjugate gradients take longer than the matrix after about so many rounds
        self.factor: tuple[NDArray[np.float64], bool] | None = None
        if design.shape[1] > MANY_COLUMNS and curvature.products is not None:
            self.factor = self._factor(curvature.products)

    def step(self, weights: NDArray[np.float64], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the step (F + 1,) that Newton's method subtracts.

        Args:
            weights: (n,) second derivatives of the loss of each scan by its decision value.
            gradient: (F + 1,).
        """
        if self.factor is not None:
            found = self._conjugate_gradients(weights, gradient, self.factor)
            if found is not None:
                return found
        scaled = self.design * np.sqrt(weights)[:, None]
        products = scaled.T @ scaled  # NumPy computes half of a product of a matrix with itself
        if len(gradient) > MANY_COLUMNS:
            self.curvature.products = products
            self.factor = self._factor(products)
            if self.factor is not None:
                return np.asarray(cho_solve(self.factor, gradient, check_finite=False))
        hessian = products.copy()
        hessian[np.diag_indices_from(hessian)] += self.penalties
        try:
            return np.asarray(cho_solve(cho_factor(hessian, check_finite=False), gradient, check_finite=False))
        except LinAlgError:  # all probabilities are 0 or 1, which leaves the intercept without curvature
            return np.asarray(np.linalg.lstsq(hessian, gradient, rcond=None)[0])

    def _factor(self, products: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool] | None:
        """Return the Cholesky factor of the products with the penalties added; None if they have none."""
        hessian = products.copy()
        hessian[np.diag_indices_from(hessian)] += self.penalties
        try:
            factor, lower = cho_factor(hessian, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return None
        return factor, bool(lower)

    def _conjugate_gradients(
        self, weights: NDArray[np.float64], gradient: NDArray[np.float64], factor: tuple[NDArray[np.float64], bool]
    ) -> NDArray[np.float64] | None:
        """Return the step by conjugate gradients with ``factor`` as preconditioner; None if it takes more than ``most`` rounds.

        The residual falls with the decrease of the loss that the step promises, so that convergence stays quadratic.
        """
        step, residual = np.zeros_like(gradient), gradient.copy()
        towards = np.asarray(cho_solve(factor, residual, check_finite=False))
        direction, norm = towards, float(residual @ towards)
        limit = norm * min(1e-2, norm / len(weights))
        if norm <= 0.0:
            return step
        for _ in range(self.most):
            image = self.design.T @ (weights * (self.design @ direction)) + self.penalties * direction
            length = norm / float(direction @ image)
            step += length * direction
            residual -= length * image
            towards = np.asarray(cho_solve(factor, residual, check_finite=False))
            before, norm = norm, float(residual @ towards)
            if norm <= limit:
                return step
            direction = towards + (norm / before) * direction
        return None
