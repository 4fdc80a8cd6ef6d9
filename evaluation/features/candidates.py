"""Which features to use: candidates are compared on the inner folds of each training set, by ridge regression.

A candidate is a block of the encoder, a pooling and a scale. Ridge regression on numbers, or on classes of equal weight, gives
the answers of all penalties from one decomposition; logistic regression would take minutes for what this does in seconds.
n = training scans, m = test scans, C = covariates, R = readouts, K = targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from evaluation.features.tables import FeatureBlock, FeatureTable, TrainTestSplit, reduced, split_features, table_of
from evaluation.statistics.metrics import inner_metric
from evaluation.tasks.tasks import Task
from pretrain.encoders.pooling import GRIDS, feature_count, map_shapes
from pretrain.weights.layers import OWN, Block, main_blocks

MOST_FEATURES = 50_000  # of a candidate: 200 kB a scan
MOST_BLOCKS = 6  # of an encoder with more, such as a ViT, so many are tried, evenly spaced, with the last
POOLED_BY = ("mean", "grid3", "none")


class FeatureChoice(NamedTuple):
    """Features that can be chosen: their name (layer, pooling, scale) and the table of a task with them."""

    params: dict[str, str]
    table: FeatureTable


def candidate_blocks(network: nn.Module, sides: Sequence[int]) -> list[Block]:
    """Return the blocks and poolings that ``--layer auto`` chooses from; the encoder's own features come first.

    They are the main blocks of the encoder with the poolings POOLED_BY, as far as the map of scans of ``sides`` voxels has more
    positions than cells and the features are at most MOST_FEATURES.
    """
    names = main_blocks(network)
    last = len(names) - 1
    if len(names) > MOST_BLOCKS:
        names = [names[round(number * last / (MOST_BLOCKS - 1))] for number in range(MOST_BLOCKS)]
    blocks: list[Block] = [(None, OWN)]
    end = [name for name, _ in getattr(network, "trunk", network).named_children()][-1:]
    repeats_own = {(name, "mean") for name in end if getattr(network, "pooling", "") == "mean"}
    for name, channels, map_sides in _maps(network, names, sides):
        for pooling in POOLED_BY:
            fits = pooling not in GRIDS or min(map_sides) >= GRIDS[pooling]
            differs = pooling == "mean" or math.prod(map_sides) > (27 if pooling == "grid3" else 1)
            differs = differs and (name, pooling) not in repeats_own
            if fits and differs and feature_count(pooling, channels, map_sides) <= MOST_FEATURES:
                blocks.append((name, (pooling,)))
    return blocks


def spatial_block(network: nn.Module, sides: Sequence[int]) -> Block | None:
    """Return the block and pooling of an encoder's spatial features for scans of ``sides`` voxels; None if it has none.

    They are every position of the deepest main block whose map has four positions or more along each side; if no block has
    four, it is three, then two. A map of more than MOST_FEATURES does not count. If no map is left: the cells of grid3 of the
    deepest block that has them within that limit.
    """
    maps = _maps(network, main_blocks(network), sides)[::-1]
    for pooling, least in (("none", 4), ("none", 3), ("none", 2), ("grid3", 3)):
        for name, channels, map_sides in maps:
            if min(map_sides) >= least and feature_count(pooling, channels, map_sides) <= MOST_FEATURES:
                return name, (pooling,)
    return None


def joined(own: NDArray[Any], spatial: NDArray[Any] | None) -> tuple[NDArray[np.float64], tuple[FeatureBlock, ...]]:
    """Return an encoder's own features (N, F) beside its spatial ones (N, G), if it has any, as columns of a table in blocks.

    Own features have variance 1 each, spatial ones have one scale, and both kinds the same total variance. Coordinates stand
    for spatial features that are many (``reduced``).
    """
    parts, blocks = [], []
    for features, scale in ((own, "each"), (spatial, "all")):
        if features is not None:
            columns, count = reduced(features, scale)
            parts.append(columns.astype(np.float64))
            blocks.append(FeatureBlock(columns.shape[1], scale, count or columns.shape[1]))
    return np.concatenate(parts, axis=1), tuple(blocks)


def joint_table(task: Task, columns: NDArray[np.float64], blocks: tuple[FeatureBlock, ...]) -> FeatureTable:
    """Return a task with the columns (n, F) of its scans, in blocks (``joined``)."""
    return replace(table_of(task, columns, "each", count=sum(block.features for block in blocks)), blocks=blocks)


def _maps(network: nn.Module, names: Sequence[str], sides: Sequence[int]) -> list[tuple[str, int, tuple[int, ...]]]:
    """Return name, channels and sides of the map of each of these blocks that has one, for scans of ``sides`` voxels."""
    multiple = getattr(network, "multiple", 1)
    patches = [-(-side // multiple) for side in sides]
    trunk = getattr(network, "trunk", network)
    shapes = map_shapes(trunk, names, [side * multiple for side in patches])
    maps = []
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) == 4:
            maps.append((name, shape[0], tuple(shape[1:])))
        elif len(shape) == 2:  # tokens (T, C)
            maps.append((name, shape[1], tuple(patches)))
    return maps


def candidate_scores(
    candidates: Sequence[FeatureChoice], train: NDArray[Any], folds: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    penalties: Sequence[float], readout_penalties: Sequence[float] = (0.0,),
) -> NDArray[np.float64]:  # fmt: skip
    """Return for each candidate its best mean score over the inner folds of the rows ``train``: (candidates,).

    The best is over all pairs of a penalty and a penalty of the readouts, as in the fit that follows. ``folds`` are positions
    in ``train``. NaN if the score is undefined on all of them. No other rows are used.
    """
    best = []
    for _, table in candidates:
        scores = []
        for inner, test in folds:
            labels = table.labels[train[test]]
            if table.kind != "regression" and len(np.unique(table.labels[train[inner]])) < 2:
                continue
            split = split_features(table, train[inner], train[test])
            answers = ridge_answers(split, table.kind, penalties, readout_penalties)
            scores.append([inner_metric(labels, predicted, table.kind) for predicted in answers])
        means = [np.nanmean(column) if np.isfinite(column).any() else np.nan for column in np.array(scores).T]
        best.append(np.nanmax(means) if np.isfinite(means).any() else np.nan)
    return np.array(best)


def ridge_answers(
    split: TrainTestSplit, kind: str, penalties: Sequence[float], readout_penalties: Sequence[float] = (0.0,)
) -> list[NDArray[Any]]:
    """Return the predictions (m,) for the m test scans of ridge regression with each penalty and penalty of the readouts.

    They are in the order of ``penalties``, and of ``readout_penalties`` for each. Intercept and covariates are not penalised,
    nor are readouts with the penalty 0. Classes have equal weight. A binary task is a regression on -1 and 1, and its
    predictions are the scores. A multiclass task is a regression on K columns, one for each class; its predictions are the
    numbers (int, 0 to K - 1) of the columns with the largest score.
    """
    gram, cross = split.gram
    targets_nK, root = _targets(split, kind)
    design, readouts = root * _with_intercept(split.train_covariates), root * split.readouts[0]
    test_design, test_readouts = _with_intercept(split.test_covariates), split.readouts[1]
    inverse = np.linalg.pinv(design)
    # Unpenalised columns are projected out of everything else (Frisch, Waugh and Lovell); of the features, here of their inner
    # products.
    residual = np.eye(len(gram)) - design @ inverse
    weighted = root * gram * root.T
    values, vectors = np.linalg.eigh(residual @ weighted @ residual)
    test_axes = (cross * root.T - test_design @ (inverse @ weighted)) @ residual @ vectors
    axes = vectors.T @ residual
    targets, columns, values = axes @ (root * targets_nK), axes @ readouts, np.maximum(values, 0.0)[:, None]
    answers = []
    for penalty in penalties:
        # With the best features for any weights of the readouts, what is left is a ridge regression on the readouts alone.
        left = columns.T * (penalty / (values + penalty)).T
        for of_readouts in readout_penalties:
            system = left @ columns + of_readouts * np.eye(columns.shape[1])
            weights = np.linalg.pinv(system, hermitian=True) @ (left @ targets)
            base = test_design @ (inverse @ (root * targets_nK - readouts @ weights)) + test_readouts @ weights
            answers.append(base + test_axes @ ((targets - columns @ weights) / (values + penalty)))
    return [answer.argmax(1) if kind == "multiclass" else answer[:, 0] for answer in answers]


def _targets(split: TrainTestSplit, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the targets (n, K) and the square roots of the weights (n, 1) of the training scans."""
    labels = split.labels
    if kind == "regression":
        return labels[:, None].astype(np.float64), np.ones((len(labels), 1))
    codes, counts = np.unique(labels, return_counts=True)
    root = np.sqrt(len(labels) / (len(codes) * counts[np.searchsorted(codes, labels)]))[:, None]
    if kind == "multiclass":
        return np.eye(split.classes)[labels.astype(np.int64)], root
    return 2.0 * labels[:, None] - 1.0, root


def _with_intercept(covariates: NDArray[Any]) -> NDArray[np.float64]:
    return np.column_stack([np.ones(len(covariates)), covariates])
