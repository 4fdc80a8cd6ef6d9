"""Nested cross-validation of probes with Ray Tune.

For a grid (penalties, numbers of neighbours) a point of the search is one part of a task: its folds, its learning-curve draws
or one of its resamples. All entries of the grid are scored on the inner folds of each training set, and the best one is fitted
to it and predicts its test scans. For a perceptron Optuna proposes the
settings from earlier scores, so every outer fold has a search of its own on its training scans.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.features.candidates import FeatureChoice, candidate_scores
from evaluation.features.tables import permuted, table_of
from evaluation.protocols.probes import (
    FeatureTable,
    Params,
    Predictions,
    Probe,
    fit_predict,
    fit_predict_each,
    inner_metric,
    perceptron,
)
from evaluation.statistics.metrics import auc
from evaluation.tasks.division import Division, divide
from evaluation.tasks.folds import Draw, Fold, inner_folds
from evaluation.tasks.resamples import NO_RESAMPLING, Resample, Resampling
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
    candidates: list[FeatureChoice] = field(default_factory=list)  # features to choose from instead of the table's


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
    task: Task, features: NDArray[Any] | FeatureTable, *, folds: int, sizes: list[int], draws: int, seed: int, repeats: int = 1,
    by_site: bool = False, scale: str = "each", resampling: Resampling = NO_RESAMPLING,
    candidates: Sequence[FeatureChoice] = (),
) -> PreparedTask:  # fmt: skip
    """Combine a task with its features (N, F) and make its outer folds and learning-curve draws.

    Args:
        task: with N scans.
        features: (N, F), or a table from ``table_of``; F is 0 for networks, which read the scans themselves.
        folds: number of outer folds.
        sizes: training-set sizes of the learning curve; none if empty.
        draws: training sets of each size.
        seed: of folds and draws.
        repeats: number of shuffles of the inner folds.
        by_site: leave out whole sites.
        scale: ``each`` or ``all``; see ``probes.split_features``.
        resampling: how many repeats, halvings and permutations a grid search runs beside.
        candidates: features to choose from on inner folds, in place of ``features``.
    """
    division = divide(task, folds=folds, sizes=sizes, draws=draws, seed=seed, by_site=by_site, resampling=resampling)
    table = features if isinstance(features, FeatureTable) else table_of(task, features, scale)
    return prepared_for(division, table, seed=seed, repeats=repeats, candidates=candidates)


def prepared_for(
    division: Division, table: FeatureTable, *, seed: int, repeats: int = 1, candidates: Sequence[FeatureChoice] = ()
) -> PreparedTask:
    """Combine the division of a task with its features; see ``prepare``."""
    return PreparedTask(
        table, division.folds, division.draws, seed, repeats, resamples=division.resamples, candidates=list(candidates)
    )


def inner_scores(probe: Probe, prepared: PreparedTask, train: NDArray[Any]) -> NDArray[np.float64]:
    """Return for each entry of a probe's grid the mean score over the inner folds of the rows ``train``: (entries,).

    NaN if it is undefined on all of them.
    """
    table = prepared.table
    scores: list[list[float]] = [[] for _ in probe.grid]
    folds = inner_folds(table.labels[train], table.groups[train], table.kind, prepared.seed, prepared.repeats)
    for inner, test in folds:
        labels = table.labels[train[test]]
        for entry, fitted in zip(
            scores, fit_predict_each(probe, table, train[inner], train[test], prepared.seed), strict=True
        ):
            entry.append(inner_metric(labels, fitted.predicted, table.kind))
    return np.array([np.nanmean(entry) if np.isfinite(entry).any() else np.nan for entry in scores])


class NestedFit(NamedTuple):
    """The best entry of a grid for a training set: its number, the inner scores of all (entries,), and its predictions.

    If features were chosen too: the number of the chosen candidate, and the inner scores of all candidates.
    """

    chosen: int
    scores: NDArray[np.float64]
    predictions: Predictions
    candidate: int
    candidate_scores: NDArray[np.float64]


def nested_fit(probe: Probe, prepared: PreparedTask, train: NDArray[Any], test: NDArray[Any]) -> NestedFit:
    """Choose the grid's entry with the best inner score on the rows ``train`` (n,) and predict the rows ``test`` (m,).

    Equal scores are decided by the order of the grid. If there are candidates for the features, one is chosen first, on the
    same inner folds.
    """
    candidate, of_candidates = 0, np.empty(0)
    if prepared.candidates:
        table = prepared.table
        folds = inner_folds(table.labels[train], table.groups[train], table.kind, prepared.seed, prepared.repeats)
        penalties = list(dict.fromkeys(params["penalty"] for params in probe.grid))
        of_readouts = list(dict.fromkeys(params.get("readout_penalty", 0.0) for params in probe.grid))
        of_candidates = candidate_scores(prepared.candidates, train, folds, penalties, of_readouts)
        candidate = int(np.nan_to_num(of_candidates, nan=-np.inf).argmax())
        prepared = replace(prepared, table=prepared.candidates[candidate].table, candidates=[])
    scores = inner_scores(probe, prepared, train)
    chosen = int(np.nan_to_num(scores, nan=-np.inf).argmax())
    fitted = fit_predict(probe.model, probe.grid[chosen], prepared.table, train, test, prepared.seed)
    return NestedFit(chosen, scores, fitted, candidate, of_candidates)


def trial(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Fit a probe to one part of a task.

    Args:
        point: task (its name) and part: ``folds``, ``draws``, or the number of a resample.
        data: tasks (name -> PreparedTask) and probe.

    Returns:
        ``point`` with, for draws, curve: size, number, AUC and predictions of each; for other parts chosen (folds,), inner
        (folds, entries), and predicted (N,) and probabilities for the test rows of the folds. Always seconds.
    """
    started = time.monotonic()
    prepared, probe, part = data["tasks"][point["task"]], data["probe"], point["part"]
    if part == "draws":
        result = {"curve": [_draw_row(probe, prepared, draw) for draw in prepared.draws]}
    else:
        result = _cross_validation(
            probe, prepared if part == "folds" else _resampled(prepared, prepared.resamples[part])
        )
    return {**point, **result, "seconds": time.monotonic() - started}


def _draw_row(probe: Probe, prepared: PreparedTask, draw: Draw) -> tuple[int, int, float, NDArray[np.float32]]:
    predicted = nested_fit(probe, prepared, draw.train, draw.test).predictions.predicted
    return draw.size, draw.number, auc(prepared.table.labels[draw.test], predicted), predicted.astype(np.float32)


def _cross_validation(probe: Probe, prepared: PreparedTask) -> dict[str, Any]:
    """Return chosen, inner, predicted and probabilities of a nested cross-validation, as ``trial`` does."""
    result, fits = NestedCVResult.empty(prepared.table, []), []
    for train, test in prepared.folds:
        fit = nested_fit(probe, prepared, train, test)
        result.predicted[test], result.probabilities[test] = fit.predictions
        fits.append(fit)
    return {
        "chosen": np.array([fit.chosen for fit in fits]), "inner": np.stack([fit.scores for fit in fits]),
        "predicted": result.predicted, "probabilities": result.probabilities,
        "candidate": np.array([fit.candidate for fit in fits]),
        "candidates": np.stack([fit.candidate_scores for fit in fits]),
    }  # fmt: skip


def _resampled(prepared: PreparedTask, resample: Resample) -> PreparedTask:
    """Return the task with the folds of a resample; labels and groups keep their place if the features are permuted."""
    table, candidates, rows = prepared.table, prepared.candidates, resample.rows
    if rows is not None:
        table = permuted(table, rows)
        candidates = [FeatureChoice(params, permuted(features, rows)) for params, features in candidates]
    return PreparedTask(table, resample.folds, [], resample.seed, prepared.repeats, candidates=candidates)


def search_grid(
    prepared: dict[str, PreparedTask], probe: Probe, storage: Path, title: str
) -> dict[str, NestedCVResult]:  # fmt: skip
    """Run nested cross-validation of a probe for every task, with one point per task and part.

    Args:
        prepared: tasks by name.
        probe: the model and its grid.
        storage: folder of the search; a search in it is continued.
        title: of the progress bar.
    """
    points = [{"task": name, "part": part} for name, task in prepared.items() for part in parts_of(task)]
    data = {"tasks": prepared, "probe": probe}
    rows = tuning.tune_grid(trial, points, data=data, storage=storage, name="parts", in_process=True, title=title)
    return {name: combine([row for row in rows if row["task"] == name], task, probe) for name, task in prepared.items()}


def parts_of(prepared: PreparedTask) -> list[str | int]:
    """Return the parts of a task's search: see ``trial``."""
    return ["folds", *["draws"] * bool(prepared.draws), *range(len(prepared.resamples))]


def combine(rows: list[dict[str, Any]], prepared: PreparedTask, probe: Probe) -> NestedCVResult:
    """Combine the trials of all parts of one task."""
    by_part = {row["part"]: row for row in rows}
    main = by_part["folds"]
    names = [candidate.params for candidate in prepared.candidates] or [{}]
    chosen = [{**names[int(c)], **probe.grid[int(e)]} for c, e in zip(main["candidate"], main["chosen"], strict=True)]
    result = NestedCVResult.empty(prepared.table, chosen)
    result.predicted, result.probabilities = main["predicted"], main["probabilities"]
    for number, (_, test) in enumerate(prepared.folds):
        result.fold[test] = number
    for number, resample in enumerate(prepared.resamples):
        row = by_part[number]
        result.resampled.append(ResampledPredictions(resample, row["predicted"], row["probabilities"]))
    for size, draw, value, predicted in by_part["draws"]["curve"] if prepared.draws else ():
        result.curve.append((size, draw, value))
        result.draw_predicted.append(predicted)
    seconds = main["seconds"] / main["inner"].size
    for entry, params in enumerate(probe.grid):
        for number, value in enumerate(main["inner"][:, entry]):
            point = {**names[int(main["candidate"][number])], **params}
            result.trials.append(
                {"part": f"fold {number}", "point": point, "inner_score": float(value), "seconds": seconds}
            )
    for number, values in enumerate(main["candidates"]):  # by ridge regression, with the best penalty of each
        for params, value in zip(names, values, strict=False):
            result.trials.append(
                {"part": f"fold {number}", "point": params, "inner_score": float(value), "seconds": 0.0}
            )
    return result


def perceptron_trial(params: Params, data: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Yield the inner score of a perceptron's settings on the training rows of one fold."""
    yield {"score": float(inner_scores(Probe(perceptron, [params]), data["task"], data["train"])[0])}


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


def trial_row(fold_or_draw: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return what MLflow keeps of a trial of ``tuning.tune_search``; ``fold_or_draw`` names the fold or draw."""
    return {
        "part": fold_or_draw, "point": record["point"], "inner_score": _highest_score(record), "steps": len(record["scores"]),
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
