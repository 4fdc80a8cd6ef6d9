"""Models on frozen features: linear, nearest neighbours and a small perceptron; all are fitted to training scans only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge

from evaluation.features.tables import FeatureTable as FeatureTable  # re-exported for users' models
from evaluation.features.tables import Predictions as Predictions
from evaluation.features.tables import TrainTestSplit as TrainTestSplit
from evaluation.features.tables import split_features
from evaluation.statistics.logistic import fit_logistic
from evaluation.statistics.metrics import inner_metric as inner_metric
from evaluation.statistics.ridge import RidgePath

Params = dict[str, Any]

# A column scaled by 1e4 is penalised by 1e-8 of the penalty: effectively unpenalised.
UNPENALISED = 1e4


def linear(split: TrainTestSplit, kind: str, params: Params, seed: int) -> Predictions:
    """Fit logistic or ridge regression with the L2 penalty ``params["penalty"]``; covariates are not penalised.

    Readouts have the penalty ``params["readout_penalty"]``; without it, or if it is 0, they are not penalised.
    """
    of_readouts = params.get("readout_penalty")
    # A column that is multiplied by w is penalised by 1/w² of the penalty.
    weight = np.sqrt(params["penalty"] / of_readouts) if of_readouts else UNPENALISED
    covariates = (split.train_covariates, split.test_covariates)
    train, test = (
        np.column_stack([features, UNPENALISED * beside, weight * readouts])
        for features, beside, readouts in zip(split.rotated, covariates, split.readouts, strict=True)
    )
    if kind == "regression":
        if train.shape[1] > len(train):
            return _numbers(Ridge(alpha=params["penalty"]).fit(train, split.labels).predict(test))
        if of_readouts:  # readouts have a weight of their own for every penalty, so that nothing is shared
            return _numbers(RidgePath(train, split.labels).predict(test, params["penalty"]))
        if split.ridge is None:
            split.ridge = RidgePath(train, split.labels)
        return _numbers(split.ridge.predict(test, params["penalty"]))
    if kind == "multiclass":
        # L-BFGS, the default, has not converged after 300 steps at low penalties, since trained features are correlated.
        model = LogisticRegression(C=1.0 / params["penalty"], max_iter=300, class_weight="balanced", solver="newton-cg")
        with warnings.catch_warnings():
            # A fit that stops before convergence is scored on the inner folds like any other.
            warnings.simplefilter("ignore")
            model.fit(train, split.labels)
        return split.multiclass(model.classes_, model.predict_proba(test))
    split.last_fit = fit_logistic(train, split.labels, params["penalty"], split.last_fit, split.curvature)
    score = test @ split.last_fit[:-1] + split.last_fit[-1]
    # The classes were weighted to be equally common; the log odds of their proportion shift the intercept back.
    return Predictions(score, expit(score + log_odds(split.labels)))


def log_odds(labels: NDArray[Any]) -> float:
    """Return the log odds of the positive class among labels 0 and 1."""
    share = float(np.mean(labels))
    return float(np.log(share / (1.0 - share)))


def _numbers(predicted: NDArray[Any]) -> Predictions:
    """Return the predictions of a regression."""
    return Predictions(np.asarray(predicted, dtype=np.float64), np.full(len(predicted), np.nan))


def nearest_neighbours(split: TrainTestSplit, kind: str, params: Params, seed: int) -> Predictions:
    """Predict from the ``params["k"]`` training scans with the highest cosine similarity.

    A neighbour has the weight exp(similarity / 0.1); votes for a class are divided by its number of training scans.
    """
    train, test = (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
                   for features in (split.train, split.test))  # fmt: skip
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : params["k"]]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1.0) / 0.1)
    labels = split.labels[nearest]
    if kind == "regression":
        return _numbers((weights * labels).sum(1) / weights.sum(1))
    classes, counts = np.unique(split.labels, return_counts=True)
    votes = np.stack([(weights * (labels == name)).sum(1) for name in classes], axis=1)
    balanced = votes / counts
    if kind == "multiclass":
        return split.multiclass(classes, balanced / balanced.sum(1, keepdims=True))
    # One mean vote is added, split by the proportion of the classes, so that one neighbour does not give certainty.
    prior = counts / counts.sum()
    share = (votes + prior * weights.mean(1, keepdims=True)) / (votes.sum(1) + weights.mean(1))[:, None]
    odds = np.log(share[:, 1]) - np.log(share[:, 0])
    return Predictions(odds - log_odds(split.labels), share[:, 1])


def perceptron(split: TrainTestSplit, kind: str, params: Params, seed: int) -> Predictions:
    """Fit scikit-learn's perceptron with one hidden layer to the features and the covariates.

    ``params``: hidden (units), alpha (L2 penalty), lr and epochs.
    """
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    train, test = (
        np.column_stack([features, covariates])
        for features, covariates in zip(split.rotated, (split.train_covariates, split.test_covariates), strict=True)
    )
    options = {
        "hidden_layer_sizes": (params["hidden"],), "alpha": params["alpha"], "learning_rate_init": params["lr"],
        "max_iter": params["epochs"], "batch_size": min(32, len(train)), "random_state": seed,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised if training has not converged; the number of epochs is a setting here
        if kind == "regression":
            mean, deviation = split.labels.mean(), split.labels.std() or 1.0
            model = MLPRegressor(**options).fit(train, (split.labels - mean) / deviation)
            return _numbers(model.predict(test) * deviation + mean)
        probabilities = MLPClassifier(**options).fit(train, split.labels).predict_proba(test)
    if kind == "multiclass":
        return split.multiclass(np.unique(split.labels), probabilities)
    bounded = np.clip(probabilities[:, 1], 1e-9, 1 - 1e-9)
    return Predictions(np.log(bounded / (1 - bounded)) - log_odds(split.labels), probabilities[:, 1])


# (split, kind of task, params, seed) -> predictions for the test scans. Ray sends the function to its workers by name, so
# it must be importable there.
ProbeModel = Callable[[TrainTestSplit, str, Params, int], Predictions]


class Probe(NamedTuple):
    """A model and the params that a grid search tries; equal scores are decided by the order of the grid."""

    model: ProbeModel
    grid: list[Params]


LINEAR = Probe(linear, [{"penalty": float(penalty)} for penalty in 10.0 ** np.arange(-1, 6)])
# Features of variance 1 add up: with thousands of them the best penalty can be above those of LINEAR.
LINEAR_WIDE = Probe(linear, [{"penalty": float(penalty)} for penalty in 10.0 ** np.arange(-1, 8)])
# Of readouts that have a penalty of their own; 0 is none.
READOUT_PENALTIES = (0.0, 1.0, 10.0, 100.0, 1000.0)
NEAREST_NEIGHBOURS = Probe(nearest_neighbours, [{"k": k} for k in (1, 3, 7, 15, 31, 63)])


def with_readout_penalties(probe: Probe) -> Probe:
    """Return a linear probe whose grid has every penalty of the readouts beside every penalty of the features."""
    grid = [{**params, "readout_penalty": penalty} for params in probe.grid for penalty in READOUT_PENALTIES]
    return Probe(probe.model, grid)


def fit_predict(
    model: ProbeModel, params: Params, table: FeatureTable, train: NDArray[Any], test: NDArray[Any], seed: int = 0
) -> Predictions:
    """Fit a model to the rows ``train`` (n,) of a table and predict the rows ``test`` (m,); both index the table.

    If all training labels are equal, that label is predicted with probability 1.
    """
    return fit_predict_each(Probe(model, [params]), table, train, test, seed)[0]


def fit_predict_each(
    probe: Probe, table: FeatureTable, train: NDArray[Any], test: NDArray[Any], seed: int = 0
) -> list[Predictions]:
    """Return what `fit_predict` returns for each entry of a probe's grid, for the rows ``train`` (n,) and ``test`` (m,).

    The features are scaled and rotated only once.
    """
    if table.kind != "regression" and len(np.unique(table.labels[train])) < 2:
        label = float(table.labels[train][0])
        if table.kind == "multiclass":
            only = Predictions(np.full(len(test), label), np.eye(table.classes)[np.full(len(test), int(label))])
        else:
            only = Predictions(np.full(len(test), 2 * label - 1), np.full(len(test), label))
        return [only] * len(probe.grid)
    split = split_features(table, train, test)
    # From the last entry to the first: a logistic regression starts from the one before, and large penalties are quick.
    return [probe.model(split, table.kind, params, seed) for params in reversed(probe.grid)][::-1]
