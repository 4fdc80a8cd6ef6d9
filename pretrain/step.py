"""One optimisation step: embed both views, compare them across all ranks, step only on finite figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from infra import distributed
from pretrain.config import Optimizer, Recipe
from pretrain.engine import update

ContrastiveLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NotFinite(RuntimeError):
    """The loss or its gradient is NaN or infinite; the run stops and its last checkpoint stays as it is."""


def build_loss(recipe: Recipe) -> ContrastiveLoss:
    """The recipe's loss over all ranks: (views (2, B, P), proxies (B, K)) -> this rank's scalar.

    The mean of the ranks' scalars is the loss of the whole batch, and so is the mean of their gradients.
    """
    from pretrain.gather import AllGather
    from pretrain.kernels import KERNELS
    from pretrain.losses import LOSSES

    ((_, proxy),) = recipe.loss.proxies.items()
    kernel = KERNELS[proxy.kernel](bandwidth=proxy.bandwidth)
    gather = AllGather() if distributed.world_size() > 1 else None
    settings = {"temperature": recipe.loss.temperature, "normalization": recipe.loss.normalization}
    loss = LOSSES[recipe.loss.name]
    return lambda views, proxies: loss(views, proxies, kernel=kernel, gather=gather, **settings)


def train_step(
    engine: Any, loss: ContrastiveLoss, batch: dict[str, torch.Tensor], step: int, dtype: torch.dtype
) -> dict[str, float]:
    """Forward, backward and update on one batch of the loader; the figures to log. Collective.

    Raises NotFinite on every rank before the weights change when any rank's loss is not finite.
    """
    views_2B1DHW = batch["views"].to(dtype)
    embeddings_2BP = engine(views_2B1DHW)
    value = loss(embeddings_2BP.float(), batch["proxies"])
    # One small collective gives the whole batch's loss and tells every rank of any rank's NaN.
    mean = distributed.reduce_scalars([float(value.detach())])[0] / distributed.world_size()
    if not math.isfinite(mean):
        raise NotFinite(f"step {step}: the loss is {mean}; lower optimizer.lr or look at the scans of this batch")
    engine.backward(value)
    lr = float(engine.get_lr()[0])
    norm = update(engine)
    if not math.isfinite(norm):
        raise NotFinite(f"step {step}: the gradient norm is {norm}; lower optimizer.lr or clip (gradient_clipping)")
    return {"loss": mean, "lr": lr, "grad_norm": norm}


def lr_factor(settings: Optimizer, total_steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """The factor on ``optimizer.lr`` at a step: linear warm-up, then constant, cosine to 0, or steps of some epochs."""

    def decay(step: int) -> float:
        if settings.decay == "cosine":
            after = max(1, total_steps - settings.warmup_steps)
            done = min(1.0, max(0, step - settings.warmup_steps) / after)
            return 0.5 * (1.0 + math.cos(math.pi * done))
        if settings.decay == "step":
            return settings.step_factor ** math.floor(step / (steps_per_epoch * settings.step_epochs))
        return 1.0

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return warm * decay(step)

    return factor
