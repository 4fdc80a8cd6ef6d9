"""The sections of a pretraining recipe. Every key of a recipe is a field of these classes, with its default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from infra.errors import Kind, UserError, check_arguments, nearest
from infra.files import atomic_write
from infra.settings import change_settings, load_settings, to_yaml

RECIPES = Path(__file__).parent / "recipes"
_strict = ConfigDict(extra="forbid", validate_default=True)


@dataclass(config=_strict)
class RunSection:
    """Name of the run, and where it writes."""

    name: str = "y-aware"
    output: str = "runs/y-aware"
    experiment: str = "yaware"
    seed: int = Field(default=0, ge=0)
    # auto: continue from the newest checkpoint of `output`; never: refuse if there is one; or a path of another run or its
    # checkpoint to start from
    resume: str = "auto"
    trust: bool = False  # whether to continue from a checkpoint that another user owns
    # MLflow store; null = MLFLOW_TRACKING_URI if set, otherwise sqlite:///mlruns/mlflow.db
    tracking_uri: str | None = None


@dataclass(config=_strict)
class BalanceSection:
    """Show groups of scans, or participants, equally often. data_pipeline.loading.balance describes the effect on positives."""

    # a column of scans.parquet: site, age, …; subject: pairs of scans of one participant follow each other
    by: str | None = None
    bins: float | None = Field(default=None, gt=0)  # width of a group in the column's unit: 5 (years) for age
    one_session_per_subject: bool = False


@dataclass(config=_strict)
class DataSection:
    """Which scans to train on, and how they are loaded."""

    shards: str = "shards"
    split: list[str] = field(default_factory=lambda: ["pretrain"])
    query: str | None = None  # pandas query over the columns of scans.parquet
    device: Literal["auto", "cpu", "gpu"] = "auto"  # device of DALI's augmentation
    workers: int = Field(default=0, ge=0)  # processes that read and decode; 0 = the training process
    threads: int = Field(default=1, ge=1)  # DALI's own threads
    prefetch: int = Field(default=2, ge=1)
    # index reads scans in any order, on any number of ranks; stream (webdataset) and dali read shards sequentially, and the
    # number of ranks is fixed for the run
    reader: Literal["index", "stream", "dali"] = "index"
    buffer: int = Field(default=256, ge=1)  # scans in the shuffle buffer of stream and dali
    balance: BalanceSection = field(default_factory=BalanceSection)
    max_bad_share: float = Field(default=0.001, ge=0, le=1)  # of unreadable scans; more (and more than 3) stop the run
    # For shards at s3:// or http(s)://: a folder that caches them, and its largest size in 10^9 bytes.
    cache: str | None = None
    cache_gb: float | None = Field(default=None, gt=0)
    # A folder of a local disk that keeps scans unpacked, and the largest size of what it keeps for a manifest in 10^9 bytes
    cache_unpacked: str | None = None
    cache_unpacked_gb: float | None = Field(default=None, gt=0)
    retries: int = Field(default=4, ge=0)  # retries of a failed read, after 0.5 s, 1 s, 2 s, ...
    timeout: float = Field(default=60.0, gt=0)  # seconds without an answer after which a read fails


@dataclass(config=_strict)
class BatchSection:
    """Scans per step over all ranks; each has two views."""

    global_: int = Field(default=64, ge=2)
    # Scans that a rank embeds at a time (GradCache, pretrain.engine.grad_cache), for batches beyond its memory; null = all
    micro: int | None = Field(default=None, ge=1)


@dataclass(config=_strict)
class EncoderSection:
    """The encoder: a key of pretrain.encoders.ENCODERS, and its options."""

    name: str = "densenet121"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_strict)
class ProjectorSection:
    """The projection head on the pooled features: linear, ReLU, linear, as in the paper."""

    hidden: int = Field(default=512, ge=1)
    out: int = Field(default=128, ge=1)


@dataclass(config=_strict)
class ProxySection:
    """The kernel of one proxy, and its options. A proxy is a column of scans.parquet, or several as ``age+tiv``."""

    kernel: str = "gaussian"  # a key of pretrain.kernels.KERNELS
    # In the proxy's unit (years for age; 0 = SimCLR), or a rule that uses the training scans' values: scott, silverman.
    bandwidth: float | list[float] | Literal["scott", "silverman"] | None = None
    covariance: list[list[float]] | Literal["scott", "silverman"] | None = None  # multivariate-gaussian
    otherwise: float | None = None  # kernel same: weight of a pair whose proxies differ
    same: float | None = None  # kernel different: weight of a pair whose proxies are equal
    # Weight of a pair of scans of which one lacks this proxy. null: 0; 1: such pairs are compared by the other proxies alone.
    missing: float | None = Field(default=None, ge=0, le=1)

    def options(self) -> dict[str, Any]:
        """Return the options that are set, as arguments of pretrain.losses.proxies.build_kernel."""
        return {name: value for name, value in vars(self).items() if value is not None and not name.startswith("_")}


@dataclass(config=_strict)
class ReconstructionSection:
    """A small decoder, in training only, predicts the voxels that cutout and masking hide (pretrain.losses.reconstruction)."""

    weight: float = Field(default=1.0, gt=0)  # of its mean squared error in the whole loss
    masked: float = Field(
        default=0.25, ge=0, lt=1
    )  # share of each view's 8 x 8 x 8 patches that is masked, besides cutout
    layer: str | None = None  # the block from whose map it works, as layer2; null: the last map


@dataclass(config=_strict)
class DenseSection:
    """The loss between the same places of the brain in different views and scans (pretrain.losses.dense)."""

    weight: float = Field(default=1.0, gt=0)  # of the dense loss in the whole loss
    grid: int = Field(default=3, ge=2, le=6)  # cells per side of a scan
    layer: str | None = None  # the block from whose map it works, as layer2; null: the last map


@dataclass(config=_strict)
class LossSection:
    """The contrastive loss over the embeddings of all ranks."""

    name: str = "y-aware"  # a key of pretrain.losses.LOSSES
    temperature: float = Field(default=0.1, gt=0)
    temperature_bounds: tuple[float, float] | None = None  # learn the temperature within these bounds: [0.01, 1.0]
    normalization: Literal["row", "column"] = "row"
    proxies: dict[str, ProxySection] = field(default_factory=lambda: {"age": ProxySection(bandwidth=5.0)})
    cross_view: bool = False  # compare only different views
    mask_subjects: bool = False  # ignore other sessions of the anchor's participant
    subject_positives: bool = False  # other scans of the anchor's participant are positives of weight 1
    # share of the loss that compares scans of one site only; the rest compares all scans
    site_negatives: float = Field(default=0.0, ge=0, le=1)
    tile: int | Literal["auto"] | None = None  # columns of the matrix of pairs at a time; null = all
    # The loss's own options, such as {scale: 2.0, ridge: 0.1} of decoupled-uniformity.
    options: dict[str, Any] = field(default_factory=dict)
    # Further terms, added to the loss of the embeddings; null = off
    reconstruction: ReconstructionSection | None = None
    dense: DenseSection | None = None


@dataclass(config=_strict)
class OptimizerSection:
    """Optimiser and learning-rate schedule. The paper uses Adam with L2 weight decay.

    DeepSpeed clips gradients: ``deepspeed.gradient_clipping`` is the largest L2 norm of the whole gradient.
    """

    # adamw: decoupled weight decay; sgd: momentum 0.9; lamb, lars: for large batches, they scale the step of each layer
    # (pretrain.engine.layerwise)
    name: Literal["adam", "adamw", "sgd", "lamb", "lars"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=5e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw, lamb
    # Learning rate of the projector: lr; of the encoder's last block: layer_decay * lr; of the block before:
    # layer_decay^2 * lr; and so on down to the stem. null: lr for all.
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "cosine", "step"] = "constant"
    step_epochs: float = Field(default=10.0, gt=0)  # decay: step multiplies lr by step_factor after this many epochs
    step_factor: float = Field(default=0.9, gt=0, le=1)


@dataclass(config=_strict)
class TrainSection:
    """Length and precision of the run. ``steps`` takes precedence over ``epochs``.

    ``steps: 0`` writes the untrained encoder, the random baseline.
    """

    epochs: float | None = Field(default=30.0, gt=0)
    steps: int | None = Field(default=None, ge=0)
    # bf16, fp16: 16-bit weights with float32 master weights; autocast, autocast-fp16: float32 weights, 16-bit products.
    # fp16 and autocast-fp16 scale the loss and skip steps whose gradient overflows (keys of the scaler: deepspeed.fp16).
    precision: Literal["fp32", "bf16", "fp16", "autocast", "autocast-fp16"] = "fp32"
    # Decay of a moving average of the encoder's weights, as 0.999, which the monitor and the evaluation use; null = off
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    # Steps with a loss or gradient that is not finite: this many are skipped in a run, the next stops it
    max_skipped_steps: int = Field(default=0, ge=0)
    # The watchdog (infra.watchdog) ends the job if a rank makes no progress for this long; longer than any step; 0 = off
    watchdog_seconds: float = Field(default=600.0, ge=0)


@dataclass(config=_strict)
class CheckpointSection:
    """How often checkpoints are written, and how many are kept."""

    every_steps: int = Field(default=500, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)


@dataclass(config=_strict)
class MonitorSection:
    """Probes on held-out participants during training; the checkpoint that is best by the first task is kept."""

    every_epochs: float = Field(default=1.0, ge=0)  # 0 = off
    split: str = "monitor"
    # Columns of scans.parquet. Ridge regression predicts numbers; logistic regression predicts text, numbers with two
    # values, and numbers written as `site:classes`.
    tasks: list[str] = Field(default_factory=lambda: ["age"], min_length=1)
    max_scans: int = Field(default=512, ge=20)
    view_scans: int = Field(default=128, ge=0)  # scans that are embedded in two views, for alignment and uniformity
    # Alarm if the embeddings' standard deviation (1: spread evenly over the sphere, 0: all equal) is below this
    collapse_below: float = Field(default=0.05, ge=0, lt=1)
    batch: int = Field(default=8, ge=1)  # scans that a rank encodes at a time
    # Pooling of the encoder's last map for the probes: grid2 to grid8, none, max, std; mean: the encoder's own features
    pooling: str = "mean"


@dataclass(config=_strict)
class ReadoutSection:
    """Predictions of the proxies from the features, fitted to the training scans at the end and kept with the encoder."""

    # true, false, or auto: fit if the run has at least 3.3 epochs, or 3.7 with a tenth as many scans to calibrate on (the fit
    # then costs at most 5 % of the training), and (features <= 4096 or scans <= 4096)
    fit: bool | Literal["auto"] = "auto"
    columns: list[str] = field(default_factory=list)  # of scans.parquet, beside those of loss.proxies: sex, ...
    # People who choose the penalty, and whose errors give the interval: a split; none: the training people, out of fold; auto:
    # monitor.split, if it has at least 50 people, otherwise none
    calibration: str = Field(default="auto", min_length=1)
    layer: str | None = None  # a block of the encoder, as of yaware embed --layer; null: the encoder's end
    pooling: list[str] = Field(default_factory=lambda: ["mean"], min_length=1)  # of that block
    batch: int = Field(default=8, ge=1)  # scans that a rank encodes at a time


@dataclass(config=_strict)
class LaunchSection:
    """How ``yaware pretrain`` starts the run on this host."""

    ranks: int = Field(default=1, ge=1)


@dataclass(config=_strict)
class Recipe:
    """A whole pretraining run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    augmentation: dict[str, Any] = field(default_factory=lambda: {"preset": "default"})
    batch: BatchSection = field(default_factory=BatchSection)
    encoder: EncoderSection = field(default_factory=EncoderSection)
    projector: ProjectorSection = field(default_factory=ProjectorSection)
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    readouts: ReadoutSection = field(default_factory=ReadoutSection)
    # DeepSpeed's configuration, passed through, except keys that the recipe sets (pretrain.engine.deepspeed_config)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 1}})
    launch: LaunchSection = field(default_factory=LaunchSection)

    @classmethod
    def load(cls, name: str | os.PathLike[str], *overrides: str) -> Recipe:
        """Return a shipped recipe by name, or a YAML file by path, with ``--section.key=value`` overrides.

        Raises UserError for an unknown name or key, or a value that is not allowed.
        """
        check_arguments(Kind((str, os.PathLike), "a recipe's name or a path"), name=name)
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
    """Return the path of a shipped recipe, given its name, or of any YAML file. Raises UserError for an unknown name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"recipe {name!r} is not known{nearest(name, shipped)}; shipped: {', '.join(shipped)}")
    return RECIPES / f"{name}.yaml"


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """Return a recipe by name or path, with ``--section.key=value`` overrides. Raises UserError if it is not valid."""
    return load_settings(Recipe, find_recipe(name), overrides)


def check_world_size(global_batch: int, world_size: int) -> int:
    """Return the scans per rank. Raises UserError, with the nearest numbers of ranks, if they do not divide the batch."""
    if global_batch % world_size:
        divisors = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
        below = max(w for w in divisors if w < world_size)
        above = min((w for w in divisors if w > world_size), default=below)
        raise UserError(
            f"batch.global={global_batch} is not divisible by world_size={world_size}; "
            f"use {below} or {above} ranks, or --batch.global={-(-global_batch // world_size) * world_size}"
        )
    return global_batch // world_size


def check_micro_batch(batch: BatchSection, world_size: int) -> int:
    """Return the micro-batches per rank and step (1 without ``batch.micro``). Raises UserError if they are not equal."""
    share = check_world_size(batch.global_, world_size)
    micro = batch.micro or share
    if share % micro:
        below = max(n for n in range(1, micro) if share % n == 0)
        raise UserError(
            f"batch.micro={micro} does not divide the {share} scans per rank (batch.global={batch.global_} over "
            f"{world_size} ranks); use {below}"
        )
    return share // micro
