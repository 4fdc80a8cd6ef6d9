"""Trains all weights of an encoder, with a head, on a task's training scans. Legend: B scans, C covariates, K outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from scipy.special import expit
from torch import nn
from torch.nn import functional

from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from evaluation.protocols.probes import Predictions, log_odds, score, standardised
from evaluation.tasks.folds import inner_folds
from infra import random_streams
from pretrain.encoders import build_encoder
from pretrain.engine.optimizers import depth_of
from pretrain.weights.encoder import Encoder

Array = np.ndarray[Any, np.dtype[Any]]
Point = dict[str, Any]
HEAD_LR = 10.0  # the new head learns so many times faster than the last block


@settings(config=ConfigDict(extra="forbid", validate_default=True))
class FineTuning:
    """How networks are trained on a task: ``--finetune.KEY=VALUE``."""

    epochs: int = Field(default=30, ge=1)  # at most; how many is chosen on inner folds
    patience: int = Field(default=5, ge=1)  # epochs without a better inner score, after which a trial ends
    batch: int = Field(default=8, ge=2)
    trials: int = Field(default=8, ge=0)  # points that Optuna tries for each fold; 0: the three below as they are
    halving: int = Field(default=3, ge=1)  # epochs after which ASHA may stop a trial
    lr: float = Field(default=1e-4, gt=0)
    layer_decay: float = Field(default=0.75, gt=0, le=1)  # a block's learning rate over that of the next one
    weight_decay: float = Field(default=5e-5, ge=0)
    freeze_epochs: int = Field(default=0, ge=0)  # epochs at first in which only the head learns
    inner_folds: int = Field(default=1, ge=1, le=3)  # of three, on which a trial is judged, trained side by side
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    ranks: int = Field(default=1, ge=1)  # processes that share the batch of the final fits (Ray Train)
    curve: bool = False  # learning curves too, at --n-train
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float | None = Field(default=None, ge=0, le=1)  # null: a whole one where there are any
    memory_gb: float = Field(default=4.0, ge=0)  # scans that a trial keeps decoded
    seed: int = Field(default=0, ge=0)


@dataclass
class TrainingJob:
    """All that a worker needs to train on one task: N scans of a manifest, and the encoder's folder (None: random weights)."""

    shards: str
    folder: str | None
    encoder: dict[str, Any]
    rows: Array  # (N,) rows of the manifest
    labels: Array
    groups: Array
    kind: str
    covariates: Array  # (N, C)
    settings: FineTuning
    device: str

    @property
    def outputs(self) -> int:
        """K: logits of a multi-class task, else 1."""
        return int(self.labels.max()) + 1 if self.kind == "multiclass" else 1


class Network(nn.Module):
    """An encoder and a linear head on its features and the covariates: (B, 1, D, H, W), (B, C) -> (B, K)."""

    def __init__(self, encoder: nn.Module, features: int, covariates: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features + covariates, outputs)
        self.frozen = False

    def forward(self, volumes: torch.Tensor, covariates: torch.Tensor) -> torch.Tensor:
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.encoder(volumes)
        answer: torch.Tensor = self.head(torch.cat([features.float(), covariates], dim=1))
        return answer

    def train(self, mode: bool = True) -> Network:
        """Training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def build(job: TrainingJob, seed: int) -> Network:
    """The job's network; the head, and without a folder all weights, drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if job.folder is None:
            encoder = build_encoder(job.encoder["name"], job.encoder["options"])
            features = int(encoder.feature_size)  # type: ignore[arg-type]
        else:
            pretrained = Encoder.from_pretrained(job.folder)
            encoder, features = pretrained.network, pretrained.feature_size
        return Network(encoder, features, job.covariates.shape[1], job.outputs)


def parameter_groups(network: Network, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """The last block learns at ``lr``, each before it at ``layer_decay`` times the next one's, the head ten times faster.

    The blocks are those of pretraining's layer decay (``depth_of``): stem first, what is behind the last block as that.
    """
    depths = {name: depth_of(name) for name, _ in network.encoder.named_parameters()}
    deepest = max((depth for depth in depths.values() if depth is not None), default=0)
    blocks: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.encoder.named_parameters():
        depth = depths[name]
        blocks.setdefault(deepest if depth is None else depth, []).append(parameter)
    groups = [{"params": blocks[depth], "lr": lr * layer_decay ** (deepest - depth)} for depth in sorted(blocks)]
    return [*groups, {"params": list(network.head.parameters()), "lr": HEAD_LR * lr}]


class Scans:
    """The job's scans as training takes them: z-scored volumes, covariates and targets, by their place in the task."""

    def __init__(self, job: TrainingJob, fit: Array) -> None:
        manifest = Manifest.load(job.shards)
        self._job, self._reader = job, manifest.reader()
        self._kept: dict[int, Array] = {}
        self._room = job.settings.memory_gb * 1e9
        self._covariates = standardised(job.covariates[fit], job.covariates)[1]
        self.mean, self.deviation = 0.0, 1.0
        if job.kind == "regression":
            self.mean, self.deviation = float(job.labels[fit].mean()), float(job.labels[fit].std()) or 1.0

    def inputs(self, places: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, D, H, W) float32 and (B, C) float32 on the job's device."""
        volumes = np.stack([zscore(self._read(int(place)))[None] for place in places])
        covariates = torch.from_numpy(self._covariates[places].astype(np.float32))
        return torch.from_numpy(volumes).to(self._job.device), covariates.to(self._job.device)

    def targets(self, places: Array) -> torch.Tensor:
        """(B,) class codes, or numbers less their mean over their standard deviation."""
        labels = self._job.labels[places]
        if self._job.kind == "multiclass":
            return torch.from_numpy(labels.astype(np.int64)).to(self._job.device)
        return torch.from_numpy(((labels - self.mean) / self.deviation).astype(np.float32)).to(self._job.device)

    def _read(self, place: int) -> Array:
        if place not in self._kept:
            voxels = self._reader.read(int(self._job.rows[place]))
            if self._room < voxels.nbytes:
                return voxels
            self._room -= voxels.nbytes
            self._kept[place] = voxels
        return self._kept[place]


def epochs(
    job: TrainingJob, point: Point, fit: Array, scans: Scans, rank: int = 0, world_size: int = 1
) -> Iterator[Network]:  # fmt: skip
    """The network after one, two, three … epochs on the scans ``fit``; with several ranks each takes its part of a batch."""
    network = build(job, job.settings.seed).to(job.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(network, point["lr"], point["layer_decay"]), weight_decay=point["weight_decay"]
    )
    model: nn.Module = network
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(network, find_unused_parameters=job.settings.freeze_epochs > 0)
    weights = _class_weights(job, fit)
    epoch = 0
    while True:
        network.frozen = epoch < job.settings.freeze_epochs
        network.train()
        for batch in _batches(fit, job.settings, epoch):
            mine = batch[rank::world_size]
            volumes, covariates = scans.inputs(mine)
            with _autocast(job):
                answers = model(volumes, covariates)
            # Data parallelism averages over the ranks, whose parts may differ by a scan: the sum over the batch's size.
            loss = _losses(job, answers.float(), scans.targets(mine), weights).sum() * world_size / len(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield network
        epoch += 1


def _batches(fit: Array, given: FineTuning, epoch: int) -> list[Array]:
    """The scans in a new order, cut into nearly equal batches: none is so small that its statistics are none."""
    generator = random_streams.generator(given.seed, random_streams.FINE_TUNING_ORDER, (0, 0, 0, epoch))
    return np.array_split(generator.permutation(fit), max(1, round(len(fit) / given.batch)))


def _autocast(job: TrainingJob) -> Any:
    half = job.settings.precision == "bf16" or (job.settings.precision == "auto" and job.device != "cpu")
    return torch.autocast(job.device.partition(":")[0], torch.bfloat16) if half else nullcontext()


def _class_weights(job: TrainingJob, fit: Array) -> torch.Tensor | None:
    """By which all classes of the training scans count alike."""
    if job.kind == "regression":
        return None
    counts = np.bincount(job.labels[fit].astype(np.int64), minlength=max(2, job.outputs))
    weights = np.where(counts > 0, len(fit) / (np.maximum(counts, 1) * (counts > 0).sum()), 0.0)
    return torch.from_numpy(weights.astype(np.float32)).to(job.device)


def _losses(
    job: TrainingJob, answers: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """(B,): squared error, or cross-entropy times the class's weight."""
    if weights is None:
        return functional.mse_loss(answers[:, 0], targets, reduction="none")
    if job.kind == "multiclass":
        return functional.cross_entropy(answers, targets, reduction="none") * weights[targets]
    return (
        functional.binary_cross_entropy_with_logits(answers[:, 0], targets, reduction="none") * weights[targets.long()]
    )


def predict(job: TrainingJob, network: Network, scans: Scans, fit: Array, ask: Array) -> Predictions:
    """What a network fitted to the scans ``fit`` says of the scans ``ask``."""
    network.eval()
    parts = []
    with torch.no_grad(), _autocast(job):
        for first in range(0, len(ask), 2 * job.settings.batch):
            parts.append(network(*scans.inputs(ask[first : first + 2 * job.settings.batch])).float().cpu().numpy())
    values = np.concatenate(parts).astype(np.float64)
    if job.kind == "regression":
        return Predictions(values[:, 0] * scans.deviation + scans.mean, np.full(len(ask), np.nan))
    if job.kind == "multiclass":
        shares = np.exp(values - values.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return Predictions(shares.argmax(1).astype(np.float64), shares)
    return Predictions(values[:, 0], expit(values[:, 0] + log_odds(job.labels[fit])))


def trial(point: Point, data: dict[str, Any]) -> Iterator[dict[str, float]]:
    """The score on inner folds of the training scans ``fit`` after every epoch, until it has not risen for a while."""
    job, fit = data["job"], data["train"]
    torch.set_num_threads(max(1, int(job.settings.cpus_per_trial)))
    folds = inner_folds(job.labels[fit], job.groups[fit], job.kind, job.settings.seed)[: job.settings.inner_folds]
    inner = [(fit[known], fit[asked]) for known, asked in folds]
    scans = [Scans(job, known) for known, _ in inner]
    running = [epochs(job, point, known, given) for (known, _), given in zip(inner, scans, strict=True)]
    best, since = -np.inf, 0
    for _ in range(job.settings.epochs):
        found = []
        for steps, given, (known, asked) in zip(running, scans, inner, strict=True):
            answers = predict(job, next(steps), given, known, asked).predicted
            found.append(score(job.labels[asked], answers, job.kind))
        now = float(np.mean(found))
        yield {"score": now if np.isfinite(now) else -1e9}
        best, since = (now, 0) if now > best else (best, since + 1)
        if since >= job.settings.patience:
            return


def final_fit(data: dict[str, Any], rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Fit to all training scans for the number of epochs that the inner folds chose; the asked scans' answers."""
    job, fit, ask = data["job"], data["train"], data["test"]
    torch.set_num_threads(max(1, int(job.settings.cpus_per_trial)))
    scans = Scans(job, fit)
    steps = epochs(job, data["params"], fit, scans, rank, world_size)
    network = next(steps)
    for _ in range(data["epochs"] - 1):
        network = next(steps)
    if rank:
        return {}
    answers, probabilities = predict(job, network, scans, fit, ask)
    return {"predicted": answers, "probabilities": probabilities}
