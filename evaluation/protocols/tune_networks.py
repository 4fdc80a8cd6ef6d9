"""The search over fine-tuning's settings: for every outer fold Optuna and ASHA on its inner folds, then a final fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.protocols.finetune import Point, TrainingJob, final_fit, trial
from evaluation.protocols.nested_cv import NestedCVResult, PreparedTask, assemble, best_of, trial_row
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import Draw
from infra import ray_cluster, tuning

# What Optuna draws from. From random weights there is no block to be spared, and larger steps are needed.
SPACE: dict[str, tuple[Any, ...]] = {
    "lr": ("loguniform", 1e-5, 1e-3), "layer_decay": ("choice", [0.5, 0.75, 1.0]),
    "weight_decay": ("loguniform", 1e-5, 1e-1),
}  # fmt: skip
SCRATCH_SPACE: dict[str, tuple[Any, ...]] = {
    "lr": ("loguniform", 1e-4, 1e-2), "layer_decay": ("choice", [1.0]), "weight_decay": ("loguniform", 1e-5, 1e-1),
}  # fmt: skip


def search_fine_tuning(
    jobs: dict[str, TrainingJob], prepared: dict[str, PreparedTask], storage: Path, title: str
) -> dict[str, NestedCVResult]:  # fmt: skip
    """Every task's answers out of fold by networks trained on it, and its learning curve where it is asked for."""
    points, trials = [], {task: list[dict[str, Any]]() for task in jobs}
    for task, job in jobs.items():
        for number, (fit, ask) in enumerate(prepared[task].folds):
            at, epochs, rows = _chosen(job, fit, storage, f"{task}-{number}", f"{title}: {task}, fold {number + 1}")
            points.append({"task": task, "fold": number, "params": at, "epochs": epochs, "train": fit, "test": ask})
            trials[task] += [{**row, "part": f"fold {number}"} for row in rows]
        for draw in prepared[task].draws if job.settings.curve else ():
            name = f"{draw.size}-{draw.number}"
            at, epochs, rows = _chosen(job, draw.train, storage, f"{task}-{name}", f"{title}: {task}, draw {name}")
            points.append(
                {"task": task, "draw": draw, "params": at, "epochs": epochs, "train": draw.train, "test": draw.test}
            )
            trials[task] += [{**row, "part": f"draw {name}"} for row in rows]
    results = _final_fits(points, jobs, storage, title)
    found = {task: assemble(task, prepared[task], results, trials[task]) for task in jobs}
    for row in results:
        of: Draw | None = row.get("draw")
        if of is not None:
            found[row["task"]].curve.append(
                (of.size, of.number, auc(jobs[row["task"]].labels[of.test], row["predicted"]))
            )
    return found


def _chosen(
    job: TrainingJob, fit: Any, storage: Path, name: str, title: str
) -> tuple[Point, int, list[dict[str, Any]]]:
    """The best point for some training scans, the number of epochs it did best with, and the trials' rows."""
    given = job.settings
    known = {"lr": given.lr, "layer_decay": given.layer_decay, "weight_decay": given.weight_decay}
    if job.folder is None:
        known["layer_decay"] = 1.0
    if given.trials:
        space, samples = SPACE if job.folder else SCRATCH_SPACE, given.trials
    else:
        space, samples = {key: ("choice", [value]) for key, value in known.items()}, 1
    records = tuning.tune_search(
        trial, space, data={"job": job, "train": fit}, samples=samples, storage=storage, name=name, seed=given.seed,
        halving=given.halving, resources=resources_of(job), title=title,
    )  # fmt: skip
    best = best_of(records)
    scores = best["scores"]
    return best["point"], scores.index(max(scores)) + 1, [trial_row("", record) for record in records]


def resources_of(job: TrainingJob) -> dict[str, float]:
    """What a trial is given."""
    gpus = gpus_per_trial(job.settings.gpus_per_trial)
    return {"cpu": job.settings.cpus_per_trial, **({"gpu": gpus} if gpus else {})}


def gpus_per_trial(asked: float | None) -> float:
    """The share of a GPU: as asked, else a whole one where the cluster has any."""
    return asked if asked is not None else min(1.0, ray_cluster.gpus())


def final_fit_trial(point: Point, data: dict[str, Any]) -> dict[str, Any]:
    """A final fit as a trial of its own."""
    return {**point, **final_fit({**point, "job": data["jobs"][point["task"]]})}


def _final_fits(points: list[Point], jobs: dict[str, TrainingJob], storage: Path, title: str) -> list[dict[str, Any]]:
    job = next(iter(jobs.values()))
    if job.settings.ranks == 1:
        return tuning.tune_grid(
            final_fit_trial, points, data={"jobs": jobs}, storage=storage, name="answers", title=f"{title}: final fits",
            resources=resources_of(job),
        )  # fmt: skip
    results = []
    for number, point in enumerate(points):
        answers = tuning.train_ranks(
            final_fit, {**point, "job": jobs[point["task"]]}, ranks=job.settings.ranks, storage=storage,
            name=f"answers-{number}", gpus=gpus_per_trial(job.settings.gpus_per_trial),
            cpus=job.settings.cpus_per_trial,
        )  # fmt: skip
        results.append({**point, **answers})
    return results
