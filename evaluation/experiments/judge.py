"""The experiment's measurements: what each encoder and each baseline answers about every test person after every draw.

Nothing is fitted to, or chosen by, a scan of the test sites. Penalties come from inner folds of each training set.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from sklearn.linear_model import Ridge

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.features import cache_name, check_preprocessing, features_of
from evaluation.protocols.finetune import FineTuning, TrainingJob
from evaluation.protocols.nested_cv import PreparedTask, prepare, search_grid
from evaluation.protocols.tune_networks import final_fit_trial
from evaluation.protocols.voxels import gram_matrix, voxel_coordinates
from evaluation.statistics.metrics import auc, mae
from evaluation.tasks.folds import outer_folds
from evaluation.tasks.leakage import check_copies, check_leakage
from evaluation.tasks.tasks import Task, load_task
from infra import tuning
from infra.files import atomic_write, sha256_of
from infra.progress import Progress
from infra.tracking.tracking import Tracker
from pretrain.weights.encoder import Encoder, find_encoder

if TYPE_CHECKING:
    from evaluation.experiments.run import Plan

Array = np.ndarray[Any, np.dtype[Any]]
DISEASES = ("scz", "ad")
ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of the brain-age ridge
NETWORKS = "networks"  # the name under which networks trained whole are stored; they are judged on NETWORK_CLINIC
NETWORK_CLINIC, NETWORK_TASK = "clinic-a1", "scz"


@dataclass(frozen=True)
class Answered:
    """What one subject answered in one task: (rows, test scans) of which each row is a draw, and the truth."""

    clinic: str
    method: str
    variant: str
    seed: int
    task: str
    sizes: Array  # (rows,) training scans; 0: all of the training sites
    draws: Array  # (rows,)
    answers: Array  # (rows, T) float32
    labels: Array  # (T,)
    people: Array  # (T,) names

    @property
    def figures(self) -> Array:
        """(rows,) AUC, or MAE of a regression."""
        figure = auc if self.task in DISEASES else mae
        return np.array([figure(self.labels, row) for row in self.answers])


Subject = tuple[str, str, int]  # method, variant, seed


def judge_clinic(out: Path, plan: Plan, clinic: str, uri: str) -> None:
    """Linear probes of every encoder, of the voxels and of the brain-age score on a clinic's tasks, stored and logged."""
    target = out / "results" / f"{clinic}.npz"
    if target.is_file():
        return
    place = _Clinic(out, plan, clinic)
    found = place.search(place.encoders(), "each", "encoders")
    found += place.search(place.voxels(), "all", "voxels")
    found += place.search(place.brain_age(), "each", "brain-age")
    save(target, found)
    log(uri, clinic, found)
    shutil.rmtree(out / "searches" / clinic, ignore_errors=True)  # what the answers came from is large


class _Clinic:
    """A clinic's shards and tasks, and what is known of their scans before any label is looked at."""

    def __init__(self, out: Path, plan: Plan, name: str) -> None:
        from evaluation.experiments.run import JUDGED

        self.out, self.plan, self.name = out, plan, name
        self.manifest, self.healthy = (Manifest.load(out / "shards" / each) for each in (name, JUDGED[name]))
        names = [*DISEASES, *(["age"] if name == "clinic-a1" else [])]
        self.tasks = {task: _task(out, task, self.manifest) for task in names}
        check_copies(self.tasks.values(), self.manifest)
        self.rows = np.unique(np.concatenate([task.rows for task in self.tasks.values()]))
        self.cache = self.manifest.root / ".features"

    def encoders(self) -> Iterator[tuple[Subject, str, Array]]:
        """Frozen features of every encoder, task by task."""
        from evaluation.experiments.run import judged_on

        for each in judged_on(self.name, self.plan):
            path = self.out / "runs" / each.name
            encoder = Encoder.from_pretrained(path)
            check_preprocessing(encoder, self.manifest, each.name)
            check_leakage(encoder, path, self.manifest, self.rows, each.name)
            weights = sha256_of(find_encoder(path) / "model.safetensors")
            cache = self.cache / cache_name(weights, self.manifest.digest, None, ())
            features = features_of(encoder, self.manifest, self.rows, cache, f"features of {each.name}")
            for name, task in self.tasks.items():
                yield (each.method, each.variant, each.seed), name, features[np.searchsorted(self.rows, task.rows)]

    def voxels(self) -> Iterator[tuple[Subject, str, Array]]:
        """Coordinates of the scans by their voxels, task by task."""
        cache = self.cache / "voxels.npz"
        if not cache.is_file():
            with atomic_write(cache) as stream:
                np.savez(stream, rows=self.rows, gram=gram_matrix(self.manifest, self.rows))
        for name, task in self.tasks.items():
            yield ("voxels", "main", 0), name, voxel_coordinates(self.manifest, task.rows, cache)

    def brain_age(self) -> Iterator[tuple[Subject, str, Array]]:
        """The brain-age score alone, of the diseases."""
        ages = voxel_age(self.healthy, self.manifest, self.rows)
        for name in DISEASES:
            yield ("brain-age", "main", 0), name, ages[np.searchsorted(self.rows, self.tasks[name].rows)][:, None]

    def search(self, subjects: Iterator[tuple[Subject, str, Array]], scale: str, title: str) -> list[Answered]:
        """Every subject's probe, its penalty by Ray Tune on inner folds of each draw's training scans."""
        prepared: dict[str, PreparedTask] = {}
        about: dict[str, tuple[Subject, str]] = {}
        for subject, task, features in subjects:
            key, sizes = "|".join((task, *map(str, subject))), list(self.plan.sizes) if task in DISEASES else []
            prepared[key] = prepare(
                self.tasks[task],
                features,
                folds=5,
                sizes=sizes,
                draws=self.plan.draws,
                seed=self.plan.seed,
                scale=scale,
            )
            about[key] = subject, task
        storage = self.out / "searches" / self.name / title
        answers, found = search_grid(prepared, "linear", storage, f"{self.name}: {title}"), []
        for key, (subject, name) in about.items():
            mine, ask, of = answers[key], prepared[key].folds[0][1], self.tasks[name]
            given = np.stack([mine.predicted[ask], *mine.draw_predicted]).astype(np.float32)
            sizes_of, draws_of = (np.array([0, *(row[at] for row in mine.curve)], dtype=np.int64) for at in (0, 1))
            whom = of.participants[ask]
            found.append(Answered(self.name, *subject, name, sizes_of, draws_of, given, of.labels[ask], whom))
        return found


def _task(out: Path, name: str, manifest: Manifest) -> Task:
    from evaluation.experiments.run import TASKS

    path = out / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, "w") as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.create(TASKS[name])))
    return load_task(str(path), manifest)


def voxel_age(healthy: Manifest, clinic: Manifest, rows: Array) -> Array:
    """(rows,) years: a ridge regression of age on the voxels of healthy people, asked about a clinic's scans.

    It is fitted to the scans that encoders are pretrained on; its penalty has the least error on the monitor's people.
    """
    scans = healthy.scans
    fit, watched = (np.flatnonzero(scans["split"] == name) for name in ("pretrain", "monitor"))
    x, ages = _voxels(healthy, fit), scans["age"].to_numpy(float)
    inside = x.mean(0) > 0.01  # a voxel that is empty in everybody says nothing
    mean = x[:, inside].mean(0)
    x = x[:, inside] - mean
    held_out = _voxels(healthy, watched)[:, inside] - mean
    models = [Ridge(alpha=alpha, solver="cholesky").fit(x, ages[fit]) for alpha in ALPHAS]
    best = min(models, key=lambda model: mae(ages[watched], model.predict(held_out)))
    return np.asarray(best.predict(_voxels(clinic, rows)[:, inside] - mean), dtype=np.float64)


def _voxels(manifest: Manifest, rows: Array) -> Array:
    reader, parts = manifest.reader(), []
    with Progress(len(rows), "scans", "brain age") as progress:
        for row in rows:
            parts.append(np.asarray(reader.read(int(row)), dtype=np.float32).reshape(-1))
            progress.advance()
    return np.stack(parts)


def train_networks(out: Path, plan: Plan, uri: str) -> None:
    """Networks trained whole, from y-aware weights and from random ones, for a fixed number of epochs."""
    target = out / "results" / f"{NETWORKS}.npz"
    if target.is_file():
        return
    manifest = Manifest.load(out / "shards" / NETWORK_CLINIC)
    task = _task(out, NETWORK_TASK, manifest)
    folds = outer_folds(task, 5, plan.seed)
    nothing = np.empty((len(task.rows), 0))
    given = prepare(task, nothing, folds=5, sizes=list(plan.sizes), draws=plan.draws, seed=plan.seed)
    few = dict(zip(plan.sizes, plan.network_draws, strict=True))
    draws = [draw for draw in given.draws if draw.number < few[draw.size]]
    settings = FineTuning(seed=plan.seed)
    at = {"lr": settings.lr, "layer_decay": settings.layer_decay, "weight_decay": settings.weight_decay}
    jobs, points = {}, []
    for method, start in (("fine-tuned", "y-aware-main-0"), ("scratch", None)):
        path = out / "runs" / "y-aware-main-0"
        encoder = Encoder.from_pretrained(path)
        folder = None if start is None else str(find_encoder(path).resolve())
        assert task.covariates is not None
        jobs[method] = TrainingJob(
            str(manifest.root.resolve()), folder, encoder.config["encoder"], task.rows, task.labels, task.groups, task.kind,
            task.covariates, settings, "cuda" if torch.cuda.is_available() else "cpu",
        )  # fmt: skip
        here = at if folder else {**at, "layer_decay": 1.0}
        points += [
            {
                "task": method,
                "draw": draw,
                "params": here,
                "epochs": plan.network_epochs,
                "train": draw.train,
                "test": draw.test,
            }
            for draw in draws
        ]
    results = tuning.tune_grid(
        final_fit_trial, points, data={"jobs": jobs}, storage=out / "searches" / NETWORKS, name="fits", title="networks",
        resources={"cpu": 1, **({"gpu": 1.0} if torch.cuda.is_available() else {})},
    )  # fmt: skip
    ask = folds[0][1]
    found = []
    for method in jobs:
        mine = [row for row in results if row["task"] == method]
        found.append(
            Answered(
                NETWORK_CLINIC, method, "main", 0, NETWORK_TASK, np.array([row["draw"].size for row in mine]),
                np.array([row["draw"].number for row in mine]), np.stack([row["predicted"] for row in mine]).astype(np.float32),
                task.labels[ask], task.participants[ask],
            )
        )  # fmt: skip
    save(target, found)
    log(uri, NETWORKS, found)
    shutil.rmtree(out / "searches" / NETWORKS, ignore_errors=True)


def save(path: Path, found: list[Answered]) -> None:
    """All answers in one .npz, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    parts: dict[str, Any] = {}
    for number, each in enumerate(found):
        parts |= {f"{number}.{name}": np.asarray(value) for name, value in vars(each).items()}
        parts[f"{number}.people"] = np.asarray(each.people, dtype=str)
    with atomic_write(path) as stream:
        np.savez(stream, count=len(found), **parts)


def load(path: Path) -> list[Answered]:
    """What ``save`` wrote."""
    with np.load(path) as stored:
        return [
            Answered(**{
                name: stored[f"{number}.{name}"].item() if kind in ("str", "int") else stored[f"{number}.{name}"]
                for name, kind in Answered.__annotations__.items()
            })
            for number in range(int(stored["count"]))
        ]  # fmt: skip


def log(uri: str, clinic: str, found: list[Answered]) -> None:
    """A run in MLflow for every subject of a clinic: mean figures by training size."""
    from evaluation.experiments.run import EXPERIMENT

    for subject in sorted({(each.method, each.variant, each.seed) for each in found}):
        mine = [each for each in found if (each.method, each.variant, each.seed) == subject]
        method, variant, seed = subject
        tags = {
            "yaware.kind": "experiment",
            "yaware.method": method,
            "yaware.variant": variant,
            "yaware.clinic": clinic,
        }
        tracker = Tracker.open(uri, EXPERIMENT, f"{clinic}: {method} {variant} {seed}", tags=tags)
        tracker.log_params({"clinic": clinic, "method": method, "variant": variant, "seed": seed})
        metrics = []
        for each in mine:
            figure = "auc" if each.task in DISEASES else "mae"
            for size in np.unique(each.sizes):
                value = float(each.figures[each.sizes == size].mean())
                metrics.append((f"{each.task}.{figure}" + (f".n{size}" if size else ""), value, 0))
        tracker.log_metrics(metrics)
        tracker.end()
