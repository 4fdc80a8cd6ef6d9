"""Linear probes on frozen features, and the folds they are judged on. Everything is fitted inside its fold."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from evaluation.statistics import auc, balanced_accuracy, mae

Array = np.ndarray[Any, np.dtype[Any]]
Fold = tuple[Array, Array]  # rows to fit, rows to predict

# Strength of the L2 penalty on standardised features; a probe tries each.
STRENGTHS = [float(s) for s in 10.0 ** np.arange(-1, 6)]


def folds_of(labels: Array, groups: Array, kind: str, count: int, seed: int) -> list[Fold]:
    """``count`` folds in which no participant is on both sides; classes (or tenths of a number's range) spread alike."""
    strata = labels if kind != "regression" else np.searchsorted(np.quantile(labels, np.arange(0.2, 1.0, 0.2)), labels)
    smallest = np.bincount(np.unique(strata, return_inverse=True)[1]).min()
    if smallest >= count:
        splitter: Any = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    else:
        splitter = GroupKFold(count, shuffle=True, random_state=seed)
    return list(splitter.split(labels, strata, groups))


def fit_predict(train: Array, labels: Array, test: Array, kind: str, strength: float) -> Array:
    """Fit a probe on ``train`` (n, F) and give its answers for ``test`` (m, F).

    Binary: the decision value; multiclass: the class; regression: the number. Features are standardised by the training
    rows, then rotated onto their principal axes: an L2 probe gives the same answers there, in min(n, F) dimensions.
    """
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation < 1e-8] = 1.0
    fit, ask = (train - mean) / deviation, (test - mean) / deviation
    axes = np.linalg.svd(fit, full_matrices=False)[2]
    fit, ask = fit @ axes.T, ask @ axes.T
    if kind == "regression":
        return np.asarray(Ridge(alpha=strength).fit(fit, labels).predict(ask))
    if len(np.unique(labels)) < 2:
        return np.full(len(test), labels[0])
    probe = LogisticRegression(C=1.0 / strength, max_iter=300, class_weight="balanced").fit(fit, labels)
    return np.asarray(probe.decision_function(ask) if kind == "binary" else probe.predict(ask))


def score(labels: Array, predicted: Array, kind: str) -> float:
    """The figure by which a penalty is chosen; higher is better."""
    if kind == "binary":
        return auc(labels, predicted)
    return balanced_accuracy(labels, predicted) if kind == "multiclass" else -mae(labels, predicted)


def inner_score(features: Array, labels: Array, groups: Array, kind: str, strength: float, seed: int) -> float:
    """Mean score over three inner folds of the training rows alone."""
    scores = []
    for fit, ask in folds_of(labels, groups, kind, 3, seed):
        scores.append(score(labels[ask], fit_predict(features[fit], labels[fit], features[ask], kind, strength), kind))
    return float(np.nanmean(scores))


def curve_draws(
    labels: Array, groups: Array, sizes: list[int], draws: int, seed: int
) -> tuple[Array, dict[int, list[Array]]]:
    """A fixed third of the participants to test on, and ``draws`` training sets of each size from the others.

    They depend on the task and the seed alone, so that every checkpoint is judged on the same ones. A training set has
    one scan a participant and the classes in the proportion of all; sizes that the data cannot give are left out.
    """
    test = folds_of(labels, groups, "binary", 3, seed)[0][1]
    pool = np.setdiff1d(np.arange(len(labels)), test)
    pool = pool[np.unique(groups[pool], return_index=True)[1]]
    classes = [pool[labels[pool] == code] for code in (0, 1)]
    chosen: dict[int, list[Array]] = {}
    for size in sizes:
        counts = [round(size * len(members) / len(pool)) for members in classes]
        if size > len(pool) or min(counts) < 3:
            continue
        chosen[size] = []
        for draw in range(draws):
            # Keyed by size and number, so that asking for other sizes changes no draw.
            generator = np.random.Generator(np.random.Philox(key=[seed, 0xC0DE], counter=[0, 0, size, draw]))
            parts = [generator.permutation(members)[:n] for members, n in zip(classes, counts, strict=True)]
            chosen[size].append(np.concatenate(parts))
    return test, chosen
