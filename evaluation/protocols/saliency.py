"""Where in the brain a probe's answer comes from: hide a cube at a time and see how far the score moves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_pipeline.loading.loader import volumes
from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.features import cache_name, features_of
from evaluation.protocols.probes import FeatureTable, Point, fit_predict
from evaluation.protocols.record import PLAIN
from evaluation.protocols.variant import ProtocolVariant
from evaluation.tasks.leakage import check_leakage
from evaluation.tasks.tasks import Task, load_task
from infra.errors import UserError
from infra.files import sha256_of
from infra.progress import Progress
from infra.tracking import runs
from infra.tracking.tracker import Tracker, default_uri
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.scan_source import check_preprocessing

Array = np.ndarray[Any, np.dtype[Any]]
BATCH = 16
SCANS = 16  # held-out scans over which the map is averaged
CUBES = 6  # along the longest side
Box = tuple[slice, slice, slice]


def add_saliency(
    checkpoint: str | Path, shards: str | Path, task_name: str, *, experiment: str = "yaware",
    tracking_uri: str | None = None, scans: int = SCANS, cubes: int = CUBES, seed: int = 0,
) -> dict[str, Array]:  # fmt: skip
    """Compute the map of an evaluated checkpoint and task and add it to its evaluation's run; the map.

    The probe is that of the evaluation's first fold: the penalty chosen there, fitted to the scans outside that fold. The
    scans looked at are in it, so they were held out. UserError where the checkpoint was not evaluated on the task.
    """
    manifest, uri = Manifest.load(shards), tracking_uri or default_uri()
    folder, encoder = find_encoder(checkpoint), Encoder.from_pretrained(checkpoint)
    check_preprocessing(encoder.preprocessing, manifest, str(checkpoint))
    task = load_task(task_name, manifest)
    check_leakage(encoder, checkpoint, manifest, task.rows, str(checkpoint))
    if task.kind == "multiclass":
        raise UserError(f"task {task.name} has several classes and so no one score; choose a binary task or a number")
    weights = sha256_of(folder / "model.safetensors")
    run, predictions, point = _evaluation(uri, experiment, task, weights, manifest, str(checkpoint))
    cache = manifest.root / ".features" / cache_name(weights, manifest.digest, None, ("mean",))
    features = features_of(encoder, manifest, task.rows, cache, f"features of {encoder.config['run_name']}")
    fit, ask = _sides(task, manifest, predictions)
    ask = _some(ask, task, scans, seed)
    maps = occlusion(encoder, manifest, task, features, fit, ask, point, cubes)
    tracker = Tracker.open(uri, experiment, str(run["name"]), run_id=run["run_id"])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"saliency_{task.name}.npz"
        np.savez_compressed(path, allow_pickle=False, **maps)
        tracker.log_artifact(path, "evaluation")
        tracker.end()
    return maps


def occlusion(
    encoder: Encoder, manifest: Manifest, task: Task, features: Array, fit: Array, ask: Array, point: Point, cubes: int
) -> dict[str, Array]:
    """map (D, H, W): mean over the scans ``ask`` of |change of score| when the cube around a voxel is set to 0.

    0 is a scan's mean, and what the cutout of pretraining writes. Also ``background`` (D, H, W), the mean of these scans,
    and ``scans``, ``side`` (voxels). Features (N, F) are those of the task's scans; fit and ask are places among them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.eval().to(device)
    background = torch.cat([batch for _, batch in volumes(manifest, task.rows[ask], BATCH)]).mean(0)[0].numpy()
    boxes, side = boxes_of(background, cubes)
    total = np.zeros(len(boxes))
    with torch.no_grad(), Progress(len(ask), "scans", f"occlusion for {task.name}") as progress:
        for place, (_, batch) in zip(ask, volumes(manifest, task.rows[ask], 1), strict=True):
            hidden = [encoder(part.to(device)).float().cpu().numpy() for part in _hidden(batch[0], boxes)]
            variants = np.concatenate([features[place][None], *hidden])
            scores = _scores(task, features, fit, place, variants, point)
            total += np.abs(scores[1:] - scores[0])
            progress.advance(1)
    change = np.zeros(background.shape, np.float16)
    for box, value in zip(boxes, total / len(ask), strict=True):
        change[box] = value
    shown = (background - background.min()).astype(np.float16)
    return {"map": change, "background": shown, "scans": np.array(len(ask)), "side": np.array(side)}


def boxes_of(background: Array, cubes: int) -> tuple[list[Box], int]:
    """Cubes that tile a volume, those of air left out, and their side in voxels; ``cubes`` along the longest axis."""
    side = -(-max(background.shape) // cubes)
    brain = background > background.min() + 0.1 * (background.max() - background.min())
    starts = np.stack(np.meshgrid(*(np.arange(0, n, side) for n in background.shape), indexing="ij"), -1).reshape(-1, 3)
    boxes: list[Box] = [(slice(x, x + side), slice(y, y + side), slice(z, z + side)) for x, y, z in starts.tolist()]
    return [box for box in boxes if brain[box].any()], side


def _hidden(volume_1DHW: torch.Tensor, boxes: list[Box]) -> Iterator[torch.Tensor]:
    """Batches (n, 1, D, H, W) of a scan with one cube hidden in each."""
    for start in range(0, len(boxes), BATCH):
        some = boxes[start : start + BATCH]
        copies = volume_1DHW.repeat(len(some), 1, 1, 1, 1)
        for number, box in enumerate(some):
            copies[number, 0][box] = 0.0
        yield copies


def _scores(task: Task, features: Array, fit: Array, place: int, variants: Array, point: Point) -> Array:
    """The probe's scores of one scan's variants (M, F), which keep that scan's covariates and confounds."""
    asked = np.full(len(variants), place)

    def beside(values: Array | None) -> Array:
        return np.empty((len(fit) + len(asked), 0)) if values is None else values[np.concatenate([fit, asked])]

    both = np.concatenate([fit, asked])
    table = FeatureTable(
        np.concatenate([features[fit], variants]).astype(np.float64), task.labels[both], task.groups[both], task.kind,
        beside(task.covariates), beside(task.confounds),
    )  # fmt: skip
    return fit_predict("linear", point, table, np.arange(len(fit)), np.arange(len(fit), len(both))).predicted


def _evaluation(
    uri: str, experiment: str, task: Task, weights: str, manifest: Manifest, name: str
) -> tuple[dict[str, Any], pd.DataFrame, Point]:
    """The newest evaluation by the linear probe: its run, the task's predictions, and the penalty of its first fold."""
    for run in runs.runs(uri, experiment, "evaluation", f"tags.`yaware.weights_sha256` = '{weights}'"):
        tags = run["tags"]
        same = tags.get("yaware.manifest_digest") == manifest.digest and run["status"] == "FINISHED"
        variant = ProtocolVariant.from_tags(tags)
        if not same or variant.protocol not in PLAIN or variant.options:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = runs.download(uri, run["run_id"], "evaluation", Path(temporary))
            predictions, trials = pd.read_parquet(path / "predictions.parquet"), pd.read_csv(path / "trials.csv")
        if task.name in set(predictions["task"]):
            mine = trials[(trials["task"] == task.name) & (trials["part"] == "fold 0")]
            point: Point = json.loads(mine["point"].to_list()[int(mine["inner_score"].argmax())])
            return run, predictions[predictions["task"] == task.name], point
    raise UserError(
        f"{name} has no evaluation of task {task.name} on these shards in experiment {experiment!r}; run yaware evaluate "
        f"--tasks {task.name} --protocols linear first"
    )


def _sides(task: Task, manifest: Manifest, predictions: pd.DataFrame) -> tuple[Array, Array]:
    """Places among the task's scans: outside the first fold, nobody of whom is in it, and in it."""
    keys = manifest.scans["key"].to_numpy()[task.rows]
    inside = np.isin(keys, predictions.loc[predictions["fold"] == 0, "key"])
    outside = ~np.isin(task.groups, task.groups[inside])
    if task.test is not None:
        outside &= ~task.test
    return np.flatnonzero(outside), np.flatnonzero(inside)


def _some(ask: Array, task: Task, count: int, seed: int) -> Array:
    """Up to ``count`` of the scans, of a binary task as many of each class."""
    mixed = np.random.default_rng(seed).permutation(ask)
    if task.kind != "binary":
        return np.sort(mixed[:count])
    return np.sort(np.concatenate([mixed[task.labels[mixed] == code][: max(1, count // 2)] for code in (0, 1)]))
