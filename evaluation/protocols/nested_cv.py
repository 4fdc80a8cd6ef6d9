"""The search over a probe's settings by Ray Tune, in nested cross-validation.

A grid (penalties, neighbours): one trial is one task with one point, on every fold and every draw; which point a fold uses is
decided afterwards, by its inner scores alone. A search by Optuna (networks), whose next point depends on the last scores: one
for every outer fold, on its training scans alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocols.probes import GRIDS, FeatureTable, Point, fit_predict, score
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import Draw, Fold, curve_draws, inner_folds, outer_folds
from evaluation.tasks.tasks import Task
from infra import tuning

Array = np.ndarray[Any, np.dtype[Any]]
# What Optuna draws a small network's settings from.
NETWORK_SPACE: dict[str, tuple[Any, ...]] = {
    "hidden": ("choice", [16, 64, 256]), "alpha": ("loguniform", 1e-4, 1e2), "lr": ("loguniform", 1e-4, 1e-2),
    "epochs": ("choice", [10, 30, 100]),
}  # fmt: skip


@dataclass
class PreparedTask:
    """What the trials of one task share; small enough to be sent to each."""

    table: FeatureTable
    folds: list[Fold]
    draws: list[Draw]
    seed: int
    repeats: int = 1


@dataclass
class NestedCVResult:
    """One task's answers out of fold, NaN where a scan was never asked about, and how they came about."""

    predicted: Array
    probabilities: Array  # (N,), or (N, K) of a multiclass task
    fold: Array  # (N,) which fold asked, -1: none
    chosen: list[Point]
    curve: list[tuple[int, int, float]] = field(default_factory=list)  # size, draw, AUC
    draw_predicted: list[Array] = field(
        default_factory=list
    )  # of each row of the curve: of the scans that its draw asks
    trials: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def empty(cls, table: FeatureTable, chosen: list[Point]) -> NestedCVResult:
        """Nothing asked yet."""
        count = len(table.labels)
        shape = (count, table.classes) if table.kind == "multiclass" else (count,)
        return cls(np.full(count, np.nan), np.full(shape, np.nan), np.full(count, -1), chosen)


def prepare(
    task: Task, features: Array, *, folds: int, sizes: list[int], draws: int, seed: int, repeats: int = 1,
    by_site: bool = False, scale: str = "each",
) -> PreparedTask:  # fmt: skip
    """Features (float64), labels, folds and learning-curve draws of a task."""
    nothing = np.empty((len(task.rows), 0))
    covariates, confounds = (nothing if part is None else part for part in (task.covariates, task.confounds))
    table = FeatureTable(features.astype(np.float64), task.labels, task.groups, task.kind, covariates, confounds, scale)
    outer = outer_folds(task, folds, seed, by_site)
    return PreparedTask(table, outer, curve_draws(task, outer, sizes, draws, seed), seed, repeats)


def inner_score(model: str, point: Point, given: PreparedTask, fit: Array) -> float:
    """Mean score over the inner folds of the training rows ``fit`` alone."""
    table, scores = given.table, []
    for inner, ask in inner_folds(table.labels[fit], table.groups[fit], table.kind, given.seed, given.repeats):
        found = fit_predict(model, point, table, fit[inner], fit[ask], given.seed).predicted
        scores.append(score(table.labels[fit[ask]], found, table.kind))
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else float("nan")


def trial(point: Point, data: dict[str, Any]) -> dict[str, Any]:
    """Predictions of one task's model at one point of its grid; whether they are used is decided later (``choose``).

    ``inner`` (folds,) scores on training rows, ``answers`` and ``probabilities`` (N,) for the asked rows of each outer
    fold, and per learning-curve draw the inner score, the AUC on its test rows and the answers there.
    """
    started = time.monotonic()
    given, model, at = data["tasks"][point["task"]], point["model"], point["params"]
    table, empty, inner = given.table, NestedCVResult.empty(given.table, []), []
    answers, probabilities = empty.predicted, empty.probabilities
    for fit, ask in given.folds:
        inner.append(inner_score(model, at, given, fit))
        answers[ask], probabilities[ask] = fit_predict(model, at, table, fit, ask, given.seed)
    curve = []
    for draw in given.draws:
        mine = inner_score(model, at, given, draw.train)
        found = fit_predict(model, at, table, draw.train, draw.test, given.seed).predicted
        curve.append((draw.size, draw.number, mine, auc(table.labels[draw.test], found), found.astype(np.float32)))
    return {
        **point, "inner": np.array(inner), "predicted": answers, "probabilities": probabilities, "curve": curve,
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def search_grid(prepared: dict[str, PreparedTask], model: str, storage: Path, title: str) -> dict[str, NestedCVResult]:
    """Every task with every point of a model's grid, and what nested cross-validation makes of it."""
    points = [{"task": task, "model": model, "params": at} for task in prepared for at in GRIDS[model]]
    results = tuning.tune_grid(trial, points, data={"tasks": prepared}, storage=storage, name="grid", title=title)
    return {task: choose([row for row in results if row["task"] == task], given) for task, given in prepared.items()}


def choose(results: list[dict[str, Any]], given: PreparedTask) -> NestedCVResult:
    """Nested cross-validation's last step: per outer fold, and per draw, the answers of the best inner score."""
    inner = np.nan_to_num(np.stack([result["inner"] for result in results]), nan=-np.inf)
    best = inner.argmax(0)
    found = NestedCVResult.empty(given.table, [results[winner]["params"] for winner in best])
    for number, ((_, ask), winner) in enumerate(zip(given.folds, best, strict=True)):
        found.predicted[ask] = results[winner]["predicted"][ask]
        found.probabilities[ask] = results[winner]["probabilities"][ask]
        found.fold[ask] = number
    for rows in zip(*(result["curve"] for result in results), strict=True):
        winner = int(np.nan_to_num([row[2] for row in rows], nan=-np.inf).argmax())
        found.curve.append((rows[0][0], rows[0][1], rows[winner][3]))
        found.draw_predicted.append(rows[winner][4])
    for result in results:
        for number, value in enumerate(result["inner"]):
            found.trials.append(
                {"part": f"fold {number}", "point": result["params"], "inner_score": float(value),
                 "seconds": result["seconds"] / max(1, len(result["inner"]))}
            )  # fmt: skip
    return found


def network_trial(point: Point, data: dict[str, Any]) -> Iterator[dict[str, float]]:
    """The inner score of a small network's settings on one fold's training rows."""
    yield {"score": inner_score("mlp", point, data["given"], data["train"])}


def network_answers(point: Point, data: dict[str, Any]) -> dict[str, Any]:
    """The asked rows' answers of a fold by its chosen settings."""
    given = data["tasks"][point["task"]]
    fit, ask = given.folds[point["fold"]]
    answers, probabilities = fit_predict("mlp", point["params"], given.table, fit, ask, given.seed)
    return {**point, "predicted": answers, "probabilities": probabilities}


def search_networks(
    prepared: dict[str, PreparedTask], samples: int, storage: Path, title: str
) -> dict[str, NestedCVResult]:
    """A small network for every task and outer fold, its settings by Optuna on the fold's training rows."""
    points, trials = [], {task: list[dict[str, Any]]() for task in prepared}
    for task, given in prepared.items():
        for number, (fit, _) in enumerate(given.folds):
            records = tuning.tune_search(
                network_trial, NETWORK_SPACE, data={"given": given, "train": fit}, samples=samples, storage=storage,
                name=f"{task}-{number}", seed=given.seed + number, title=f"{title}: {task}, fold {number + 1}",
            )  # fmt: skip
            points.append({"task": task, "fold": number, "params": best_of(records)["point"]})
            trials[task] += [trial_row(f"fold {number}", record) for record in records]
    results = tuning.tune_grid(
        network_answers, points, data={"tasks": prepared}, storage=storage, name="answers", title=f"{title}: answers"
    )
    return {task: assemble(task, given, results, trials[task]) for task, given in prepared.items()}


def best_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with the highest score; of equals the first in the order of their points."""
    return max(sorted(records, key=lambda record: str(record["point"])), key=_highest)


def _highest(record: dict[str, Any]) -> float:
    finite = [value for value in record["scores"] if np.isfinite(value)]
    return max(finite, default=-np.inf)


def trial_row(part: str, record: dict[str, Any]) -> dict[str, Any]:
    """What goes to MLflow of a trial: a row of the table, and ``scores`` by epoch for its own run."""
    return {
        "part": part, "point": record["point"], "inner_score": _highest(record), "steps": len(record["scores"]),
        "stopped": not record["done"], "scores": record["scores"],
    }  # fmt: skip


def assemble(
    task: str, given: PreparedTask, results: list[dict[str, Any]], trials: list[dict[str, Any]]
) -> NestedCVResult:  # fmt: skip
    """One task's answers from those of its folds."""
    mine = [row for row in results if row["task"] == task and "fold" in row]
    found = NestedCVResult.empty(given.table, [row["params"] for row in mine])
    for row in mine:
        ask = given.folds[row["fold"]][1]
        found.predicted[ask], found.probabilities[ask] = row["predicted"], row["probabilities"]
        found.fold[ask] = row["fold"]
    found.trials = trials
    return found
