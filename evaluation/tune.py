"""The search over penalties by Ray Tune: one trial is one task with one penalty, on every fold and every draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evaluation.probes import STRENGTHS, curve_draws, fit_predict, folds_of, inner_score
from evaluation.statistics import auc
from evaluation.tasks import Task
from infra import ray_cluster

Array = np.ndarray[Any, np.dtype[Any]]


def trial(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Answers of one task's probe with one penalty; which penalty is used is decided later, by the inner scores alone.

    ``inner`` (folds,) scores on training rows, ``answers`` (N,) for the held-out rows of each outer fold, and per
    learning-curve draw the inner score and the AUC on the fixed test rows.
    """
    task, strength = data["tasks"][point["task"]], point["strength"]
    features, labels, groups, kind, seed = (task[k] for k in ("features", "labels", "groups", "kind", "seed"))
    inner, answers = [], np.full(len(labels), np.nan)
    for fit, ask in task["folds"]:
        inner.append(inner_score(features[fit], labels[fit], groups[fit], kind, strength, seed))
        answers[ask] = fit_predict(features[fit], labels[fit], features[ask], kind, strength)
    curve = []
    for size, draws in task["draws"].items():
        for number, fit in enumerate(draws):
            mine = inner_score(features[fit], labels[fit], groups[fit], kind, strength, seed)
            test = task["test"]
            found = auc(labels[test], fit_predict(features[fit], labels[fit], features[test], kind, strength))
            curve.append((size, number, mine, found))
    return {**point, "inner": np.array(inner), "answers": answers, "curve": curve}


def prepare(task: Task, features: Array, *, folds: int, sizes: list[int], draws: int, seed: int) -> dict[str, Any]:
    """What the trials of one task share: features (float64), labels, folds and learning-curve draws."""
    test = np.array([], dtype=np.int64)
    chosen: dict[int, list[Array]] = {}
    if task.kind == "binary":
        test, chosen = curve_draws(task.labels, task.groups, sizes, draws, seed)
    return {
        "features": features.astype(np.float64), "labels": task.labels, "groups": task.groups, "kind": task.kind,
        "folds": folds_of(task.labels, task.groups, task.kind, folds, seed), "test": test, "draws": chosen, "seed": seed,
    }  # fmt: skip


def search(prepared: dict[str, dict[str, Any]], storage: Path, name: str, title: str) -> list[dict[str, Any]]:
    """Run every (task, penalty) as a trial of Ray Tune."""
    points = [{"task": task, "strength": strength} for task in prepared for strength in STRENGTHS]
    return ray_cluster.tune_grid(trial, points, data={"tasks": prepared}, storage=storage, name=name, title=title)


def choose(
    results: list[dict[str, Any]], task: dict[str, Any]
) -> tuple[Array, list[float], list[tuple[int, int, float]]]:
    """Nested cross-validation's last step: per outer fold, and per draw, the answers of the best inner score.

    Returns out-of-fold answers (N,), the penalty chosen in each fold, and (size, draw, AUC) of the learning curve.
    """
    inner = np.stack([result["inner"] for result in results])
    best = np.nan_to_num(inner, nan=-np.inf).argmax(0)
    answers = np.empty(len(task["labels"]))
    for (_, ask), winner in zip(task["folds"], best, strict=True):
        answers[ask] = results[winner]["answers"][ask]
    curve = []
    for rows in zip(*(result["curve"] for result in results), strict=True):
        winner = int(np.nan_to_num([row[2] for row in rows], nan=-np.inf).argmax())
        curve.append((rows[0][0], rows[0][1], rows[winner][3]))
    return answers, [float(results[winner]["strength"]) for winner in best], curve
