"""Nested cross-validation of probes with Ray Tune.

For a grid (penalties, numbers of neighbours) one trial fits one task with one entry of the grid on every fold and every
draw; afterwards each fold takes the entry with the best score on its inner folds. For a perceptron Optuna proposes the
settings from earlier scores, so every outer fold has a search of its own on its training scans.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.protocols.probes import FeatureTable, Params, Probe, ProbeModel, fit_predict, inner_metric, perceptron
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import Draw, Fold, curve_draws, inner_folds, outer_folds
from evaluation.tasks.resamples import NO_RESAMPLING, Resample, Resampling, make_resamples
from evaluation.tasks.tasks import Task
from infra import tuning

# Search space of the perceptron for Optuna.
PERCEPTRON_SPACE: dict[str, tuple[Any, ...]] = {
    "hidden": ("choice", [16, 64, 256]), "alpha": ("loguniform", 1e-4, 1e2), "lr": ("loguniform", 1e-4, 1e-2),
    "epochs": ("choice", [10, 30, 100]),
}  # fmt: skip


@dataclass
class PreparedTask:
    """The data that all trials of one task share; small enough to be sent to each of them."""

    table: FeatureTable
    folds: list[Fold]
    draws: list[Draw]
    seed: int
    repeats: int = 1  # of the inner folds
    resamples: list[Resample] = field(default_factory=list)  # used by grid searches only


class ResampledPredictions(NamedTuple):
    """Out-of-fold predictions of one resample: NaN for scans that are in no test fold of it."""

    resample: Resample
    predicted: NDArray[Any]  # (N,)
    probabilities: NDArray[Any]  # (N,) or (N, K)


@dataclass
class NestedCVResult:
    """Out-of-fold predictions for the N scans of a task, NaN for scans that are in no test fold, and the trials behind them."""

    predicted: NDArray[Any]  # (N,)
    probabilities: NDArray[Any]  # (N,), or (N, K) for a multiclass task
    fold: NDArray[Any]  # (N,) the test fold of each scan, -1: none
    chosen: list[Params]  # of each outer fold
    curve: list[tuple[int, int, float]] = field(default_factory=list)  # size, draw, AUC
    draw_predicted: list[NDArray[Any]] = field(
        default_factory=list
    )  # predictions for the test scans of each row of curve
    trials: list[dict[str, Any]] = field(default_factory=list)
    resampled: list[ResampledPredictions] = field(default_factory=list)

    @classmethod
    def empty(cls, table: FeatureTable, chosen: list[Params]) -> NestedCVResult:
        """Return a result in which no scan is predicted yet."""
        count = len(table.labels)
        shape = (count, table.classes) if table.kind == "multiclass" else (count,)
        return cls(np.full(count, np.nan), np.full(shape, np.nan), np.full(count, -1), chosen)


def prepare(
    task: Task, features: NDArray[Any], *, folds: int, sizes: list[int], draws: int, seed: int, repeats: int = 1,
    by_site: bool = False, scale: str = "each", resampling: Resampling = NO_RESAMPLING,
) -> PreparedTask:  # fmt: skip
    """Combine a task with its features (N, F) and make its outer folds and learning-curve draws.

    Args:
        task: with N scans.
        features: (N, F); F is 0 for networks, which read the scans themselves.
        folds: number of outer folds.
        sizes: training-set sizes of the learning curve; none if empty.
        draws: training sets of each size.
        seed: of folds and draws.
        repeats: number of shuffles of the inner folds.
        by_site: leave out whole sites.
        scale: ``each`` or ``all``; see ``probes.split_features``.
        resampling: how many repeats, halvings and permutations a grid search runs beside.
    """
    none = np.empty((len(task.rows), 0))
    table = FeatureTable(
        features.astype(np.float64), task.labels, task.groups, task.kind,
        covariates=none if task.covariates is None else task.covariates,
        confounds=none if task.confounds is None else task.confounds,
        scale=scale,
    )  # fmt: skip
    outer = outer_folds(task, folds, seed, by_site)
    resamples = make_resamples(task, outer, resampling, count=folds, seed=seed, by_site=by_site)
    return PreparedTask(table, outer, curve_draws(task, outer, sizes, draws, seed), seed, repeats, resamples)


def inner_score(model: ProbeModel, params: Params, prepared: PreparedTask, train: NDArray[Any]) -> float:
    """Return the mean score over the inner folds of the training rows ``train``; NaN if it is undefined on all of them."""
    table, scores = prepared.table, []
    folds = inner_folds(table.labels[train], table.groups[train], table.kind, prepared.seed, prepared.repeats)
    for inner, test in folds:
        predicted = fit_predict(model, params, table, train[inner], train[test], prepared.seed).predicted
        scores.append(inner_metric(table.labels[train[test]], predicted, table.kind))
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else float("nan")


def trial(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Fit one task's model with one entry of its grid on every fold and draw; ``choose`` decides later which are used.

    Args:
        point: task (its name) and params.
        data: tasks (name -> PreparedTask) and model (ProbeModel).

    Returns:
        ``point`` with inner (folds,), the scores on the training rows of each outer fold; predicted (N,) and probabilities
        for the test rows of each outer fold; curve, for each draw its size, number, inner score, AUC and predictions;
        resampled, for each resample its inner scores, predictions and probabilities.
    """
    started = time.monotonic()
    prepared, model, params = data["tasks"][point["task"]], data["model"], point["params"]
    table, curve = prepared.table, []
    inner, predicted_scans, probabilities = _fold_predictions(model, params, prepared)
    for draw in prepared.draws:
        score = inner_score(model, params, prepared, draw.train)
        predicted = fit_predict(model, params, table, draw.train, draw.test, prepared.seed).predicted
        value = auc(table.labels[draw.test], predicted)
        curve.append((draw.size, draw.number, score, value, predicted.astype(np.float32)))
    return {
        **point, "inner": inner, "predicted": predicted_scans, "probabilities": probabilities, "curve": curve,
        "resampled": [_fold_predictions(model, params, _resampled(prepared, each)) for each in prepared.resamples],
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def _fold_predictions(
    model: ProbeModel, params: Params, prepared: PreparedTask
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the inner score of each outer fold (folds,), and predictions (N,) and probabilities for their test rows."""
    result, inner = NestedCVResult.empty(prepared.table, []), []
    for train, test in prepared.folds:
        inner.append(inner_score(model, params, prepared, train))
        predictions = fit_predict(model, params, prepared.table, train, test, prepared.seed)
        result.predicted[test], result.probabilities[test] = predictions
    return np.array(inner), result.predicted, result.probabilities


def _resampled(prepared: PreparedTask, resample: Resample) -> PreparedTask:
    """Return the task with the folds of a resample; labels and groups keep their place if the features are permuted."""
    table, rows = prepared.table, resample.rows
    if rows is not None:
        table = replace(
            table, features=table.features[rows], covariates=table.covariates[rows], confounds=table.confounds[rows]
        )
    return PreparedTask(table, resample.folds, [], resample.seed, prepared.repeats)


def search_grid(
    prepared: dict[str, PreparedTask], probe: Probe, storage: Path, title: str
) -> dict[str, NestedCVResult]:  # fmt: skip
    """Run nested cross-validation of a probe for every task, with one Ray trial per task and entry of the probe's grid.

    Args:
        prepared: tasks by name.
        probe: the model and its grid.
        storage: folder of the search; a search in it is continued.
        title: of the progress bar.
    """
    points = [{"task": task, "params": params} for task in prepared for params in probe.grid]
    data = {"tasks": prepared, "model": probe.model}
    rows = tuning.tune_grid(trial, points, data=data, storage=storage, name="grid", here=True, title=title)
    return {name: choose([row for row in rows if row["task"] == name], task) for name, task in prepared.items()}


def choose(rows: list[dict[str, Any]], prepared: PreparedTask) -> NestedCVResult:
    """Take, for each outer fold and each draw, the predictions of the grid entry with the best inner score."""
    entries = [(row["inner"], row["predicted"], row["probabilities"]) for row in rows]
    result = _best_of_folds(prepared.table, prepared.folds, entries, [row["params"] for row in rows])
    for number, resample in enumerate(prepared.resamples):
        best = _best_of_folds(prepared.table, resample.folds, [row["resampled"][number] for row in rows])
        result.resampled.append(ResampledPredictions(resample, best.predicted, best.probabilities))
    for draws in zip(*(row["curve"] for row in rows), strict=True):
        winner = int(np.nan_to_num([draw[2] for draw in draws], nan=-np.inf).argmax())
        result.curve.append((draws[0][0], draws[0][1], draws[winner][3]))
        result.draw_predicted.append(draws[winner][4])
    for row in rows:
        for number, value in enumerate(row["inner"]):
            result.trials.append(
                {"part": f"fold {number}", "point": row["params"], "inner_score": float(value),
                 "seconds": row["seconds"] / max(1, len(row["inner"]))}
            )  # fmt: skip
    return result


def _best_of_folds(
    table: FeatureTable, folds: list[Fold], entries: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]],
    params: list[Params] | None = None,
) -> NestedCVResult:  # fmt: skip
    """Take each fold's predictions from the grid entry with the best inner score.

    Args:
        table: with N scans.
        folds: the outer folds.
        entries: for each entry of the grid what ``_fold_predictions`` returns.
        params: of the entries.
    """
    best = np.nan_to_num(np.stack([inner for inner, _, _ in entries]), nan=-np.inf).argmax(0)
    result = NestedCVResult.empty(table, [params[winner] for winner in best] if params else [])
    for number, ((_, test), winner) in enumerate(zip(folds, best, strict=True)):
        result.predicted[test], result.probabilities[test] = entries[winner][1][test], entries[winner][2][test]
        result.fold[test] = number
    return result


def perceptron_trial(params: Params, data: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Yield the inner score of a perceptron's settings on the training rows of one fold."""
    yield {"score": inner_score(perceptron, params, data["task"], data["train"])}


def perceptron_predictions(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Fit a perceptron with a fold's chosen params and predict the test rows of the fold."""
    prepared = data["tasks"][point["task"]]
    train, test = prepared.folds[point["fold"]]
    predicted, probabilities = fit_predict(perceptron, point["params"], prepared.table, train, test, prepared.seed)
    return {**point, "predicted": predicted, "probabilities": probabilities}


def search_perceptrons(
    prepared: dict[str, PreparedTask], samples: int, storage: Path, title: str
) -> dict[str, NestedCVResult]:  # fmt: skip
    """Fit a perceptron for every task and outer fold; Optuna tries ``samples`` settings on the fold's training rows."""
    points, trials = [], {name: list[dict[str, Any]]() for name in prepared}
    for name, task in prepared.items():
        for number, (train, _) in enumerate(task.folds):
            records = tuning.tune_search(
                perceptron_trial, PERCEPTRON_SPACE, data={"task": task, "train": train}, samples=samples, storage=storage,
                name=f"{name}-{number}", seed=task.seed + number, title=f"{title}: {name}, fold {number + 1}",
            )  # fmt: skip
            points.append({"task": name, "fold": number, "params": best_of(records)["point"]})
            trials[name] += [trial_row(f"fold {number}", record) for record in records]
    rows = tuning.tune_grid(
        perceptron_predictions, points, data={"tasks": prepared}, storage=storage, name="answers",
        title=f"{title}: predictions",
    )  # fmt: skip
    return {name: assemble(name, task, rows, trials[name]) for name, task in prepared.items()}


def best_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record with the highest score; ties are broken by the params."""
    return max(sorted(records, key=lambda record: str(record["point"])), key=_highest_score)


def _highest_score(record: dict[str, Any]) -> float:
    finite = [value for value in record["scores"] if np.isfinite(value)]
    return max(finite, default=-np.inf)


def trial_row(part: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return what MLflow keeps of a trial of ``tuning.tune_search``; ``part`` names the fold or draw."""
    return {
        "part": part, "point": record["point"], "inner_score": _highest_score(record), "steps": len(record["scores"]),
        "stopped": not record["done"], "scores": record["scores"],
    }  # fmt: skip


def assemble(
    name: str, prepared: PreparedTask, rows: list[dict[str, Any]], trials: list[dict[str, Any]]
) -> NestedCVResult:  # fmt: skip
    """Combine the predictions of one task's outer folds."""
    folds = [row for row in rows if row["task"] == name and "fold" in row]
    result = NestedCVResult.empty(prepared.table, [row["params"] for row in folds])
    for row in folds:
        test = prepared.folds[row["fold"]][1]
        result.predicted[test], result.probabilities[test] = row["predicted"], row["probabilities"]
        result.fold[test] = row["fold"]
    result.trials = trials
    return result
