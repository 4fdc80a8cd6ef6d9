"""Training of all weights of an encoder and a linear head on a task. Shapes: B scans, C covariates, K outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from scipy.special import expit
from torch import nn
from torch.nn import functional

from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from evaluation.features.tables import Predictions, standardised
from evaluation.protocols.probes import Params, inner_metric, log_odds
from evaluation.tasks.folds import inner_folds
from infra import random_streams
from infra.errors import UserError, nearest
from pretrain.encoders import build_encoder
from pretrain.encoders.pooling import SPATIAL
from pretrain.engine.optimizers import depth_of
from pretrain.weights.encoder import Encoder

HEAD_POOLINGS = ("mean", "max", *SPATIAL)
HEAD_LR = 10.0  # learning rate of the new head over that of the last block


@settings(config=ConfigDict(extra="forbid", validate_default=True))
class FineTuning:
    """Settings of the training of networks on a task: ``--finetune.KEY=VALUE``."""

    epochs: int = Field(default=30, ge=1)  # maximum; the number is chosen on inner folds
    patience: int = Field(default=5, ge=1)  # epochs without a better inner score after which a trial stops
    batch: int = Field(default=8, ge=2)  # scans per step, over all ranks
    trials: int = Field(default=8, ge=0)  # settings that Optuna tries for each fold; 0: only those given below
    halving: int = Field(default=3, ge=1)  # epochs after which ASHA may stop a trial
    lr: float = Field(default=1e-4, gt=0)  # of the last block
    layer_decay: float = Field(default=0.75, gt=0, le=1)  # learning rate of a block over that of the next block
    weight_decay: float = Field(default=5e-5, ge=0)
    freeze_epochs: int = Field(default=0, ge=0)  # first epochs, in which only the head is trained
    inner_folds: int = Field(default=1, ge=1, le=3)  # number of the three inner folds on which a trial is scored
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    ranks: int = Field(default=1, ge=1)  # data-parallel processes of the final fits (Ray Train)
    # Pooling of the last map under the head: grid2 to grid8, none, max, mean; null: the encoder's own
    pooling: str | None = None
    curve: bool = False  # also compute learning curves, at the sizes of --n-train
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float | None = Field(default=None, ge=0, le=1)  # null: 1 if the cluster has a GPU
    memory_gb: float = Field(default=4.0, ge=0)  # decoded scans that a trial keeps in memory
    seed: int = Field(default=0, ge=0)


@dataclass
class TrainingJob:
    """Everything that a worker needs to train a network on the N scans of a task."""

    shards: str  # URL or absolute path
    folder: str | None  # of the exported encoder; None: random weights
    encoder: dict[str, Any]  # name and options of the architecture
    rows: NDArray[Any]  # (N,) rows of the manifest
    labels: NDArray[Any]  # (N,)
    groups: NDArray[Any]  # (N,)
    kind: str  # binary, multiclass or regression
    covariates: NDArray[Any]  # (N, C)
    settings: FineTuning
    device: str
    sides: tuple[int, ...] = ()  # of the volumes in voxels

    @property
    def outputs(self) -> int:
        """Number of outputs K: the classes of a multiclass task, else 1."""
        return int(self.labels.max()) + 1 if self.kind == "multiclass" else 1


class EncoderWithHead(nn.Module):
    """An encoder with a linear head on its features and the covariates: (B, 1, D, H, W), (B, C) -> (B, K)."""

    def __init__(self, encoder: nn.Module, features: int, covariates: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features + covariates, outputs)
        self.frozen = False

    def forward(self, volumes: torch.Tensor, covariates: torch.Tensor) -> torch.Tensor:
        """Return logits, or the standardised prediction of a regression, (B, K) float32."""
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.encoder(volumes)
        outputs: torch.Tensor = self.head(torch.cat([features.float(), covariates], dim=1))
        return outputs

    def train(self, mode: bool = True) -> EncoderWithHead:
        """Set training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def build(job: TrainingJob, seed: int) -> EncoderWithHead:
    """Return the network of a job; the head, and without a pretrained folder all weights, are drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if job.folder is None:
            encoder = build_encoder(job.encoder["name"], job.encoder["options"])
            features = int(encoder.feature_size)  # type: ignore[arg-type]
        else:
            pretrained = Encoder.from_pretrained(job.folder)
            encoder, features = pretrained.network, pretrained.feature_size
        if job.settings.pooling is not None:
            encoder.use_pooling(job.settings.pooling, job.sides)  # type: ignore[operator]
            features = int(encoder.feature_size)  # type: ignore[arg-type]
        return EncoderWithHead(encoder, features, job.covariates.shape[1], job.outputs)


def check_head_pooling(encoder: nn.Module, pooling: str | None, sides: Sequence[int]) -> None:
    """Raise UserError unless the encoder's last map can be pooled by ``pooling``, for volumes of some sides in voxels."""
    if pooling is None:
        return
    if pooling not in HEAD_POOLINGS:
        hint = nearest(pooling, HEAD_POOLINGS)
        raise UserError(f"finetune.pooling={pooling!r} is not known{hint}; allowed: {', '.join(HEAD_POOLINGS)}")
    before = encoder.pooling
    encoder.use_pooling(pooling, sides)  # type: ignore[operator]
    encoder.use_pooling(before, sides)  # type: ignore[operator]


def parameter_groups(network: EncoderWithHead, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return AdamW parameter groups with a learning rate for each block.

    The last block and the layers after it learn at ``lr``, every other block at ``layer_decay`` times the rate of the next
    one, and the head at ten times ``lr``. Blocks are those of the layer decay of pretraining (``depth_of``), stem first.
    """
    depths = {name: depth_of(name) for name, _ in network.encoder.named_parameters()}
    deepest = max((depth for depth in depths.values() if depth is not None), default=0)
    blocks: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.encoder.named_parameters():
        depth = depths[name]
        blocks.setdefault(deepest if depth is None else depth, []).append(parameter)
    groups = [{"params": blocks[depth], "lr": lr * layer_decay ** (deepest - depth)} for depth in sorted(blocks)]
    return [*groups, {"params": list(network.head.parameters()), "lr": HEAD_LR * lr}]


class TaskScans:
    """Inputs and targets of a job's scans, by position in the task; training scans scale covariates and labels."""

    def __init__(self, job: TrainingJob, train: NDArray[Any]) -> None:
        manifest = Manifest.load(job.shards)
        self._job, self._reader = job, manifest.reader()
        self._decoded: dict[int, NDArray[Any]] = {}
        self._free_bytes = job.settings.memory_gb * 1e9
        self._covariates = standardised(job.covariates[train], job.covariates)[1]
        self.mean, self.deviation = 0.0, 1.0
        if job.kind == "regression":
            self.mean, self.deviation = float(job.labels[train].mean()), float(job.labels[train].std()) or 1.0

    def inputs(self, positions: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z-scored volumes (B, 1, D, H, W) and covariates (B, C), float32, on the job's device."""
        volumes = np.stack([zscore(self._read(int(position)))[None] for position in positions])
        covariates = torch.from_numpy(self._covariates[positions].astype(np.float32))
        return torch.from_numpy(volumes).to(self._job.device), covariates.to(self._job.device)

    def targets(self, positions: NDArray[Any]) -> torch.Tensor:
        """Return targets (B,): int64 class codes of a multiclass task, else float32 0/1 or standardised numbers."""
        labels = self._job.labels[positions]
        if self._job.kind == "multiclass":
            return torch.from_numpy(labels.astype(np.int64)).to(self._job.device)
        return torch.from_numpy(((labels - self.mean) / self.deviation).astype(np.float32)).to(self._job.device)

    def _read(self, position: int) -> NDArray[Any]:
        if position not in self._decoded:
            voxels = self._reader.read(int(self._job.rows[position]))
            if self._free_bytes < voxels.nbytes:
                return voxels
            self._free_bytes -= voxels.nbytes
            self._decoded[position] = voxels
        return self._decoded[position]


def epochs(
    job: TrainingJob, params: Params, train: NDArray[Any], scans: TaskScans, rank: int = 0, world_size: int = 1
) -> Iterator[EncoderWithHead]:  # fmt: skip
    """Yield the network after each epoch of training on the scans at the positions ``train``, without end.

    ``params`` holds lr, layer_decay and weight_decay. With several ranks each batch is divided among them.
    """
    network = build(job, job.settings.seed).to(job.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(network, params["lr"], params["layer_decay"]), weight_decay=params["weight_decay"]
    )
    model: nn.Module = network
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(network, find_unused_parameters=job.settings.freeze_epochs > 0)
    weights = _class_weights(job, train)
    epoch = 0
    while True:
        network.frozen = epoch < job.settings.freeze_epochs
        network.train()
        for batch in _batches(train, job.settings, epoch):
            local = batch[rank::world_size]
            volumes, covariates = scans.inputs(local)
            with _autocast(job):
                outputs = model(volumes, covariates)
            # DDP averages gradients over the ranks, whose parts of a batch may differ by one scan; dividing the sum by the
            # size of the batch makes the result that of one rank.
            loss = _losses(job, outputs.float(), scans.targets(local), weights).sum() * world_size / len(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield network
        epoch += 1


def _batches(train: NDArray[Any], settings: FineTuning, epoch: int) -> list[NDArray[Any]]:
    """Shuffle the scans and split them into nearly equal batches, so that no batch is too small for batch statistics."""
    generator = random_streams.generator(settings.seed, random_streams.FINE_TUNING_ORDER, (0, 0, 0, epoch))
    return np.array_split(generator.permutation(train), max(1, round(len(train) / settings.batch)))


def _autocast(job: TrainingJob) -> Any:
    bf16 = job.settings.precision == "bf16" or (job.settings.precision == "auto" and job.device != "cpu")
    return torch.autocast(job.device.partition(":")[0], torch.bfloat16) if bf16 else nullcontext()


def _class_weights(job: TrainingJob, train: NDArray[Any]) -> torch.Tensor | None:
    """Return weights (classes,) that give all classes of the training scans equal influence; None for a regression."""
    if job.kind == "regression":
        return None
    counts = np.bincount(job.labels[train].astype(np.int64), minlength=max(2, job.outputs))
    weights = np.where(counts > 0, len(train) / (np.maximum(counts, 1) * (counts > 0).sum()), 0.0)
    return torch.from_numpy(weights.astype(np.float32)).to(job.device)


def _losses(
    job: TrainingJob, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the loss of each scan (B,): squared error, or cross-entropy times the weight of the class."""
    if weights is None:
        return functional.mse_loss(outputs[:, 0], targets, reduction="none")
    if job.kind == "multiclass":
        return functional.cross_entropy(outputs, targets, reduction="none") * weights[targets]
    return (
        functional.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none") * weights[targets.long()]
    )


def predict(
    job: TrainingJob, network: EncoderWithHead, scans: TaskScans, train: NDArray[Any], test: NDArray[Any]
) -> Predictions:
    """Return the predictions for the scans ``test`` (m,) of a network that was trained on the scans ``train`` (n,)."""
    network.eval()
    batches = []
    with torch.no_grad(), _autocast(job):
        for first in range(0, len(test), 2 * job.settings.batch):
            batches.append(network(*scans.inputs(test[first : first + 2 * job.settings.batch])).float().cpu().numpy())
    values = np.concatenate(batches).astype(np.float64)
    if job.kind == "regression":
        return Predictions(values[:, 0] * scans.deviation + scans.mean, np.full(len(test), np.nan))
    if job.kind == "multiclass":
        probabilities = np.exp(values - values.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        return Predictions(probabilities.argmax(1).astype(np.float64), probabilities)
    return Predictions(values[:, 0], expit(values[:, 0] + log_odds(job.labels[train])))


def trial(params: Params, data: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Yield the mean score on inner folds of the training scans after each epoch; stop when it has not risen for a while.

    ``data`` holds job and train (positions of the training scans).
    """
    job, train = data["job"], data["train"]
    torch.set_num_threads(max(1, int(job.settings.cpus_per_trial)))
    folds = inner_folds(job.labels[train], job.groups[train], job.kind, job.settings.seed)[: job.settings.inner_folds]
    inner = [(train[inner_train], train[inner_test]) for inner_train, inner_test in folds]
    scans = [TaskScans(job, inner_train) for inner_train, _ in inner]
    runs = [epochs(job, params, inner_train, given) for (inner_train, _), given in zip(inner, scans, strict=True)]
    best, epochs_since_best = -np.inf, 0
    for _ in range(job.settings.epochs):
        scores = []
        for run, fold_scans, (inner_train, inner_test) in zip(runs, scans, inner, strict=True):
            predicted = predict(job, next(run), fold_scans, inner_train, inner_test).predicted
            scores.append(inner_metric(job.labels[inner_test], predicted, job.kind))
        score = float(np.mean(scores))
        yield {"score": score if np.isfinite(score) else -1e9}
        best, epochs_since_best = (score, 0) if score > best else (best, epochs_since_best + 1)
        if epochs_since_best >= job.settings.patience:
            return


def final_fit(data: dict[str, Any], rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Train on all training scans of a fold for a fixed number of epochs and predict its test scans.

    Args:
        data: job, params, epochs, train and test (positions).
        rank: of this process; only rank 0 returns predictions.
        world_size: number of processes.

    Returns:
        predicted and probabilities for the test scans; empty on other ranks.
    """
    job, train, test = data["job"], data["train"], data["test"]
    torch.set_num_threads(max(1, int(job.settings.cpus_per_trial)))
    scans = TaskScans(job, train)
    run = epochs(job, data["params"], train, scans, rank, world_size)
    network = next(run)
    for _ in range(data["epochs"] - 1):
        network = next(run)
    if rank:
        return {}
    predicted, probabilities = predict(job, network, scans, train, test)
    return {"predicted": predicted, "probabilities": probabilities}
