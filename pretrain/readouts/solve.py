"""Ridge regression with nested choice of the penalty, exact, from sums over the scans of each fold.

Notation: n scans, F features, P targets (columns), K folds of people, G entries of the grid (scale x penalty).

A fit to some folds needs only their sums: of x, y, xx', xy' and y². One pass over the scans collects them for each fold
(``Moments``). Every fit of the nested cross-validation, and the squared error of a fold under any fit, then follows from
additions. The sums take K F² numbers, so this is the way for F <= n. Otherwise ``Samples`` keeps the features and solves the
dual problem of the same regression in n x n.

Scale and penalty are chosen by nested cross-validation (``nested_ridge``), or by the errors of people who are not fitted to
(``calibrated_ridge``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FOLDS = 5
# Multiples of the sum of squared coefficients, as ``alpha`` of scikit-learn's Ridge.
PENALTIES = tuple(float(penalty) for penalty in 10.0 ** np.arange(-1, 8))
SCALES = ("each", "all")  # every feature to variance 1, or all features divided by one number
GRID = tuple((scale, penalty) for scale in SCALES for penalty in PENALTIES)
BLOCK = 1024  # scans or features that are converted to float64 at a time


@dataclass(frozen=True)
class Fits:
    """Coefficients (G, F, P) and intercepts (G, P) of all entries of the grid, for features and targets as they are."""

    coefficients: Floats
    intercepts: Floats


class Folds(Protocol):
    """The scans of K folds, as far as a ridge regression needs them."""

    def fit(self, folds: Collection[int]) -> Fits:
        """Fit every entry of the grid to the scans of some folds."""

    def squared_errors(self, fold: int, fits: Fits) -> Floats:
        """Return the summed squared errors (G, P) of a fold's scans."""


@dataclass
class Moments:
    """Sums over the scans of each fold. Those of several ranks are added.

    ``shift`` (F,) and ``target_shift`` (P,) are subtracted from features and targets first. They must be the same on all
    ranks; values near the means keep the digits of the sums.
    """

    shift: Floats
    target_shift: Floats
    count: Floats  # (K,)
    x: Floats  # (K, F)
    y: Floats  # (K, P)
    xx: Floats  # (K, F, F)
    xy: Floats  # (K, F, P)
    yy: Floats  # (K, P)

    @classmethod
    def empty(cls, shift: NDArray[Any], target_shift: NDArray[Any], folds: int = FOLDS) -> Moments:
        """Return the sums of no scans."""
        features, targets = len(shift), len(target_shift)
        shapes = [
            (folds,),
            (folds, features),
            (folds, targets),
            (folds, features, features),
            (folds, features, targets),
        ]
        sums = [np.zeros(shape) for shape in (*shapes, (folds, targets))]
        return cls(np.asarray(shift, np.float64), np.asarray(target_shift, np.float64), *sums)

    def add(self, features: NDArray[Any], targets: Floats, folds: NDArray[np.integer[Any]]) -> None:
        """Add scans: features (n, F), targets (n, P) and the fold (n,) of each, a block of scans at a time."""
        for start in range(0, len(features), BLOCK):
            block = slice(start, start + BLOCK)
            block_folds = folds[block]
            x_all = np.asarray(features[block], np.float64) - self.shift
            y_all = targets[block] - self.target_shift
            for fold in np.unique(block_folds):
                x, y = x_all[block_folds == fold], y_all[block_folds == fold]
                self.count[fold] += len(x)
                self.x[fold] += x.sum(0)
                self.y[fold] += y.sum(0)
                self.xx[fold] += x.T @ x
                self.xy[fold] += x.T @ y
                self.yy[fold] += np.square(y).sum(0)

    def reduce(self, add_over_ranks: Callable[[Floats], None]) -> None:
        """Add the sums of all ranks in place. Collective."""
        for entry in fields(self)[2:]:
            add_over_ranks(getattr(self, entry.name))

    def fit(self, folds: Collection[int]) -> Fits:
        """Fit every entry of the grid to the scans of some folds."""
        chosen = list(folds)
        count = self.count[chosen].sum()
        mean, target_mean = self.x[chosen].sum(0) / count, self.y[chosen].sum(0) / count
        covariance = self.xx[chosen].sum(0) - count * np.outer(mean, mean)
        products = self.xy[chosen].sum(0) - count * np.outer(mean, target_mean)
        variances = np.clip(np.diagonal(covariance) / count, 0.0, None)
        solutions = []
        for scale in SCALES:
            deviation = _deviations(variances, scale)
            scaled, right = covariance / np.outer(deviation, deviation), products / deviation[:, None]
            solutions += [_solve(scaled, penalty, right) / deviation[:, None] for penalty in PENALTIES]
        coefficients = np.stack(solutions)
        intercepts = target_mean + self.target_shift - (mean + self.shift) @ coefficients
        return Fits(coefficients, intercepts)

    def squared_errors(self, fold: int, fits: Fits) -> Floats:
        """Return the summed squared errors (G, P) of a fold's scans."""
        w_GFP = fits.coefficients
        # Intercepts for shifted features and targets.
        b_GP = fits.intercepts + self.shift @ w_GFP - self.target_shift
        quadratic = np.einsum("gfp,gfp->gp", w_GFP, np.tensordot(self.xx[fold], w_GFP, (1, 1)).transpose(1, 0, 2))
        mixed = np.einsum("gfp,fp->gp", w_GFP, self.xy[fold])
        of_intercept = self.count[fold] * b_GP**2 + 2 * b_GP * (self.x[fold] @ w_GFP - self.y[fold])
        return np.asarray(self.yy[fold] - 2 * mixed + quadratic + of_intercept)


@dataclass
class Samples:
    """The scans themselves: features (n, F), targets (n, P) and folds (n,). Fits are solved in the dual, in n x n."""

    features: NDArray[Any]
    targets: Floats
    folds: NDArray[np.integer[Any]]

    def fit(self, folds: Collection[int]) -> Fits:
        """Fit every entry of the grid to the scans of some folds."""
        rows = np.flatnonzero(np.isin(self.folds, list(folds)))
        mean = np.concatenate([block.mean(0) for _, block in self._blocks(rows)])
        variances = np.concatenate([block.var(0) for _, block in self._blocks(rows)])
        targets = self.targets[rows]
        target_mean = targets.mean(0)
        solutions = []
        for scale in SCALES:
            deviation = _deviations(variances, scale)
            gram = np.zeros((len(rows), len(rows)))
            for columns, block in self._blocks(rows):
                scaled = (block - mean[columns]) / deviation[columns]
                gram += scaled @ scaled.T
            duals = np.stack([_solve(gram, penalty, targets - target_mean) for penalty in PENALTIES])
            parts = [
                (block - mean[columns]).T @ duals / np.square(deviation[columns])[:, None]
                for columns, block in self._blocks(rows)
            ]
            solutions.append(np.concatenate(parts, axis=1))
        coefficients = np.concatenate(solutions)
        return Fits(coefficients, target_mean - mean @ coefficients)

    def squared_errors(self, fold: int, fits: Fits) -> Floats:
        """Return the summed squared errors (G, P) of a fold's scans."""
        rows = np.flatnonzero(self.folds == fold)
        predicted_GnP = np.asarray(self.features[rows], np.float64) @ fits.coefficients + fits.intercepts[:, None]
        return np.asarray(np.square(predicted_GnP - self.targets[rows]).sum(1))

    def _blocks(self, rows: NDArray[np.integer[Any]]) -> Any:
        """Yield slices of the features with their values (len(rows), up to BLOCK) in float64."""
        for start in range(0, self.features.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            yield columns, np.asarray(self.features[rows, columns], np.float64)


@dataclass(frozen=True)
class NestedRidge:
    """Ridge fits for P targets, with errors out of fold or of calibration people.

    Attributes:
        coefficients: (F, P) fitted to all people of the fit, with the entry of the grid that is best over all folds.
        intercepts: (P,) of the fits above.
        entries: (P,) numbers of these entries in ``GRID``.
        fold_coefficients: (K, F, P) of fold k, with the entry that is best over the other folds. Out of fold they are fitted
            without fold k; with calibration people, who are in these folds, to all people of the fit.
        fold_intercepts: (K, P) of the fits above.
    """

    coefficients: Floats
    intercepts: Floats
    entries: NDArray[np.int64]
    fold_coefficients: Floats
    fold_intercepts: Floats


def nested_ridge(data: Folds, folds: int = FOLDS, beat: Callable[[], None] = lambda: None) -> NestedRidge:
    """Fit ridge regressions to all folds and to all but each fold, choosing scale and penalty within the folds they see.

    The entry of the grid for the fit without fold k has the smallest squared error on the other folds j, each predicted
    without folds k and j. Equal errors are decided by the order of the grid. ``beat`` is called after every fit.
    """
    every = range(folds)
    inner: list[Any] = [0.0] * folds  # inner[k]: errors (G, P) on folds j != k of fits without k and j
    for first in every:
        for second in range(first + 1, folds):
            fits = data.fit([fold for fold in every if fold not in (first, second)])
            inner[first] = inner[first] + data.squared_errors(second, fits)
            inner[second] = inner[second] + data.squared_errors(first, fits)
            beat()
    outer: Any = 0.0
    fold_fits = []
    for fold in every:
        fits = data.fit([other for other in every if other != fold])
        outer = outer + data.squared_errors(fold, fits)
        fold_fits.append(_pick(fits, np.argmin(inner[fold], axis=0)))
        beat()
    entries = np.argmin(outer, axis=0)
    coefficients, intercepts = _pick(data.fit(every), entries)
    fold_coefficients, fold_intercepts = (np.stack(parts) for parts in zip(*fold_fits, strict=True))
    return NestedRidge(coefficients, intercepts, entries, fold_coefficients, fold_intercepts)


def calibrated_ridge(
    data: Folds, errors_of: Callable[[Fits], Floats], beat: Callable[[], None] = lambda: None
) -> NestedRidge:
    """Fit ridge regressions to the only fold of ``data``, choosing scale and penalty by the errors of other people.

    These calibration people are in K folds. The fit of fold k has the entry of the grid that is best on the other folds, so
    that its errors on fold k are those of people who have chosen nothing. Equal errors are decided by the order of the grid.

    Args:
        data: the scans of the fit, all in fold 0.
        errors_of: returns the summed squared errors (K, G, P) of each fold of the calibration people.
        beat: called after the fit and after the errors.
    """
    fits = data.fit([0])
    beat()
    errors_KGP = errors_of(fits)
    beat()
    entries = np.argmin(errors_KGP.sum(0), axis=0)
    coefficients, intercepts = _pick(fits, entries)
    chosen = [np.argmin(np.delete(errors_KGP, fold, axis=0).sum(0), axis=0) for fold in range(len(errors_KGP))]
    fold_coefficients, fold_intercepts = (
        np.stack(parts) for parts in zip(*(_pick(fits, each) for each in chosen), strict=True)
    )
    return NestedRidge(coefficients, intercepts, entries, fold_coefficients, fold_intercepts)


def _pick(fits: Fits, entries: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the coefficients (F, P) and intercepts (P,) of one entry of the grid for each target."""
    targets = np.arange(len(entries))
    return fits.coefficients[entries, :, targets].T.copy(), fits.intercepts[entries, targets].copy()


def _deviations(variances: Floats, scale: str) -> Floats:
    """Return what the features (F,) are divided by; 1 for features that do not vary."""
    deviation = np.sqrt(variances if scale == "each" else np.full_like(variances, variances.mean()))
    return np.where(deviation < 1e-8, 1.0, deviation)


def _solve(matrix: Floats, penalty: float, right: Floats) -> Floats:
    """Return the solution of (matrix + penalty I) s = right, for a symmetric matrix without negative eigenvalues."""
    penalised = matrix.copy()
    penalised[np.diag_indices_from(penalised)] += penalty
    from scipy.linalg import cho_factor, cho_solve  # only here: most commands that import this module solve nothing

    factor = cho_factor(penalised, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(cho_solve(factor, right, check_finite=False))
