"""Trains networks end to end on a clinic's labelled scans, from y-aware weights and from random ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.answers import MethodAnswers, log_answers, save_answers
from evaluation.experiments.evaluate import load_plan_task
from evaluation.experiments.plan import MAIN_CLINIC, NETWORK_TASK, ExperimentPlan
from evaluation.protocols.finetune import FineTuning, TrainingJob
from evaluation.protocols.nested_cv import prepare
from evaluation.protocols.tune_networks import final_fit_trial
from evaluation.tasks.folds import outer_folds
from evaluation.tasks.tasks import Task
from infra import tuning
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder

NETWORKS = "networks"  # name of the file and folder that hold their answers
PRETRAINED = "y-aware-main-0"  # run whose weights are fine-tuned; networks from scratch have its architecture


class NetworkPlan(Protocol):
    """What a plan says about networks that are trained end to end."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of training scans."""

    @property
    def draws(self) -> int:
        """Training sets of each size."""

    @property
    def network_draws(self) -> tuple[int, ...]:
        """For each size, the number of draws that are used."""

    @property
    def network_epochs(self) -> int:
        """Epochs of every training."""

    @property
    def seed(self) -> int:
        """Seed of the experiment."""


def train_networks(out: Path, plan: ExperimentPlan, uri: str) -> None:
    """Train all weights for a fixed number of epochs, from y-aware weights and from random ones; store and log the answers.

    Does nothing if the answers are stored already.
    """
    target = out / "results" / f"{NETWORKS}.npz"
    if target.is_file():
        return
    manifest = Manifest.load(out / "shards" / MAIN_CLINIC)
    task = load_plan_task(out, NETWORK_TASK, manifest)
    jobs = network_jobs(manifest, task, out / "runs" / PRETRAINED, plan.seed)
    points = network_points(task, jobs, plan)
    results = tuning.tune_grid(
        final_fit_trial, points, data={"jobs": jobs}, storage=out / "searches" / NETWORKS, name="fits", title="networks",
        resources={"cpu": 1, **({"gpu": 1.0} if torch.cuda.is_available() else {})},
    )  # fmt: skip
    answers = network_answers(MAIN_CLINIC, "main", NETWORK_TASK, task, results)
    save_answers(target, answers)
    log_answers(uri, NETWORKS, answers)
    shutil.rmtree(out / "searches" / NETWORKS, ignore_errors=True)


def network_jobs(manifest: Manifest, task: Task, pretrained: Path, seed: int) -> dict[str, TrainingJob]:
    """Return the training jobs by method: from the weights of the run ``pretrained``, and from random ones."""
    settings = FineTuning(seed=seed)
    return {
        "fine-tuned": _job(manifest, task, settings, pretrained, from_weights=True),
        "scratch": _job(manifest, task, settings, pretrained, from_weights=False),
    }


def network_points(task: Task, jobs: dict[str, TrainingJob], plan: NetworkPlan) -> list[dict[str, Any]]:
    """Return the fits for ``final_fit_trial``: every method on the first ``plan.network_draws`` training sets of each size."""
    no_features = np.empty((len(task.rows), 0))
    prepared = prepare(task, no_features, folds=5, sizes=list(plan.sizes), draws=plan.draws, seed=plan.seed)
    used = dict(zip(plan.sizes, plan.network_draws, strict=True))
    draws = [draw for draw in prepared.draws if draw.number < used[draw.size]]
    return [_point(method, job, draw, plan.network_epochs) for method, job in jobs.items() for draw in draws]


def network_answers(
    clinic: str, variant: str, name: str, task: Task, results: list[dict[str, Any]]
) -> list[MethodAnswers]:
    """Return the answers of each method from the results of ``final_fit_trial``; ``name`` is that of the task."""
    test = outer_folds(task, 5, 0)[0][1]  # the same for every seed, since the task names its test sites
    answers = []
    for method in dict.fromkeys(row["task"] for row in results):
        rows = [row for row in results if row["task"] == method]
        answers.append(MethodAnswers(
            clinic=clinic, method=method, variant=variant, seed=0, task=name,
            sizes=np.array([row["draw"].size for row in rows]), draws=np.array([row["draw"].number for row in rows]),
            answers=np.stack([row["predicted"] for row in rows]).astype(np.float32), labels=task.labels[test],
            people=task.participants[test],
        ))  # fmt: skip
    return answers


def _job(manifest: Manifest, task: Task, settings: FineTuning, pretrained: Path, *, from_weights: bool) -> TrainingJob:
    """Describe the training of one network for ``final_fit_trial``."""
    assert task.covariates is not None
    return TrainingJob(
        shards=str(manifest.root.resolve()),
        folder=str(find_encoder(pretrained).resolve()) if from_weights else None,
        encoder=Encoder.from_pretrained(pretrained).config["encoder"],
        rows=task.rows, labels=task.labels, groups=task.groups, kind=task.kind, covariates=task.covariates,
        settings=settings, device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip


def _point(method: str, job: TrainingJob, draw: Any, epochs: int) -> dict[str, Any]:
    """Describe one fit: networks from scratch learn at one rate in all blocks."""
    settings = job.settings
    params = {
        "lr": settings.lr, "layer_decay": settings.layer_decay if job.folder else 1.0, "weight_decay": settings.weight_decay,
    }  # fmt: skip
    return {"task": method, "draw": draw, "params": params, "epochs": epochs, "train": draw.train, "test": draw.test}
