"""The sections of a pretraining recipe. Every key that a recipe may hold is a field here, with its default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from infra.errors import UserError, nearest
from infra.files import atomic_write
from infra.settings import change_settings, load_settings, to_yaml

RECIPES = Path(__file__).parent / "recipes"
_strict = ConfigDict(extra="forbid", validate_default=True)


@dataclass(config=_strict)
class Run:
    """What the run is called and where it writes."""

    name: str = "y-aware"
    output: str = "runs/y-aware"
    experiment: str = "yaware"
    seed: int = Field(default=0, ge=0)
    # auto: from the newest checkpoint of `output`; never: refuse where there is one; or a checkpoint of another run.
    resume: str = "auto"
    # MLflow store; null = MLFLOW_TRACKING_URI, else sqlite:///mlruns/mlflow.db
    tracking_uri: str | None = None


@dataclass(config=_strict)
class Balance:
    """Show groups of scans, or subjects, equally often (data_pipeline.loading.balance says what that does to the positives)."""

    by: str | None = None  # a column of scans.parquet: site, age, …
    bins: float | None = Field(default=None, gt=0)  # width of a group in the column's unit, as 5 (years) for age
    one_session_per_subject: bool = False


@dataclass(config=_strict)
class Data:
    """Which scans, and how they reach the training device."""

    shards: str = "shards"
    split: list[str] = field(default_factory=lambda: ["pretrain"])
    query: str | None = None  # pandas query over the columns of scans.parquet
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where DALI augments
    workers: int = Field(default=0, ge=0)  # processes that read and decode; 0 = in the training process
    threads: int = Field(default=1, ge=1)  # DALI's own threads
    prefetch: int = Field(default=2, ge=1)
    # index: any scan, any number of ranks; stream (webdataset) and dali: shards front to back, ranks fixed for the run
    reader: Literal["index", "stream", "dali"] = "index"
    buffer: int = Field(default=256, ge=1)  # scans that stream and dali hold for shuffling
    balance: Balance = field(default_factory=Balance)
    max_bad_share: float = Field(default=0.001, ge=0, le=1)  # of scans that cannot be read; more than it (and 3) stops
    # Shards at s3:// or http(s)://: a folder that keeps them once read, and the most that it may hold (10^9 bytes).
    cache: str | None = None
    cache_gb: float | None = Field(default=None, gt=0)
    retries: int = Field(default=4, ge=0)  # of a failed read, after 0.5 s, 1 s, 2 s, ...
    timeout: float = Field(default=60.0, gt=0)  # seconds without an answer after which a read has failed


@dataclass(config=_strict)
class Batch:
    """Scans (two views each) a step over all ranks."""

    global_: int = Field(default=64, ge=2)
    # Scans a rank embeds at a time, for batches beyond its memory (pretrain.engine.grad_cache); null = all of its share.
    micro: int | None = Field(default=None, ge=1)


@dataclass(config=_strict)
class Encoder:
    """A key of pretrain.encoders.ENCODERS and its options."""

    name: str = "densenet121"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_strict)
class Projector:
    """Linear, ReLU, Linear on the pooled features, as in the paper."""

    hidden: int = Field(default=512, ge=1)
    out: int = Field(default=128, ge=1)


@dataclass(config=_strict)
class Proxy:
    """How one proxy (a column of scans.parquet, or two as ``age+tiv``) weighs pairs: a kernel and its options."""

    kernel: str = "gaussian"  # a key of pretrain.kernels.KERNELS
    # In the proxy's unit (years for age; 0 = SimCLR), or a rule over the scans' values: scott, silverman.
    bandwidth: float | list[float] | Literal["scott", "silverman"] | None = None
    covariance: list[list[float]] | Literal["scott", "silverman"] | None = None  # multivariate-gaussian
    otherwise: float | None = None  # kernel same: weight where the proxy differs
    same: float | None = None  # kernel different: weight where it is equal

    def options(self) -> dict[str, Any]:
        """What was given, as pretrain.losses.proxies.build_kernel takes it."""
        return {name: value for name, value in vars(self).items() if value is not None and not name.startswith("_")}


@dataclass(config=_strict)
class Loss:
    """The contrastive loss over all ranks' embeddings."""

    name: str = "y-aware"  # a key of pretrain.losses.LOSSES
    temperature: float = Field(default=0.1, gt=0)
    temperature_bounds: tuple[float, float] | None = None  # learn the temperature within these, as in [0.01, 1.0]
    normalization: Literal["row", "column"] = "row"
    proxies: dict[str, Proxy] = field(default_factory=lambda: {"age": Proxy(bandwidth=5.0)})
    cross_view: bool = False  # negatives from the other view only
    mask_subjects: bool = False  # other sessions of the anchor's participant are neither positives nor negatives
    tile: int | Literal["auto"] | None = None  # columns at a time; null = the whole matrix
    # The loss's own options, such as {scale: 2.0, ridge: 0.1} of decoupled-uniformity.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_strict)
class Optimizer:
    """Optimiser and learning-rate schedule. Adam (with L2 weight decay) is the paper's.

    Gradients are clipped by DeepSpeed: ``deepspeed.gradient_clipping`` is the largest L2 norm of the whole gradient.
    """

    # adamw decays weights apart from the gradient; sgd has momentum 0.9; lamb and lars scale each layer's step (large
    # batches, pretrain.engine.layerwise)
    name: Literal["adam", "adamw", "sgd", "lamb", "lars"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=5e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw, lamb
    # The projector trains at lr, the encoder's last block at layer_decay * lr, the one before at layer_decay^2 * lr, and
    # so on down to the stem; null: all at lr.
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "cosine", "step"] = "constant"
    step_epochs: float = Field(default=10.0, gt=0)  # decay: step multiplies lr by step_factor every so many epochs
    step_factor: float = Field(default=0.9, gt=0, le=1)


@dataclass(config=_strict)
class Train:
    """How long. ``steps`` wins over ``epochs``; ``steps: 0`` writes the untrained encoder, the random baseline."""

    epochs: float | None = Field(default=30.0, gt=0)
    steps: int | None = Field(default=None, ge=0)
    # bf16, fp16: weights in 16 bits beside float32 masters; autocast, autocast-fp16: float32 weights, products in 16 bits.
    # The fp16 ones scale the loss and leave out steps whose gradient overflows (keys of the scaler: deepspeed.fp16).
    precision: Literal["fp32", "bf16", "fp16", "autocast", "autocast-fp16"] = "fp32"
    # A moving average of the encoder's weights, which the monitor judges and evaluation uses, as 0.999; null = off.
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    # Steps whose loss or gradient is not finite: so many are left out in a run, one more stops it (pretrain.run.skips).
    max_skipped_steps: int = Field(default=0, ge=0)
    # A rank that does not move for so long ends the job on all ranks (infra.watchdog); 0 = off. More than any step takes.
    watchdog_seconds: float = Field(default=600.0, ge=0)


@dataclass(config=_strict)
class Checkpoint:
    """How often a resumable state is written, and how many are kept."""

    every_steps: int = Field(default=500, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)


@dataclass(config=_strict)
class Monitor:
    """Probes on held-out participants while training; the best checkpoint by the first task is kept."""

    every_epochs: float = Field(default=1.0, ge=0)  # 0 = off
    split: str = "monitor"
    # Columns of scans.parquet. Numbers are predicted by ridge regression; words, and numbers of two values, by logistic
    # regression, and so is what is written as `site:classes`.
    tasks: list[str] = Field(default_factory=lambda: ["age"], min_length=1)
    max_scans: int = Field(default=512, ge=20)
    view_scans: int = Field(default=128, ge=0)  # of them, seen in two views for alignment and uniformity; 0 = none
    # An alarm is given where the embeddings' standard deviation, of 1 for an even spread over the sphere, is below this.
    collapse_below: float = Field(default=0.05, ge=0, lt=1)
    batch: int = Field(default=8, ge=1)  # scans encoded at a time on a rank


@dataclass(config=_strict)
class Launch:
    """What ``yaware pretrain`` hands to the deepspeed launcher on this host."""

    ranks: int = Field(default=1, ge=1)


@dataclass(config=_strict)
class Recipe:
    """A whole pretraining run."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    augmentation: dict[str, Any] = field(default_factory=lambda: {"preset": "default"})
    batch: Batch = field(default_factory=Batch)
    encoder: Encoder = field(default_factory=Encoder)
    projector: Projector = field(default_factory=Projector)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    monitor: Monitor = field(default_factory=Monitor)
    # DeepSpeed's own configuration, passed through whole; what the recipe owns may not be set in it (pretrain.engine.engine).
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    launch: Launch = field(default_factory=Launch)

    @classmethod
    def load(cls, name: str | os.PathLike[str], *overrides: str) -> Recipe:
        """Return a shipped recipe by name, or a YAML file by path, with ``--section.key=value`` overrides.

        Raises UserError for an unknown name or key, or a value that is not allowed.
        """
        return load_recipe(os.fspath(name), list(overrides))

    def with_(self, **sections: Mapping[str, Any]) -> Recipe:
        """Return a copy with other values: ``recipe.with_(batch={"global": 16}, train={"steps": 100})``.

        A value replaces the old one as a whole; a key may have dots, as in
        ``deepspeed={"zero_optimization.stage": 2}``. Raises UserError as ``load`` does.
        """
        return change_settings(self, sections, "Recipe.with_")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all keys of the recipe as YAML, which ``load`` and ``yaware pretrain --config`` read; return the path."""
        with atomic_write(path, "w") as stream:
            stream.write(to_yaml(self))
        return Path(path)


def find_recipe(name: str) -> Path:
    """A shipped recipe by name, or any YAML file by path."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"recipe {name!r} is not known{nearest(name, shipped)}; shipped: {', '.join(shipped)}")
    return RECIPES / f"{name}.yaml"


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """A recipe by name or path with ``--section.key=value`` overrides."""
    return load_settings(Recipe, find_recipe(name), overrides)


def check_world_size(global_batch: int, world_size: int) -> int:
    """Scans a rank; UserError with the nearest world sizes where the batch cannot be cut evenly."""
    if global_batch % world_size:
        fits = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        below = max(w for w in fits if w < world_size)
        above = min((w for w in fits if w > world_size), default=below)
        raise UserError(
            f"batch.global={global_batch} is not divisible by world_size={world_size}; "
            f"use {below} or {above} ranks, or --batch.global={-(-global_batch // world_size) * world_size}"
        )
    return global_batch // world_size


def check_micro_batch(batch: Batch, world_size: int) -> int:
    """Micro-batches a rank embeds in a step, 1 without ``batch.micro``; UserError where they do not come out even."""
    share = check_world_size(batch.global_, world_size)
    micro = batch.micro or share
    if share % micro:
        below = max(n for n in range(1, micro) if share % n == 0)
        raise UserError(
            f"batch.micro={micro} does not divide the {share} scans of a rank (batch.global={batch.global_} over "
            f"{world_size} ranks); use {below}"
        )
    return share // micro
