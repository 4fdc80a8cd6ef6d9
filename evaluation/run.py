"""Judges checkpoints on tasks: features, tuned probes, figures with intervals; an MLflow run for each checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.manifest import Manifest
from data_pipeline.split import is_healthy
from evaluation.features import check_leakage, check_preprocessing, features_of
from evaluation.probes import STRENGTHS
from evaluation.statistics import FIGURES, with_interval
from evaluation.tasks import Task, load_task
from evaluation.tune import choose, prepare, search
from infra import ray_cluster, runs
from infra.errors import UserError
from infra.files import sha256_of
from infra.tracking import Tracker, default_uri
from pretrain.export import Encoder, find_encoder

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Protocol:
    """How checkpoints are judged; logged as the run's parameters."""

    tasks: tuple[str, ...]
    folds: int = 5
    n_train: tuple[int, ...] = (100, 300, 500)
    draws: int = 10
    seed: int = 0


@dataclass
class Result:
    """One checkpoint's answers: metrics by name, and tables of predictions, learning curves and chosen penalties."""

    metrics: dict[str, float]
    predictions: pd.DataFrame
    curve: pd.DataFrame
    penalties: pd.DataFrame


def evaluate(
    checkpoints: Sequence[str | Path], shards: str | Path, protocol: Protocol, *, experiment: str = "yaware",
    tracking_uri: str | None = None, workers: int | None = None, cache: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Evaluate each checkpoint (a run folder, a step folder or an export) and log it; their metrics, in order.

    Every checkpoint is judged on the same folds and draws. Nothing is fitted or chosen on the scans it is judged by.
    """
    manifest = Manifest.load(shards)
    encoders = [(find_encoder(path), Encoder.from_pretrained(path)) for path in checkpoints]
    tasks = [load_task(name, manifest, protocol.folds) for name in protocol.tasks]
    if not tasks:
        raise UserError("no task given; name some with --tasks, such as ad,scz,age,site")
    rows = np.unique(np.concatenate([task.rows for task in tasks]))
    for (_, encoder), given in zip(encoders, checkpoints, strict=True):
        check_preprocessing(encoder, manifest, str(given))
        check_leakage(encoder, manifest, rows, str(given))
    for task in tasks:
        counts = "" if task.kind == "regression" else f" ({_class_counts(task)})"
        print(
            f"evaluate: task {task.name}: {len(task.rows)} scans of {len(np.unique(task.groups))} participants{counts}"
        )
    metrics = []
    with ray_cluster.session(workers):
        for folder, encoder in encoders:
            name = f"{encoder.config['run_name']} step {encoder.config['step']}"
            weights = sha256_of(folder / "model.safetensors")
            stored = cache or manifest.root / ".features"
            features = features_of(
                encoder, manifest, rows, stored / f"{weights[:16]}-{manifest.digest[:16]}.npz", f"features of {name}"
            )
            place = {int(row): number for number, row in enumerate(rows)}
            by_task = {task.name: features[[place[int(row)] for row in task.rows]] for task in tasks}
            result = judge(tasks, by_task, protocol, manifest.scans["key"], f"probes of {name}")
            _log(encoder, manifest, weights, rows, features, result, protocol, experiment, tracking_uri)
            metrics.append(result.metrics)
            shown = ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items() if key.count(".") == 1)
            print(f"evaluate: {name}: {shown}")
    return metrics


def judge(tasks: Sequence[Task], features: dict[str, Array], protocol: Protocol, keys: pd.Series, title: str) -> Result:
    """Nested cross-validation and learning curves of every task on one checkpoint's features; ``keys`` name the scans."""
    prepared = {
        task.name: prepare(
            task, features[task.name], folds=protocol.folds, sizes=list(protocol.n_train), draws=protocol.draws,
            seed=protocol.seed,
        )
        for task in tasks
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="yaware-tune-") as storage:
        trials = search(prepared, Path(storage), "probes", title)
    metrics: dict[str, float] = {}
    predictions, curves, penalties = [], [], []
    for task in tasks:
        mine = [row for row in trials if row["task"] == task.name]
        answers, chosen, curve = choose(mine, prepared[task.name])
        for figure, statistic in FIGURES[task.kind].items():
            value, low, high = with_interval(statistic, task.labels, answers, task.groups, protocol.seed)
            metrics |= {
                f"{task.name}.{figure}": value,
                f"{task.name}.{figure}.low": low,
                f"{task.name}.{figure}.high": high,
            }
        table = {
            "key": keys.loc[task.rows].to_numpy(),
            "participant": task.groups,
            "label": task.labels.astype(float),
            "answer": answers,
        }
        predictions.append(pd.DataFrame({"task": task.name, "kind": task.kind, "title": task.title, **table}))
        left_out = sorted(set(protocol.n_train) - {size for size, _, _ in curve}) if task.kind == "binary" else []
        if left_out:
            print(f"evaluate: task {task.name}: too few scans for a learning curve at {', '.join(map(str, left_out))}")
        curves.append(pd.DataFrame(curve, columns=["n_train", "draw", "auc"]).assign(task=task.name))
        penalties.append(pd.DataFrame({"task": task.name, "fold": range(len(chosen)), "penalty": chosen}))
        for size, values in curves[-1].groupby("n_train")["auc"]:
            metrics[f"{task.name}.auc.n{size}"] = float(values.mean())
    return Result(metrics, pd.concat(predictions), pd.concat(curves), pd.concat(penalties))


def embedding_table(manifest: Manifest, rows: Array, features: Array) -> pd.DataFrame:
    """The first two principal components of the features, with what a reader wants to colour them by.

    Components are those of the healthy scans, so that patients do not turn the map.
    """
    scans = manifest.scans.loc[rows]
    healthy = np.ones(len(rows), dtype=bool)
    if "diagnosis" in scans:
        healthy = scans["diagnosis"].map(is_healthy).to_numpy(bool)
    basis = features[healthy] if healthy.sum() > 2 else features
    mean, deviation = basis.mean(0), basis.std(0) + 1e-8
    axes = np.linalg.svd((basis - mean) / deviation, full_matrices=False)[2][:2]
    points = ((features - mean) / deviation) @ axes.T
    # The sign of a principal axis is arbitrary; older to the right makes maps of several checkpoints comparable.
    age = scans["age"].to_numpy(float)
    known = np.isfinite(age)
    for axis in range(points.shape[1]):
        if known.sum() > 2 and np.corrcoef(points[known, axis], age[known])[0, 1] < 0:
            points[:, axis] *= -1
    columns = [column for column in ("age", "sex", "site", "diagnosis", "split") if column in scans]
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], **{c: scans[c].to_numpy() for c in columns}})


def _log(
    encoder: Encoder, manifest: Manifest, weights: str, rows: Array, features: Array, result: Result, protocol: Protocol,
    experiment: str, tracking_uri: str | None,
) -> None:  # fmt: skip
    config = encoder.config
    tags = {
        "yaware.kind": "evaluation", "yaware.run_name": config["run_name"], "yaware.method": config["method"],
        "yaware.step": str(config["step"]), "yaware.weights_sha256": weights, "yaware.manifest_digest": manifest.digest,
        "yaware.pretraining_run": str(config.get("run_id") or ""), "yaware.model_id": str(config.get("model_id") or ""),
        "yaware.simulated": str(manifest.simulated), "yaware.version": version("yaware"),
        "yaware.encoder": config["encoder"]["name"],
    }  # fmt: skip
    if config.get("run_id"):
        tags["mlflow.parentRunId"] = str(config["run_id"])
    name = f"evaluate {config['run_name']} step {config['step']}"
    tracker = Tracker.open(tracking_uri or default_uri(), experiment, name, tags=tags)
    if tracker.run_id is None:
        raise UserError(
            f"MLflow store {tracking_uri or default_uri()} does not answer; start it, or choose another --tracking-uri"
        )
    tracker.log_params({**protocol.__dict__, "penalties": STRENGTHS, "scans": len(rows)})
    step = int(config["step"])
    found = [(key, value, step) for key, value in result.metrics.items() if np.isfinite(value)]
    # With its model id a figure stands both in this run and on the checkpoint's own page, beside those of others.
    known = bool(config.get("model_id")) and runs.has_model(tracking_uri or default_uri(), str(config["model_id"]))
    tracker.log_metrics(
        found, model_id=str(config["model_id"]) if known else None, dataset=str(manifest.settings["dataset"]),
        dataset_digest=manifest.digest[:32],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result.predictions.to_parquet(folder / "predictions.parquet", index=False)
        embedding_table(manifest, rows, features).to_parquet(folder / "embedding.parquet", index=False)
        result.curve.to_csv(folder / "curve.csv", index=False)
        result.penalties.to_csv(folder / "penalties.csv", index=False)
        for path in sorted(folder.iterdir()):
            tracker.log_artifact(path, "evaluation")
    tracker.end()


def _class_counts(task: Task) -> str:
    shown = [f"{name} {int((task.labels == code).sum())}" for code, name in enumerate(task.classes)]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
