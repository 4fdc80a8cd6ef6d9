"""Whole steps of the training engine on real ranks, with a network so small that a hundred engines take seconds.

The network has linear layers only: their 16-bit products are correct on any CPU, unlike those of conv3d (see tests/gpu).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.view_details import ViewDetails
from pretrain.config import Recipe, load_recipe
from pretrain.encoders.centres import Axes, MapAxis
from pretrain.engine import engine
from pretrain.engine.ema import Average
from pretrain.engine.optimizers import build_optimizer, parameter_groups
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.gather import AllGather
from pretrain.losses.reconstruction import Decoder
from pretrain.losses.temperature import Temperature
from pretrain.model import VIEW_DETAILS, CellProjector, ContrastiveModel, Projector
from pretrain.run import checkpoint
from pretrain.run.loop import DTYPES
from pretrain.run.objective import Objective
from pretrain.run.step import lr_factor, train_step

BATCH, SIDE, TOTAL = 12, 4, 40
COMMON = (f"--batch.global={BATCH}", "--optimizer.warmup_steps=2", "--optimizer.lr=5e-3")


@dataclass(frozen=True)
class Run:
    """Steps of a run up to ``last``, from checkpoint ``load`` or from the start; saves to ``save`` after ``save_at`` steps."""

    options: tuple[str, ...] = ()
    last: int = 6
    load: Path | None = None
    save: Path | None = None
    save_at: int = 3
    overflow_at: tuple[int, ...] = ()  # steps in which the gradient of the last rank overflows


class TinyEncoder(nn.Module):
    """An encoder with the parameter names of the real ones; a buffer counts the forward passes."""

    feature_size = 10
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(
                stem=nn.Sequential(nn.Flatten(), nn.Linear(SIDE**3, 14), nn.LayerNorm(14)),
                layer1=nn.Sequential(nn.Linear(14, 11), nn.GELU()),
                layer2=nn.Sequential(nn.Linear(11, 10)),
            )
        )
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, volumes: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        features: Tensor = self.trunk(volumes)
        return features

    def maps_and_features(self, volumes: Tensor, layers: Sequence[str | None]) -> tuple[list[Tensor], Tensor]:
        """Maps of 5 channels and two positions at the end, and of 11 channels and one position after layer1."""
        middle = self.trunk.layer1(self.trunk.stem(volumes))
        features = self.trunk.layer2(middle)
        if self.training:
            self.passes += 1
        maps = {None: features.view(-1, 5, 2, 1, 1), "layer1": middle.view(-1, 11, 1, 1, 1)}
        return [maps[layer] for layer in layers], features

    def map_axes(self, sides: Sequence[int], layer: str | None) -> Axes:
        first = MapAxis(0.7, 2.0) if layer is None else MapAxis(2.0, 4.0)
        return first, MapAxis(2.0, 4.0), MapAxis(2.0, 4.0)


def build(recipe: Recipe) -> ContrastiveModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder, projector = TinyEncoder(), Projector(10, 9, 7)
        decoder = cells = None
        channels = {None: 5, "layer1": 11}
        if recipe.loss.reconstruction is not None:
            layer = recipe.loss.reconstruction.layer
            decoder = Decoder(channels[layer], layer)
        if recipe.loss.dense is not None:
            layer = recipe.loss.dense.layer
            cells = CellProjector(channels[layer], 8, 6, recipe.loss.dense.grid, layer)
    learned = recipe.loss.temperature_bounds
    return ContrastiveModel(
        encoder, projector, None if learned is None else Temperature(0.1, *learned), decoder, cells
    )  # fmt: skip


def objective_of(recipe: Recipe) -> Objective:
    """The objective of a recipe with age as its proxy, without a manifest."""
    further = {"reconstruction": recipe.loss.reconstruction, "dense": recipe.loss.dense}
    weights = {name: section.weight for name, section in further.items() if section is not None}
    return Objective(
        "y-aware", KERNELS["gaussian"](bandwidth=5.0), {"temperature": 0.1}, None, False,
        weights={"contrastive": 1.0, **weights},
    )  # fmt: skip


def details_of(step: int) -> dict[str, Tensor]:
    """Return the details of the views of the global batch of a step: flips, crops and boxes, and masked patches."""
    moved = {"preset": "none", "flip": {"p": 0.5}, "crop": {"p": 0.5}, "cutout": {"p": 0.5, "side": 0.5}}
    details = ViewDetails(load_augmentation(moved), (SIDE, SIDE, SIDE), seed=0, masked=0.2)
    arrays = details(np.arange(BATCH), np.full(BATCH, step % 2))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batch_of(step: int, rank: int, world: int) -> dict[str, Tensor]:
    """Return a rank's part of the global batch of a step. Two batches alternate, so that the loss falls."""
    source = torch.Generator().manual_seed(50 + step % 2)
    volumes = torch.randn(BATCH, 1, SIDE, SIDE, SIDE, generator=source)
    views = torch.stack([volumes + 0.3 * torch.randn(volumes.shape, generator=source) for _ in range(2)])
    ages = 20.0 + 40.0 * torch.rand(BATCH, 1, generator=source)
    share = BATCH // world
    details = {name: tensor[:, rank * share :][:, :share] for name, tensor in details_of(step).items()}
    return {"views": views[:, rank * share :][:, :share], "proxies": ages[rank * share :][:share], **details}


def steps_on_ranks(group: Any, rank: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the result of each run: metrics by step, the encoder and its average afterwards, and the engine's bucket."""
    return [_steps(rank, run) for run in runs]


def plain_steps(options: Sequence[str], last: int) -> list[dict[str, float]]:
    """Take the same steps in one process in float32 with torch only, without engine, ranks or micro-batches."""
    recipe = load_recipe("demo-cpu", [*COMMON, *options])
    model = build(recipe)
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(model, recipe.optimizer))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe.optimizer, TOTAL, 10))
    metrics = []
    for step in range(last):
        batch = batch_of(step, 0, 1)
        views, temperature, *further = model(batch["views"], *(batch[name] for name in VIEW_DETAILS))
        value = y_aware_infonce(
            views, batch["proxies"], kernel=KERNELS["gaussian"](bandwidth=5.0),
            temperature=0.1 if temperature is None else temperature,
        )  # fmt: skip
        if further:
            objective = objective_of(recipe)
            terms = objective.loss(views, temperature, batch, *further)
            assert terms[0] == value
            value = sum(weight * term for weight, term in zip(objective.weights.values(), terms, strict=True))
        optimizer.zero_grad()
        value.backward()
        largest = recipe.deepspeed.get("gradient_clipping") or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        metrics.append({"step": step, "loss": value.item(), "grad_norm": float(norm), "lr": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
    return metrics


def _steps(rank: int, run: Run) -> dict[str, Any]:
    allow_fp16()
    recipe = load_recipe("demo-cpu", [*COMMON, *run.options])
    world, metrics = torch.distributed.get_world_size(), []
    trained = engine.build_engine(recipe, build(recipe), lr_factor(recipe.optimizer, TOTAL, 10))
    average = Average(trained, recipe.train.ema_decay) if recipe.train.ema_decay else None
    state = checkpoint.load_checkpoint(run.load, trained) if run.load else None
    if average and state:
        average.load(Path(state["folder"]))
    kernel, gather = KERNELS["gaussian"](bandwidth=5.0), AllGather() if world > 1 else None
    objective = objective_of(recipe) if recipe.loss.reconstruction or recipe.loss.dense else None
    trained.train()
    for step in range(state["step"] if state else 0, run.last):

        def loss(views: Tensor, temperature: Tensor | None, batch: dict[str, Tensor], current: int = step) -> Tensor:
            value = y_aware_infonce(
                views, batch["proxies"], kernel=kernel, gather=gather,
                temperature=0.1 if temperature is None else temperature,
            )  # fmt: skip
            return value if current not in run.overflow_at else _Overflow.apply(value, rank == world - 1)

        try:
            step_metrics, _ = train_step(
                trained, objective.loss if objective else loss, batch_of(step, rank, world), step,
                DTYPES[recipe.train.precision], recipe.batch.micro, weights=objective.weights if objective else {},
            )  # fmt: skip
        except engine.NotFinite as error:
            return {"metrics": metrics, "stopped": str(error)}
        metrics.append({"step": step, **step_metrics})
        if average:
            average.update(step + 1)
        if run.save and step + 1 == run.save_at:
            _save(run.save, step + 1, trained, average)
    result = {
        "metrics": metrics,
        "encoder": engine.encoder_state(trained),
        "average": average.state() if average else None,
        "bucket": trained.zero_reduce_bucket_size(),
        "rates": [group["lr"] for group in trained.basic_optimizer.param_groups],
    }
    trained.destroy()
    return result


def _save(folder: Path, step: int, trained: Any, average: Average | None) -> None:
    from safetensors.torch import save_file

    weights = average.state() if average else engine.encoder_state(trained)

    def write_rest(temporary: Path) -> None:
        (temporary / "encoder").mkdir()
        save_file(weights, temporary / "encoder" / "model.safetensors")

    checkpoint.save_checkpoint(folder, step, trained, {}, write_rest)


class _Overflow(torch.autograd.Function):
    """Returns the value unchanged; the gradient is infinite if ``here``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, here: bool) -> Tensor:
        ctx.here = here
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * (float("inf") if ctx.here else 1.0), None


def allow_fp16() -> None:
    """Allow fp16 on the CPU, which can compute linear layers in it, and reset the autocast of an earlier engine."""
    engine.import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast

    engine._has_fp16 = lambda: True  # type: ignore[assignment]
    get_accelerator().is_fp16_supported = lambda: True
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
