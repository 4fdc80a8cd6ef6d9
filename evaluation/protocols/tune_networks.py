"""Search over the settings of fine-tuning: Optuna and ASHA on the inner folds of every outer fold, then a final fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.finetune import TrainingJob, final_fit, trial
from evaluation.protocols.nested_cv import NestedCVResult, PreparedTask, assemble, best_of, trial_row
from evaluation.protocols.probes import Params
from evaluation.statistics.metrics import auc
from evaluation.tasks.folds import Draw
from infra import ray_cluster, tuning
from infra.errors import UserError

# Search spaces for Optuna. Random weights need larger steps and have no blocks to preserve.
SPACE: dict[str, tuple[Any, ...]] = {
    "lr": ("loguniform", 1e-5, 1e-3), "layer_decay": ("choice", [0.5, 0.75, 1.0]),
    "weight_decay": ("loguniform", 1e-5, 1e-1),
}  # fmt: skip
SCRATCH_SPACE: dict[str, tuple[Any, ...]] = {
    "lr": ("loguniform", 1e-4, 1e-2), "layer_decay": ("choice", [1.0]), "weight_decay": ("loguniform", 1e-5, 1e-1),
}  # fmt: skip


def training_jobs(context: EvaluationContext, candidate: Candidate) -> dict[str, TrainingJob]:
    """Return the training job of every task: from the candidate's weights, or from random ones if it has no folder.

    Raises UserError if a task has confounds, which can only be regressed out of features.
    """
    assert candidate.encoder is not None
    settings, manifest = context.settings.finetune, context.manifest
    device = "cuda" if gpus_per_trial(settings.gpus_per_trial) else "cpu"
    jobs = {}
    for task in context.tasks:
        if task.confounds is not None and task.confounds.shape[1]:
            raise UserError(
                f"task {task.name}: confounds are regressed out of features, and the protocols finetune and scratch have no "
                "features; remove confounds from the task or choose another protocol"
            )
        jobs[task.name] = TrainingJob(
            shards=manifest.url if "://" in manifest.url else str(Path(manifest.url).resolve()),
            folder=None if candidate.folder is None else str(candidate.folder),
            encoder=candidate.encoder.config["encoder"], rows=task.rows, labels=task.labels, groups=task.groups,
            kind=task.kind, covariates=np.empty((len(task.rows), 0)) if task.covariates is None else task.covariates,
            settings=settings, device=device, sides=tuple(manifest.grid["shape"]),
        )  # fmt: skip
    return jobs


def search_fine_tuning(
    jobs: dict[str, TrainingJob], prepared: dict[str, PreparedTask], storage: Path, title: str
) -> dict[str, NestedCVResult]:  # fmt: skip
    """Train networks for every task and outer fold, and for every learning-curve draw if the settings ask for curves.

    Args:
        jobs: by task.
        prepared: by task, with the same keys.
        storage: folder of the searches; those in it are continued.
        title: of the progress bars.
    """
    points, trials = [], {name: list[dict[str, Any]]() for name in jobs}
    for name, job in jobs.items():
        for number, (train, test) in enumerate(prepared[name].folds):
            params, epochs, rows = _choose(
                job, train, storage, f"{name}-{number}", f"{title}: {name}, fold {number + 1}"
            )
            points.append(
                {"task": name, "fold": number, "params": params, "epochs": epochs, "train": train, "test": test}
            )
            trials[name] += [{**row, "part": f"fold {number}"} for row in rows]
        for draw in prepared[name].draws if job.settings.curve else ():
            draw_name = f"{draw.size}-{draw.number}"
            params, epochs, rows = _choose(
                job, draw.train, storage, f"{name}-{draw_name}", f"{title}: {name}, draw {draw_name}"
            )
            points.append(
                {"task": name, "draw": draw, "params": params, "epochs": epochs, "train": draw.train, "test": draw.test}
            )
            trials[name] += [{**row, "part": f"draw {draw_name}"} for row in rows]
    fits = _final_fits(points, jobs, storage, title)
    results = {name: assemble(name, prepared[name], fits, trials[name]) for name in jobs}
    for fit in fits:
        of_draw: Draw | None = fit.get("draw")
        if of_draw is not None:
            value = auc(jobs[fit["task"]].labels[of_draw.test], fit["predicted"])
            results[fit["task"]].curve.append((of_draw.size, of_draw.number, value))
    return results


def _choose(
    job: TrainingJob, train: NDArray[Any], storage: Path, name: str, title: str
) -> tuple[Params, int, list[dict[str, Any]]]:
    """Search for the best params on some training scans; return them, their best number of epochs and the trials' rows."""
    settings = job.settings
    fixed = {"lr": settings.lr, "layer_decay": settings.layer_decay, "weight_decay": settings.weight_decay}
    if job.folder is None:
        fixed["layer_decay"] = 1.0
    if settings.trials:
        space, samples = SPACE if job.folder else SCRATCH_SPACE, settings.trials
    else:
        space, samples = {key: ("choice", [value]) for key, value in fixed.items()}, 1
    records = tuning.tune_search(
        trial, space, data={"job": job, "train": train}, samples=samples, storage=storage, name=name, seed=settings.seed,
        halving=settings.halving, resources=trial_resources(job), title=title,
    )  # fmt: skip
    best = best_of(records)
    scores = best["scores"]
    return best["point"], scores.index(max(scores)) + 1, [trial_row("", record) for record in records]


def trial_resources(job: TrainingJob) -> dict[str, float]:
    """Return the CPUs and GPUs of a trial."""
    gpus = gpus_per_trial(job.settings.gpus_per_trial)
    return {"cpu": job.settings.cpus_per_trial, **({"gpu": gpus} if gpus else {})}


def gpus_per_trial(configured: float | None) -> float:
    """Return the configured share of a GPU; by default 1 if the Ray cluster has a GPU, else 0."""
    return configured if configured is not None else min(1.0, ray_cluster.gpus())


def final_fit_trial(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Run ``final_fit`` as a Ray trial; ``data`` holds the jobs by task."""
    return {**point, **final_fit({**point, "job": data["jobs"][point["task"]]})}


def _final_fits(
    points: list[dict[str, Any]], jobs: dict[str, TrainingJob], storage: Path, title: str
) -> list[dict[str, Any]]:
    job = next(iter(jobs.values()))
    if job.settings.ranks == 1:
        return tuning.tune_grid(
            final_fit_trial, points, data={"jobs": jobs}, storage=storage, name="answers", title=f"{title}: final fits",
            resources=trial_resources(job),
        )  # fmt: skip
    fits = []
    for number, point in enumerate(points):
        predictions = tuning.train_ranks(
            final_fit, {**point, "job": jobs[point["task"]]}, ranks=job.settings.ranks, storage=storage,
            name=f"answers-{number}", gpus=gpus_per_trial(job.settings.gpus_per_trial),
            cpus=job.settings.cpus_per_trial,
        )  # fmt: skip
        fits.append({**point, **predictions})
    return fits
