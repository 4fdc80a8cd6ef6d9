"""Models on features: linear, nearest neighbours, a small network. Everything is fitted to the training scans alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge

from evaluation.statistics.metrics import auc, balanced_accuracy, mae

Array = np.ndarray[Any, np.dtype[Any]]
Point = dict[str, Any]

# Strength of the L2 penalty on standardised features; a probe tries each.
STRENGTHS = [float(s) for s in 10.0 ** np.arange(-1, 6)]
NEIGHBOURS = [1, 3, 7, 15, 31, 63]
# A column so many times as wide is penalised by 1e-8 of the strength: as good as not at all.
UNPENALISED = 1e4


class Predictions(NamedTuple):
    """What a model says of m scans.

    ``answer`` (m,): binary, a score, 0 where both classes are as likely if they were equally common; multiclass, the
    class; regression, the number. ``probability``: binary (m,), of the positive class at the training scans' proportion;
    multiclass (m, K), of every class; regression (m,), NaN.
    """

    predicted: Array
    probability: Array


@dataclass(frozen=True)
class FeatureTable:
    """Features (N, F) of a task's scans with what models are given beside them; ``scale`` each or all: see ``sides``."""

    features: Array
    labels: Array
    groups: Array
    kind: str
    covariates: Array
    confounds: Array
    scale: str = "each"

    @property
    def classes(self) -> int:
        """K: a multiclass task's, else 1."""
        return int(self.labels.max()) + 1 if self.kind == "multiclass" else 1


class Sides(NamedTuple):
    """Training (n) and asked (m) scans, ready for a model."""

    fit: Array
    labels: Array
    ask: Array
    fit_covariates: Array
    ask_covariates: Array
    classes: int  # K of a multiclass task

    def of_classes(self, known: Array, shares: Array) -> Predictions:
        """Predictions from the shares (m, k) of the classes that training scans have."""
        every = np.zeros((len(shares), self.classes))
        every[:, known.astype(np.int64)] = shares
        return Predictions(every.argmax(1), every)


def sides(table: FeatureTable, fit: Array, ask: Array) -> Sides:
    """Confounds regressed out, then features scaled; both fitted to the rows ``fit`` alone.

    ``scale`` each: every feature to variance 1 over the training scans. all: one factor for all features, which keeps
    their proportions (for coordinates of voxels).
    """
    x, y = table.features[fit], table.features[ask]
    if table.confounds.shape[1]:
        known, asked = standardised(table.confounds[fit], table.confounds[ask])
        known, asked = (np.column_stack([np.ones(len(part)), part]) for part in (known, asked))
        weights = np.linalg.lstsq(known, x, rcond=None)[0]
        x, y = x - known @ weights, y - asked @ weights
    mean, deviation = x.mean(0), x.std(0)
    if table.scale == "all":
        deviation = np.full_like(deviation, np.sqrt(np.square(deviation).mean()))
    deviation[deviation < 1e-8] = 1.0
    covariates = standardised(table.covariates[fit], table.covariates[ask])
    return Sides((x - mean) / deviation, table.labels[fit], (y - mean) / deviation, *covariates, table.classes)


def standardised(fit: Array, ask: Array) -> tuple[Array, Array]:
    """Columns to mean 0 and variance 1, a missing value to the mean; by the training scans."""
    if not fit.shape[1]:
        return fit, ask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of which no training scan has a value
        mean, deviation = np.nan_to_num(np.nanmean(fit, axis=0)), np.nan_to_num(np.nanstd(fit, axis=0))
    deviation[deviation < 1e-8] = np.inf  # constant in training: nothing can be said of other values
    return np.nan_to_num((fit - mean) / deviation), np.nan_to_num((ask - mean) / deviation)


def linear(given: Sides, kind: str, point: Point, seed: int) -> Predictions:
    """Logistic or ridge regression with L2 penalty ``strength``; covariates are not penalised.

    Features are rotated onto the training scans' principal axes first: an L2 penalty gives the same answers there, in
    min(n, F) dimensions.
    """
    axes = _axes(given.fit)
    fit, ask = (
        np.column_stack([features @ axes, UNPENALISED * covariates])
        for features, covariates in ((given.fit, given.fit_covariates), (given.ask, given.ask_covariates))
    )
    if kind == "regression":
        return _numbers(Ridge(alpha=point["penalty"]).fit(fit, given.labels).predict(ask))
    model = LogisticRegression(
        C=1.0 / point["penalty"], max_iter=300, class_weight="balanced", solver="newton-cholesky"
    )
    if kind == "multiclass":
        # All classes at once; newton-cholesky would fit each against the others.
        model.set_params(solver="lbfgs")
    with warnings.catch_warnings():
        # Of convergence: a penalty with which a fit ends early is judged like the others.
        warnings.simplefilter("ignore")
        model.fit(fit, given.labels)
    if kind == "multiclass":
        return given.of_classes(model.classes_, model.predict_proba(ask))
    # The classes were weighted to be equally common; their proportion moves the intercept by its log odds.
    score = np.asarray(model.decision_function(ask))
    return Predictions(score, expit(score + log_odds(given.labels)))


def _axes(features: Array) -> Array:
    """(F, r) orthonormal axes that hold all of the training scans."""
    if features.shape[0] >= features.shape[1]:
        return np.eye(features.shape[1])
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values > max(values[-1], 1e-12) * 1e-12
    return np.asarray(features.T @ (vectors[:, kept] / np.sqrt(values[kept])))


def log_odds(labels: Array) -> float:
    share = float(np.mean(labels))
    return float(np.log(share / (1.0 - share)))


def _numbers(answer: Array) -> Predictions:
    return Predictions(np.asarray(answer, dtype=np.float64), np.full(len(answer), np.nan))


def neighbours(given: Sides, kind: str, point: Point, seed: int) -> Predictions:
    """The ``k`` training scans nearest by cosine, each weighing exp(similarity / 0.1); classes count by their rarity."""
    fit, ask = (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
                for features in (given.fit, given.ask))  # fmt: skip
    similarity = ask @ fit.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : point["k"]]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1.0) / 0.1)
    labels = given.labels[nearest]
    if kind == "regression":
        return _numbers((weights * labels).sum(1) / weights.sum(1))
    classes, counts = np.unique(given.labels, return_counts=True)
    votes = np.stack([(weights * (labels == name)).sum(1) for name in classes], axis=1)
    rarity = votes / counts
    if kind == "multiclass":
        return given.of_classes(classes, rarity / rarity.sum(1, keepdims=True))
    # Half a vote for either class, at their proportion: one neighbour is no certainty.
    prior = counts / counts.sum()
    share = (votes + prior * weights.mean(1, keepdims=True)) / (votes.sum(1) + weights.mean(1))[:, None]
    odds = np.log(share[:, 1]) - np.log(share[:, 0])
    return Predictions(odds - log_odds(given.labels), share[:, 1])


def network(given: Sides, kind: str, point: Point, seed: int) -> Predictions:
    """A perceptron with one hidden layer (scikit-learn's), covariates beside the features."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    axes = _axes(given.fit)
    fit, ask = (
        np.column_stack([features @ axes, covariates])
        for features, covariates in ((given.fit, given.fit_covariates), (given.ask, given.ask_covariates))
    )
    options = {
        "hidden_layer_sizes": (point["hidden"],), "alpha": point["alpha"], "learning_rate_init": point["lr"],
        "max_iter": point["epochs"], "batch_size": min(32, len(fit)), "random_state": seed,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so many epochs were not enough: they are a choice here
        if kind == "regression":
            mean, deviation = given.labels.mean(), given.labels.std() or 1.0
            model = MLPRegressor(**options).fit(fit, (given.labels - mean) / deviation)
            return _numbers(model.predict(ask) * deviation + mean)
        shares = MLPClassifier(**options).fit(fit, given.labels).predict_proba(ask)
    if kind == "multiclass":
        return given.of_classes(np.unique(given.labels), shares)
    bounded = np.clip(shares[:, 1], 1e-9, 1 - 1e-9)
    return Predictions(np.log(bounded / (1 - bounded)) - log_odds(given.labels), shares[:, 1])


Model = Callable[[Sides, str, Point, int], Predictions]
MODELS: dict[str, Model] = {"linear": linear, "knn": neighbours, "mlp": network}
# What each is tried with; the network's are drawn by Optuna (evaluation.search).
GRIDS: dict[str, list[Point]] = {
    "linear": [{"penalty": strength} for strength in STRENGTHS],
    "knn": [{"k": k} for k in NEIGHBOURS],
}


def fit_predict(model: str, point: Point, table: FeatureTable, fit: Array, ask: Array, seed: int = 0) -> Predictions:
    """Fit a model of ``MODELS`` to the rows ``fit`` of a table and ask it about the rows ``ask``."""
    if table.kind != "regression" and len(np.unique(table.labels[fit])) < 2:
        known = float(table.labels[fit][0])
        if table.kind == "multiclass":
            return Predictions(np.full(len(ask), known), np.eye(table.classes)[np.full(len(ask), int(known))])
        return Predictions(np.full(len(ask), 2 * known - 1), np.full(len(ask), known))
    return MODELS[model](sides(table, fit, ask), table.kind, point, seed)


def score(labels: Array, predicted: Array, kind: str) -> float:
    """The figure by which a point is chosen; higher is better."""
    if kind == "binary":
        return auc(labels, predicted)
    return balanced_accuracy(labels, predicted) if kind == "multiclass" else -mae(labels, predicted)
