"""Brain age: the gap between predicted and true age, corrected for its dependence on age.

A regression shrinks its predictions towards the mean, so the age of young people is overestimated and that of old people
underestimated, and the raw gap depends on age as much as on the brain. The correction fits the line of predicted over true
age to training folds and subtracts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BiasLine:
    """predicted ≈ slope x age + intercept (years)."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, ages: NDArray[Any], predicted: NDArray[Any]) -> BiasLine:
        """Fit the line by least squares, usually to healthy training participants.

        Args:
            ages: (N,) true ages in years.
            predicted: (N,) predicted ages in years, out of sample: predictions for a model's own training scans are too
                close to the true ages and give too steep a line.

        Raises:
            ValueError: if there are fewer than two different ages.
        """
        ages, predicted = np.asarray(ages, float), np.asarray(predicted, float)
        if len(ages) < 2 or np.ptp(ages) == 0:
            raise ValueError(f"{len(ages)} ages without a range; a line needs at least two different ages")
        slope, intercept = np.polyfit(ages, predicted, 1)
        return cls(float(slope), float(intercept))

    def gap(self, ages: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.float64]:
        """Return the corrected gap (N,) in years: predicted - (slope x age + intercept).

        Source: de Lange and Cole, NeuroImage: Clinical 26 (2020). Beheshti et al., NeuroImage: Clinical 24 (2019), fit a
        line of the gap over age and subtract that, which gives the same result.
        """
        return np.asarray(predicted, float) - (self.slope * np.asarray(ages, float) + self.intercept)


def corrected_gaps(
    ages: NDArray[Any],
    predicted: NDArray[Any],
    folds: NDArray[Any],
    groups: NDArray[Any],
    healthy: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Return the corrected gaps (N,) of cross-validated predictions, in years.

    The line of each fold is fitted to the healthy participants who have no scan in the fold.

    Args:
        ages: (N,) true ages in years.
        predicted: (N,) out-of-fold predictions in years.
        folds: (N,) the fold in which each scan was predicted.
        groups: (N,) participants; with left-out sites one may be in several folds.
        healthy: (N,) whether a scan may be used for the lines; by default all may.

    Raises:
        ValueError: if the participants outside a fold have fewer than two different ages.
    """
    folds, groups = np.asarray(folds), np.asarray(groups)
    usable = np.ones(len(folds), bool) if healthy is None else np.asarray(healthy, bool)
    gaps = np.empty(len(folds))
    for fold in np.unique(folds):
        inside = folds == fold
        outside = usable & ~np.isin(groups, groups[inside])
        line = BiasLine.fit(ages[outside], predicted[outside])
        gaps[inside] = line.gap(ages[inside], predicted[inside])
    return gaps
