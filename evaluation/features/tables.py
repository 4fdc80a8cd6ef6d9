"""Features of the scans of a task, and their division into training and test scans: confounds, scale, principal axes.

n = training scans, m = test scans, F = features. With more features than training scans an L2-penalised model depends on the
features only through the inner products of the scans, so it is fitted to coordinates (n, n) with the same inner products.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.logistic import Curvature
from evaluation.statistics.ridge import RidgePath
from evaluation.tasks.tasks import Task

SLAB = 2_048  # features worked on at a time, in float64
# More features than this are kept as float32 and worked on in slabs.
WIDE = 8_192
SCALES = ("each", "all")


class Predictions(NamedTuple):
    """Predictions for m test scans.

    ``predicted`` (m,) is a score for a binary task (0 where both classes would be equally likely if they were equally
    common), a class code for a multiclass task and a number for a regression. ``probability`` is that of the positive class
    (m,) or of every class (m, K), for classes as common as in the training scans; NaN (m,) for a regression.
    """

    predicted: NDArray[Any]
    probability: NDArray[Any]


class FeatureBlock(NamedTuple):
    """Columns of a table that have a scale of their own.

    ``columns`` is their number, ``scale`` is ``each`` or ``all``, and ``features`` is the number of features for which they
    stand.
    """

    columns: int
    scale: str
    features: int


@dataclass(frozen=True)
class FeatureTable:
    """Features (N, F) of the N scans of a task, with everything else that a model needs.

    Attributes:
        features: (N, F), float64; or float32, converted a slab at a time. With ``places`` (M, F) of the scans of all tasks.
        labels: (N,).
        groups: (N,) codes of the groups, usually participants.
        kind: ``binary``, ``multiclass`` or ``regression``.
        covariates: (N, C), given to the model beside the features.
        confounds: (N, D), regressed out of the features.
        scale: ``each`` or ``all``; see ``split_features``.
        places: (N,) row of ``features`` of each scan; None: the rows are those of the scans.
        count: number of features that the columns stand for; 0: their number. Coordinates have fewer columns.
        readouts: (N, R) predicted proxies, given to a linear model beside the features; None: none. Confounds are regressed
            out of them as out of features.
        blocks: the columns in order, if they are scaled in blocks: each block by its own scale, and then all blocks to the
            same total variance; the mean variance of all features is 1. Empty: ``scale`` is that of all columns.
    """

    features: NDArray[Any]
    labels: NDArray[Any]
    groups: NDArray[Any]
    kind: str
    covariates: NDArray[Any]
    confounds: NDArray[Any]
    scale: str = "each"
    places: NDArray[Any] | None = None
    count: int = 0
    readouts: NDArray[Any] | None = None
    blocks: tuple[FeatureBlock, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes K of a multiclass task, else 1."""
        return int(self.labels.max()) + 1 if self.kind == "multiclass" else 1

    def rows(self, scans: NDArray[Any]) -> NDArray[Any]:
        """Return the rows (n,) of ``features`` of some scans."""
        return scans if self.places is None else self.places[scans]


@dataclass
class TrainTestSplit:
    """Scaled features and covariates of n training and m test scans. All entries of a grid are fitted to the same split."""

    table: FeatureTable
    train_scans: NDArray[Any]  # (n,) positions in the table
    test_scans: NDArray[Any]  # (m,)
    train_covariates: NDArray[Any]  # (n, C)
    test_covariates: NDArray[Any]  # (m, C)
    last_fit: NDArray[Any] | None = None  # solution of a logistic regression that warm-starts the next penalty
    curvature: Curvature = field(default_factory=Curvature)  # of the same regression
    ridge: RidgePath | None = None  # a regression of numbers without penalised readouts

    @property
    def labels(self) -> NDArray[Any]:
        """Labels (n,) of the training scans."""
        return np.asarray(self.table.labels[self.train_scans])

    @property
    def classes(self) -> int:
        """Number of classes K of a multiclass task, else 1."""
        return self.table.classes

    @property
    def train(self) -> NDArray[Any]:
        """Features (n, F) of the training scans."""
        return self._dense[0]

    @property
    def test(self) -> NDArray[Any]:
        """Features (m, F) of the test scans."""
        return self._dense[1]

    @cached_property
    def _dense(self) -> tuple[NDArray[Any], NDArray[Any]]:
        x, y = self._slab(slice(None))
        mean, divisor = x.mean(0), _divisors(x.std(0), self.table)
        return (x - mean) / divisor, (y - mean) / divisor

    @cached_property
    def readouts(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Predicted proxies of the training (n, R) and test scans (m, R): without confounds, variance 1; R is 0 without any."""
        table, (train, test) = self.table, (self.train_scans, self.test_scans)
        if table.readouts is None:
            return np.empty((len(train), 0)), np.empty((len(test), 0))
        x, y = table.readouts[train], table.readouts[test]
        if table.confounds.shape[1]:
            x, y = _without_confounds(x, y, table.confounds[train], table.confounds[test])
        return standardised(x, y)

    @property
    def _by_slabs(self) -> bool:
        features = self.table.features
        return not self.table.blocks and features.dtype == np.float32 and features.shape[1] > len(self.train_scans)

    @cached_property
    def gram(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products (n, n) of the training scans, and (m, n) of the test scans with them."""
        if not self._by_slabs:
            return self.train @ self.train.T, self.test @ self.train.T
        n, m = len(self.train_scans), len(self.test_scans)
        gram, cross, variance = np.zeros((n, n)), np.zeros((m, n)), 0.0
        columns = self.table.features.shape[1]
        for x, y in (self._slab(slice(first, first + SLAB)) for first in range(0, columns, SLAB)):
            mean, deviation = x.mean(0), x.std(0)
            if self.table.scale == "all":
                variance += float(np.square(deviation).sum())
                deviation = np.ones_like(deviation)
            deviation[deviation < 1e-8] = 1.0
            x, y = (x - mean) / deviation, (y - mean) / deviation
            gram += x @ x.T
            cross += y @ x.T
        if self.table.scale == "all":
            mean_variance = variance / (self.table.count or columns)
            gram, cross = (products / (mean_variance if mean_variance >= 1e-16 else 1.0) for products in (gram, cross))
        return gram, cross

    @cached_property
    def rotated(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Training (n, r) and test (m, r) features on the principal axes of the training scans, r = min(n, F).

        This leaves the predictions of an L2-penalised model unchanged.
        """
        if self._by_slabs:
            gram, cross = self.gram
            values, vectors = _principal_values(gram)
            return vectors * np.sqrt(values), cross @ (vectors / np.sqrt(values))
        if self.train.shape[0] >= self.train.shape[1]:
            return self.train, self.test
        values, vectors = _principal_values(self.train @ self.train.T)
        axes = np.asarray(self.train.T @ (vectors / np.sqrt(values)))  # (F, r), orthonormal
        return self.train @ axes, self.test @ axes

    def _slab(self, columns: slice) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return some features of the training (n, f) and test scans (m, f), without confounds, not scaled."""
        table = self.table
        x, y = (table.features[table.rows(scans), columns] for scans in (self.train_scans, self.test_scans))
        if x.dtype == np.float32:
            x, y = x.astype(np.float64), y.astype(np.float64)
        if table.confounds.shape[1]:
            x, y = _without_confounds(x, y, table.confounds[self.train_scans], table.confounds[self.test_scans])
        return x, y

    def multiclass(self, present: NDArray[Any], probabilities: NDArray[Any]) -> Predictions:
        """Return predictions over all K classes from probabilities (m, k) of the ``present`` (k,) training classes."""
        every = np.zeros((len(probabilities), self.classes))
        every[:, present.astype(np.int64)] = probabilities
        return Predictions(every.argmax(1), every)


def _divisors(deviations: NDArray[Any], table: FeatureTable) -> NDArray[Any]:
    """Return what the columns (F,) are divided by, from their standard deviations over the training scans."""
    if not table.blocks:
        return _of_scale(deviations, table.scale, table.count)
    total = sum(block.features for block in table.blocks)
    ends = np.cumsum([block.columns for block in table.blocks])
    parts = []
    for block, own in zip(table.blocks, np.split(deviations, ends[:-1]), strict=True):
        share = total / (block.features * len(table.blocks))  # that its features' variance becomes
        parts.append(_of_scale(own, block.scale, block.features) / np.sqrt(share))
    return np.concatenate(parts)


def _of_scale(deviations: NDArray[Any], scale: str, count: int) -> NDArray[Any]:
    if scale == "all":
        variance = np.square(deviations).sum() / (count or len(deviations))
        deviations = np.full_like(deviations, np.sqrt(variance))
    return np.where(deviations < 1e-8, 1.0, deviations)


def table_of(
    task: Task, features: NDArray[Any], scale: str, places: NDArray[Any] | None = None, count: int = 0
) -> FeatureTable:
    """Return a task with its features: (N, F), or (M, F) with the row of each of its scans (``places``).

    ``count``: see ``FeatureTable``. More than WIDE features, and shared ones, keep their type.
    """
    none = np.empty((len(task.rows), 0))
    return FeatureTable(
        features.astype(np.float64) if places is None and features.shape[1] <= WIDE else features,
        task.labels, task.groups, task.kind, covariates=none if task.covariates is None else task.covariates,
        confounds=none if task.confounds is None else task.confounds, scale=scale, places=places, count=count,
    )  # fmt: skip


def beside(table: FeatureTable, columns: NDArray[Any]) -> FeatureTable:
    """Return a table (N, F) with other features (N, G) beside its own, each of variance 1 before both get equal parts of it."""
    assert table.places is None
    own = table.blocks or (FeatureBlock(table.features.shape[1], table.scale, table.count or table.features.shape[1]),)
    blocks = (*own, FeatureBlock(columns.shape[1], "each", columns.shape[1]))
    features = np.concatenate([table.features, columns], axis=1, dtype=np.float64)
    return replace(table, features=features, blocks=blocks, count=sum(block.features for block in blocks))


def split_features(table: FeatureTable, train: NDArray[Any], test: NDArray[Any]) -> TrainTestSplit:
    """Regress confounds out of the features and scale them, fitting both to the training rows only.

    ``scale`` ``each`` gives every feature variance 1 over the training scans. ``all`` divides all features by one number,
    which keeps their proportions (needed for the coordinates of voxels); the mean of their variances becomes 1. A table with
    ``blocks`` has a scale for each.

    Args:
        table: the table of N scans.
        train: (n,) positions of the training scans in the table.
        test: (m,) positions of the test scans.

    Returns:
        The split: features (n, F) and (m, F), covariates (n, C) and (m, C), and labels (n,) of the training scans.
    """
    train_covariates, test_covariates = standardised(table.covariates[train], table.covariates[test])
    return TrainTestSplit(table, train, test, train_covariates, test_covariates)


def permuted(table: FeatureTable, rows: NDArray[Any]) -> FeatureTable:
    """Return the table with the features and other columns of the scans ``rows`` (N,); labels and groups stay."""
    changed = {"features": table.features[rows]} if table.places is None else {"places": table.places[rows]}
    if table.readouts is not None:
        changed["readouts"] = table.readouts[rows]
    return replace(table, covariates=table.covariates[rows], confounds=table.confounds[rows], **changed)


def standardised(train: NDArray[Any], test: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scale the columns of train (n, C) and test (m, C) to mean 0 and variance 1 over the training scans; same shapes.

    A missing value becomes the mean. A column that is constant in training becomes 0 in training and in test.
    """
    if not train.shape[1]:
        return train, test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # raised for a column without a value in the training scans
        mean, deviation = np.nan_to_num(np.nanmean(train, axis=0)), np.nan_to_num(np.nanstd(train, axis=0))
    deviation[deviation < 1e-8] = np.inf
    return np.nan_to_num((train - mean) / deviation), np.nan_to_num((test - mean) / deviation)


def coordinates(features: NDArray[Any]) -> NDArray[np.float64]:
    """Return coordinates (N, N) of N scans with the inner products of their features (N, F) minus the mean scan.

    An L2-penalised model that is centred by its training scans and has one scale for all features makes the same predictions
    from them. Neither labels nor folds enter.
    """
    gram = np.zeros((len(features), len(features)))
    for slab in _slabs(features):
        slab -= slab.mean(0)
        gram += slab @ slab.T
    return coordinates_of(gram)


def reduced(features: NDArray[Any], scale: str) -> tuple[NDArray[Any], int]:
    """Return features (N, F), or coordinates in their place if these serve every fold and take less memory; and ``count``.

    They serve with scale ``all``. ``count`` is the number of features that the coordinates stand for, else 0.
    """
    if scale == "all" and features.shape[1] > 2 * len(features):
        return coordinates(features), features.shape[1]
    return features, 0


def coordinates_of(gram: NDArray[Any]) -> NDArray[np.float64]:
    """Return coordinates (N, N) of N scans whose inner products are ``gram`` (N, N), in columns of rising variance."""
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _slabs(features: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for first in range(0, features.shape[1], SLAB):
        yield features[:, first : first + SLAB].astype(np.float64)


def _without_confounds(
    train: NDArray[Any], test: NDArray[Any], train_confounds: NDArray[Any], test_confounds: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Subtract the linear prediction of the features from the confounds, fitted to the training scans."""
    designs = (
        np.column_stack([np.ones(len(confounds)), confounds])
        for confounds in standardised(train_confounds, test_confounds)
    )
    train_design, test_design = designs
    weights = np.linalg.lstsq(train_design, train, rcond=None)[0]
    return train - train_design @ weights, test - test_design @ weights


def _principal_values(gram: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the positive eigenvalues (r,) and their eigenvectors (n, r) of inner products (n, n)."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > max(values[-1], 1e-12) * 1e-12
    return values[kept], vectors[:, kept]
