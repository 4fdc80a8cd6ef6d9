"""Brain age: the gap between predicted and real age, freed of its slope over age.

A regression shrinks towards the mean, so the young are guessed too old and the old too young, and the raw gap measures
age as much as the brain. The line that describes this is fitted on training folds only, and taken off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.statistics.intervals import Array


@dataclass(frozen=True)
class BiasLine:
    """predicted ≈ slope x age + intercept, among people it was fitted on (years)."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, ages: Array, predicted: Array) -> BiasLine:
        """Least squares over healthy training participants; ``predicted`` must be out-of-sample ages (N,), in years.

        Predictions for the scans that a model was itself trained on lie too near the truth and would give too steep a
        line. ValueError where there are not two different ages.
        """
        ages, predicted = np.asarray(ages, float), np.asarray(predicted, float)
        if len(ages) < 2 or np.ptp(ages) == 0:
            raise ValueError(f"{len(ages)} ages spanning no range: a line needs two different ones")
        slope, intercept = np.polyfit(ages, predicted, 1)
        return cls(float(slope), float(intercept))

    def gap(self, ages: Array, predicted: Array) -> Array:
        """Corrected brain-age gap (N,) in years: predicted - (slope x age + intercept).

        de Lange and Cole (NeuroImage: Clinical 26, 2020). Beheshti et al. (NeuroImage: Clinical 24, 2019) fit the gap
        over age instead and take that line off, which is the same number.
        """
        return np.asarray(predicted, float) - (self.slope * np.asarray(ages, float) + self.intercept)

    def predicted_age(self, ages: Array, predicted: Array) -> Array:
        """Age plus corrected gap (N,) in years.

        It uses the person's real age. Its MAE therefore says nothing about how well a model predicts age, and grows
        better the worse the model is (Butler et al., Human Brain Mapping 42, 2021): never report it as one.
        """
        return np.asarray(ages, float) + self.gap(ages, predicted)

    def unbiased_age(self, predicted: Array) -> Array:
        """(predicted - intercept) / slope (N,) in years, without using the real age (Cole et al. 2018).

        Its errors are larger by 1 / slope than the raw ones. ValueError where the slope is not positive: such a model
        knows nothing of age.
        """
        if self.slope <= 0:
            raise ValueError(f"slope={self.slope:.3g}: predictions that do not rise with age cannot be rescaled")
        return (np.asarray(predicted, float) - self.intercept) / self.slope


def corrected_gaps(ages: Array, predicted: Array, folds: Array, groups: Array, healthy: Array | None = None) -> Array:
    """Corrected gaps (N,) of cross-validated predictions; each fold's line comes from healthy people who are not in it.

    ages, predicted (N,) years, out-of-fold; folds (N,) the fold in which each scan was predicted; groups (N,)
    participants, who may be in several folds where sites are left out; healthy (N,) whom to fit the line on (default
    all). ValueError where those outside a fold do not have two different ages.
    """
    folds, groups = np.asarray(folds), np.asarray(groups)
    fit = np.ones(len(folds), bool) if healthy is None else np.asarray(healthy, bool)
    gaps = np.empty(len(folds))
    for fold in np.unique(folds):
        mine = folds == fold
        outside = fit & ~np.isin(groups, groups[mine])
        line = BiasLine.fit(ages[outside], predicted[outside])
        gaps[mine] = line.gap(ages[mine], predicted[mine])
    return gaps
