"""Evaluates every encoder and every baseline without a network on the test sites of a clinic.

No model is fitted to, and no setting is chosen on, a scan of the test sites. Penalties are chosen on inner folds of each
training set.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from sklearn.linear_model import Ridge

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.answers import Method, MethodAnswers, log_answers, save_answers
from evaluation.experiments.plan import DISEASES, MAIN_CLINIC, PRETRAINED_ON, TASKS, ExperimentPlan, encoders_for
from evaluation.features.voxels import gram_matrix, voxel_coordinates
from evaluation.protocols.context import feature_folder
from evaluation.protocols.features import cache_name, features_of
from evaluation.protocols.nested_cv import PreparedTask, prepare, search_grid
from evaluation.protocols.probes import LINEAR
from evaluation.statistics.metrics import mae
from evaluation.tasks.leakage import check_copies, check_leakage
from evaluation.tasks.tasks import Task, load_task
from infra.files import atomic_write, sha256_of
from infra.progress import Progress
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.scan_source import check_preprocessing

ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # penalties of the brain-age ridge
LEAST_GREY_MATTER = 0.01  # mean over healthy scans; the brain-age ridge leaves out voxels below it

FeaturesOfTask = tuple[Method, str, NDArray[Any]]  # method, task, features of the task's scans (N, F)


def evaluate_clinic(out: Path, plan: ExperimentPlan, clinic: str, uri: str) -> None:
    """Fit linear probes to every encoder, the voxels and the brain-age score on a clinic's tasks; store and log the answers.

    Does nothing if the answers are stored already.
    """
    target = out / "results" / f"{clinic}.npz"
    if target.is_file():
        return
    data = _ClinicData(out, plan, clinic)
    answers = data.probe(data.encoder_features(), "each", "encoders")
    answers += data.probe(data.voxel_features(), "all", "voxels")
    answers += data.probe(data.brain_age_features(), "each", "brain-age")
    save_answers(target, answers)
    log_answers(uri, clinic, answers)
    shutil.rmtree(out / "searches" / clinic, ignore_errors=True)  # the trials' results are large


class _ClinicData:
    """A clinic's shards, tasks and features."""

    def __init__(self, out: Path, plan: ExperimentPlan, name: str) -> None:
        self.out, self.plan, self.name = out, plan, name
        self.manifest, self.healthy = (Manifest.load(out / "shards" / shards) for shards in (name, PRETRAINED_ON[name]))
        names = [*DISEASES, *(["age"] if name == MAIN_CLINIC else [])]
        self.tasks = {task: load_plan_task(out, task, self.manifest) for task in names}
        check_copies(self.tasks.values(), self.manifest)
        self.rows = np.unique(np.concatenate([task.rows for task in self.tasks.values()]))
        self.cache = feature_folder(self.manifest)

    def encoder_features(self) -> Iterator[FeaturesOfTask]:
        """Yield the frozen features of every encoder for every task."""
        for pretraining in encoders_for(self.name, self.plan):
            path = self.out / "runs" / pretraining.name
            encoder = Encoder.from_pretrained(path)
            check_preprocessing(encoder.preprocessing, self.manifest, pretraining.name)
            check_leakage(encoder, path, self.manifest, self.rows, pretraining.name)
            weights = sha256_of(find_encoder(path) / "model.safetensors")
            cache = self.cache / cache_name(weights, self.manifest.digest, None, ())
            features = features_of(encoder, self.manifest, self.rows, cache, f"features of {pretraining.name}")
            method = pretraining.method, pretraining.variant, pretraining.seed
            for name, task in self.tasks.items():
                yield method, name, features[np.searchsorted(self.rows, task.rows)]

    def voxel_features(self) -> Iterator[FeaturesOfTask]:
        """Yield, for every task, coordinates of the scans with the inner products of their voxels."""
        cache = self.cache / "voxels.npz"
        if not cache.is_file():
            with atomic_write(cache) as stream:
                np.savez(stream, rows=self.rows, gram=gram_matrix(self.manifest, self.rows))
        for name, task in self.tasks.items():
            yield ("voxels", "main", 0), name, voxel_coordinates(self.manifest, task.rows, cache)

    def brain_age_features(self) -> Iterator[FeaturesOfTask]:
        """Yield the brain-age score, (N, 1) in years, for every disease."""
        ages = brain_ages(self.healthy, self.manifest, self.rows)
        for name in DISEASES:
            yield ("brain-age", "main", 0), name, ages[np.searchsorted(self.rows, self.tasks[name].rows)][:, None]

    def probe(self, features_of_tasks: Iterator[FeaturesOfTask], scale: str, title: str) -> list[MethodAnswers]:
        """Fit a linear probe on every training set; Ray Tune searches its penalty on inner folds of that set."""
        prepared: dict[str, PreparedTask] = {}
        sources: dict[str, tuple[Method, str]] = {}
        for method, name, features in features_of_tasks:
            key, sizes = "|".join((name, *map(str, method))), list(self.plan.sizes) if name in DISEASES else []
            prepared[key] = prepare(
                self.tasks[name], features, folds=5, sizes=sizes, draws=self.plan.draws, seed=self.plan.seed, scale=scale
            )  # fmt: skip
            sources[key] = method, name
        results = search_grid(prepared, LINEAR, self.out / "searches" / self.name / title, f"{self.name}: {title}")
        answers = []
        for key, ((kind, variant, seed), name) in sources.items():
            result, test, task = results[key], prepared[key].folds[0][1], self.tasks[name]
            answers.append(MethodAnswers(
                clinic=self.name, method=kind, variant=variant, seed=seed, task=name,
                sizes=np.array([0, *(row[0] for row in result.curve)], dtype=np.int64),
                draws=np.array([0, *(row[1] for row in result.curve)], dtype=np.int64),
                answers=np.stack([result.predicted[test], *result.draw_predicted]).astype(np.float32),
                labels=task.labels[test], people=task.participants[test],
            ))  # fmt: skip
        return answers


def load_plan_task(out: Path, name: str, manifest: Manifest, tasks: Mapping[str, Any] = TASKS) -> Task:
    """Write a task of the plan to OUT/tasks/NAME.yaml and load it for the manifest's scans."""
    path = out / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, "w") as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.create(tasks[name])))
    return load_task(str(path), manifest)


def brain_ages(healthy: Manifest, clinic: Manifest, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Predict the age of a clinic's scans ``rows``, in years, by a ridge regression on the voxels of healthy people.

    The ridge is fitted to the scans that the encoders are pretrained on. Its penalty is the one with the smallest error
    on the ``monitor`` split.
    """
    scans = healthy.scans
    train, monitor = (np.flatnonzero(scans["split"] == name) for name in ("pretrain", "monitor"))
    x, ages = _voxels(healthy, train), scans["age"].to_numpy(float)
    brain = x.mean(0) > LEAST_GREY_MATTER
    mean = x[:, brain].mean(0)
    x = x[:, brain] - mean
    monitor_x = _voxels(healthy, monitor)[:, brain] - mean
    models = [Ridge(alpha=alpha, solver="cholesky").fit(x, ages[train]) for alpha in ALPHAS]
    best = min(models, key=lambda model: mae(ages[monitor], model.predict(monitor_x)))
    return np.asarray(best.predict(_voxels(clinic, rows)[:, brain] - mean), dtype=np.float64)


def _voxels(manifest: Manifest, rows: NDArray[Any]) -> NDArray[np.float32]:
    """(len(rows), D * H * W) voxels of scans."""
    reader, scans = manifest.reader(), []
    with Progress(len(rows), "scans", "brain age") as progress:
        for row in rows:
            scans.append(np.asarray(reader.read(int(row)), dtype=np.float32).reshape(-1))
            progress.advance()
    return np.stack(scans)
