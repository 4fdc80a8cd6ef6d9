"""A training step of DenseNet121, as a recipe trains it and as a plain loop does, with marks at the end of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import BatchSection, EncoderSection, Recipe
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce

Mark = Callable[[str], None]


def ignored(part: str) -> None:
    """Do nothing at the end of a part of a step."""


def benchmark_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss that both steps use: y-Aware InfoNCE with the paper's settings."""
    kernel = KERNELS["gaussian"](bandwidth=5.0)
    return lambda views_2BP, ages_B1: y_aware_infonce(views_2BP, ages_B1, kernel=kernel, temperature=0.1)


def bare_step(
    device: torch.device, mark: Mark = ignored, channels_last: bool = False
) -> Callable[[dict[str, Tensor]], float]:
    """Return a step of MONAI's DenseNet121 with the same projector and torch's Adam, without an engine.

    ``mark`` is called at the end of each part of a step with its name.
    """
    from monai.networks.nets import DenseNet121

    encoder = DenseNet121(spatial_dims=3, in_channels=1, out_channels=512)
    network = nn.Sequential(encoder, nn.ReLU(), nn.Linear(512, 128)).to(device).train()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=5e-5)
    loss = benchmark_loss()

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        volumes = batch["views"].flatten(0, 1).contiguous(memory_format=layout)
        embeddings = network(volumes).view(2, -1, 128)
        value = loss(embeddings, batch["proxies"])
        mark("forward")
        value.backward()
        mark("backward")
        optimizer.step()
        mark("update")
        return value.item()

    return step


def trained_engine(recipe: Recipe) -> Any:
    """Join the ranks and return the engine that trains a recipe, at its first step."""
    from pretrain.engine import engine
    from pretrain.model import build_model

    device = engine.start_ranks()
    trained = engine.build_engine(recipe, build_model(recipe).to(device), lambda step: 1.0)
    trained.train()
    return trained


def mark_parts(mark: Mark) -> None:
    """Let every later `train_step` of this process call ``mark`` at the end of each part, as `bare_step` does."""
    from pretrain.run import step as steps

    full_pass, engine_update = steps.full_pass, steps.update

    def passes(*arguments: Any) -> Any:
        """Run the forward pass and return it, with marks."""
        found = full_pass(*arguments)
        mark("forward")

        def backward() -> None:
            found.backward()
            mark("backward")

        return found._replace(backward=backward)

    def update(engine: Any) -> dict[str, float]:
        """Update the weights, with a mark."""
        metrics = engine_update(engine)
        mark("update")
        return metrics

    steps.full_pass, steps.update = passes, update


class PartTimes:
    """CPU seconds of this process in each part of its steps; a mark for `bare_step` and `mark_parts`."""

    def __init__(self) -> None:
        self.clear()

    def __call__(self, part: str) -> None:
        """Add the CPU seconds since the last mark to a part."""
        now = time.process_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def clear(self) -> None:
        """Forget all parts; the next one begins now."""
        self.seconds: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """Let the next part begin now."""
        self._last = time.process_time()

    def of_a_step(self, steps: int) -> dict[str, float]:
        """Return the seconds of each part of one of so many steps, under the names of parts of a row."""
        return {f"part_{part}": seconds / steps for part, seconds in self.seconds.items()}


def engine_step(
    scans: int, mark: Mark = ignored, options: dict[str, Any] | None = None
) -> tuple[torch.device, Callable[[dict[str, Tensor]], float]]:
    """Return a step as a recipe trains it: model, DeepSpeed engine, and train_step with its checks and metrics.

    ``mark``: see `bare_step`. ``options``: of the encoder.
    """
    from pretrain.run import step as steps

    trained = trained_engine(Recipe(batch=BatchSection(global_=scans), encoder=EncoderSection(options=options or {})))
    loss = benchmark_loss()
    if mark is not ignored:
        mark_parts(mark)

    def step(batch: dict[str, Tensor]) -> float:
        metrics, _ = steps.train_step(trained, lambda z, _, b: loss(z, b["proxies"]), batch, 0, torch.float32)
        return metrics["loss"]

    return trained.device, step
