"""Occlusion maps: hide one cube of the scan at a time and measure how far the score of a probe moves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.context import feature_folder
from evaluation.protocols.features import cache_name, features_of
from evaluation.protocols.probes import FeatureTable, Params, fit_predict, linear
from evaluation.protocols.variant import ProtocolVariant
from evaluation.tasks.leakage import check_leakage
from evaluation.tasks.tasks import Task, load_task
from infra.errors import UserError
from infra.files import regular_file, sha256_of
from infra.processes.scratch import scratch_folder
from infra.progress import Progress
from infra.random_streams import saliency_generator
from infra.tracking import runs
from infra.tracking.tracker import Tracker, default_uri
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.scan_source import check_preprocessing

BATCH = 16
SCANS = 16  # held-out scans over which the map is averaged
CUBES = 6  # along the longest side of the volume
Box = tuple[slice, slice, slice]


def add_saliency(
    checkpoint: str | Path, shards: str | Path, task_name: str, *, experiment: str = "yaware",
    tracking_uri: str | None = None, scans: int = SCANS, cubes: int = CUBES, seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Compute the occlusion map of an evaluated checkpoint and task, and add it to the evaluation's MLflow run.

    The probe is that of the evaluation's first fold: the penalty that was chosen there, fitted to the scans outside the fold.
    The map is averaged over scans of the fold, which are therefore held out.

    Args:
        checkpoint: run folder, checkpoint or export.
        shards: that the checkpoint was evaluated on.
        task_name: a shipped task or the path of a YAML file.
        experiment: MLflow experiment of the evaluation.
        tracking_uri: MLflow store; by default MLFLOW_TRACKING_URI, else mlruns/mlflow.db.
        scans: number of held-out scans.
        cubes: number of cubes along the longest side of the volume.
        seed: of the choice of scans.
        cache: folder of computed features; by default that of ``evaluate``.

    Returns:
        The arrays of ``occlusion``.

    Raises:
        UserError: if the checkpoint was not evaluated on the task by a linear probe, or the task is multiclass.
    """
    manifest, uri = Manifest.load(shards), tracking_uri or default_uri()
    folder, encoder = find_encoder(checkpoint), Encoder.from_pretrained(checkpoint)
    check_preprocessing(encoder.preprocessing, manifest, str(checkpoint))
    task = load_task(task_name, manifest, folds=2)  # the folds are those of the evaluation, whatever their number
    check_leakage(encoder, checkpoint, manifest, task.rows, str(checkpoint))
    if task.kind == "multiclass":
        raise UserError(f"task {task.name} is multiclass and has no single score; choose a binary task or a regression")
    weights = sha256_of(folder / "model.safetensors")
    run, predictions, params = _find_evaluation(uri, experiment, task, weights, manifest, str(checkpoint))
    stored = feature_folder(manifest, cache) / cache_name(weights, manifest.digest, None, ("mean",))
    features = features_of(encoder, manifest, task.rows, stored, f"features of {encoder.config['run_name']}")
    train, test = _first_fold(task, manifest, predictions)
    test = _sample(test, task, scans, seed)
    maps = occlusion(
        encoder, manifest, task, features=features, train=train, test=test, params=params, cubes=cubes
    )  # fmt: skip
    tracker = Tracker.open(uri, experiment, str(run["name"]), run_id=run["run_id"])
    with scratch_folder("saliency") as temporary:
        path = temporary / f"saliency_{task.name}.npz"
        np.savez_compressed(path, allow_pickle=False, **maps)
        tracker.log_artifact(path, "evaluation")
        tracker.end()
    return maps


def occlusion(
    encoder: torch.nn.Module,
    manifest: Manifest,
    task: Task,
    *,
    features: NDArray[Any],
    train: NDArray[Any],
    test: NDArray[Any],
    params: Params,
    cubes: int,
) -> dict[str, NDArray[Any]]:
    """Return how much the score of a linear probe changes when a cube is hidden.

    A hidden cube is set to 0, the mean of a z-scored scan and the value that the cutout of pretraining writes.

    Args:
        encoder: volumes (N, 1, D, H, W) -> features (N, F).
        manifest: of the shards.
        task: binary or regression.
        features: (N, F) of the task's scans.
        train: positions in the task of the scans that the probe is fitted to.
        test: positions of the scans over which the map is averaged.
        params: of the probe.
        cubes: number along the longest side of the volume.

    Returns:
        map (D, H, W), the mean |change of the score| over the test scans; background (D, H, W), the mean of these scans;
        scans, their number; side, that of the cubes in voxels.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.eval().to(device)
    background = torch.cat([batch for _, batch in volumes(manifest, task.rows[test], BATCH)]).mean(0)[0].numpy()
    boxes, side = boxes_of(background, cubes)
    total = np.zeros(len(boxes))
    with torch.no_grad(), Progress(len(test), "scans", f"occlusion for {task.name}") as progress:
        for position, (_, batch) in zip(test, volumes(manifest, task.rows[test], 1), strict=True):
            occluded = [
                encoder(occluded_scans.to(device)).float().cpu().numpy()
                for occluded_scans in _occluded(batch[0], boxes)
            ]
            variants = np.concatenate([features[position][None], *occluded])
            scores = _scores(task, features, train, position, variants, params)
            total += np.abs(scores[1:] - scores[0])
            progress.advance(1)
    change = np.zeros(background.shape, np.float16)
    for box, value in zip(boxes, total / len(test), strict=True):
        change[box] = value
    shown = (background - background.min()).astype(np.float16)
    return {"map": change, "background": shown, "scans": np.array(len(test)), "side": np.array(side)}


def boxes_of(background: NDArray[Any], cubes: int) -> tuple[list[Box], int]:
    """Return cubes that tile the brain of a volume (D, H, W) and their side in voxels; cubes that hold only air are left out.

    ``cubes`` is the number of cubes along the longest axis.
    """
    side = -(-max(background.shape) // cubes)
    brain = background > background.min() + 0.1 * (background.max() - background.min())
    starts = np.stack(np.meshgrid(*(np.arange(0, n, side) for n in background.shape), indexing="ij"), -1).reshape(-1, 3)
    boxes: list[Box] = [(slice(x, x + side), slice(y, y + side), slice(z, z + side)) for x, y, z in starts.tolist()]
    return [box for box in boxes if brain[box].any()], side


def _occluded(volume_1DHW: torch.Tensor, boxes: list[Box]) -> Iterator[torch.Tensor]:
    """Yield batches (n, 1, D, H, W) of a scan, each copy with one cube hidden."""
    for start in range(0, len(boxes), BATCH):
        batch_boxes = boxes[start : start + BATCH]
        copies = volume_1DHW.repeat(len(batch_boxes), 1, 1, 1, 1)
        for copy, box in zip(copies, batch_boxes, strict=True):
            copy[0][box] = 0.0
        yield copies


def _scores(
    task: Task, features: NDArray[Any], train: NDArray[Any], position: int, variants: NDArray[Any], params: Params
) -> NDArray[Any]:
    """Return the probe's scores (M,) of variants (M, F) of one scan, with the covariates and confounds of that scan."""
    rows = np.concatenate([train, np.full(len(variants), position)])
    none = np.empty((len(rows), 0))
    table = FeatureTable(
        np.concatenate([features[train], variants]).astype(np.float64), task.labels[rows], task.groups[rows], task.kind,
        covariates=none if task.covariates is None else task.covariates[rows],
        confounds=none if task.confounds is None else task.confounds[rows],
    )  # fmt: skip
    return fit_predict(linear, params, table, np.arange(len(train)), np.arange(len(train), len(rows))).predicted


def _find_evaluation(
    uri: str, experiment: str, task: Task, weights: str, manifest: Manifest, name: str
) -> tuple[dict[str, Any], pd.DataFrame, Params]:
    """Return the newest evaluation of weights by a linear probe: its run, the task's predictions, the params of fold 0."""
    reasons: set[str] = set()
    for run in runs.runs(uri, experiment, "evaluation", f"tags.`yaware.weights_sha256` = '{weights}'"):
        reason = _why_not(run, manifest)
        reasons.add(reason or "one is of other tasks")
        if reason:
            continue
        with scratch_folder("saliency") as temporary:
            path = runs.download(uri, run["run_id"], "evaluation", temporary)
            predictions, trials = (
                pd.read_parquet(regular_file(path / "predictions.parquet")),
                pd.read_csv(regular_file(path / "trials.csv")),
            )
        if task.name in set(predictions["task"]):
            fold = trials[(trials["task"] == task.name) & (trials["part"] == "fold 0")]
            params: Params = json.loads(fold["point"].to_list()[int(fold["inner_score"].argmax())])
            return run, predictions[predictions["task"] == task.name], params
    found = f"of its evaluations {', '.join(sorted(reasons))}" if reasons else "it has none of these weights"
    raise UserError(
        f"{name} has no evaluation of task {task.name} by a linear probe on these shards in experiment {experiment!r} "
        f"({found}); run yaware evaluate --tasks {task.name} --protocols linear first"
    )


def _why_not(run: dict[str, Any], manifest: Manifest) -> str:
    """Return why a map cannot be made from an evaluation run; empty if it can."""
    variant = ProtocolVariant.from_tags(run["tags"])
    if run["status"] != "FINISHED":
        return "one is unfinished"
    if run["tags"].get("yaware.manifest_digest") != manifest.digest:
        return "one is of other shards"
    if variant.model != "linear" or variant.options:
        return f"one is by protocol {variant.label or variant.protocol}"
    return ""


def _first_fold(
    task: Task, manifest: Manifest, predictions: pd.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the training and of the test scans of an evaluation's first fold."""
    keys = manifest.scans["key"].to_numpy()[task.rows]
    inside = np.isin(keys, predictions.loc[predictions["fold"] == 0, "key"])
    outside = ~np.isin(task.groups, task.groups[inside])
    if task.test is not None:
        outside &= ~task.test
    return np.flatnonzero(outside), np.flatnonzero(inside)


def _sample(test: NDArray[Any], task: Task, count: int, seed: int) -> NDArray[Any]:
    """Return up to ``count`` of the test scans, of a binary task equally many of each class."""
    shuffled = saliency_generator(seed).permutation(test)
    if task.kind != "binary":
        return np.sort(shuffled[:count])
    of_each = max(1, count // 2)
    return np.sort(np.concatenate([shuffled[task.labels[shuffled] == code][:of_each] for code in (0, 1)]))
