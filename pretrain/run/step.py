"""One optimisation step: embed both views, compare them across all ranks, step only on finite figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.storage.manifest import Manifest
from infra import distributed, watchdog
from infra.errors import UserError
from pretrain.config import Loss, Optimizer, Recipe
from pretrain.engine.engine import NotFinite, update
from pretrain.engine.grad_cache import cached_pass, full_pass
from pretrain.kernels import Kernel
from pretrain.losses.diagnostics import effective_positives
from pretrain.losses.gather import AllGather
from pretrain.losses.options import SHARED_OPTIONS, check_own_options, find_loss, takes
from pretrain.losses.proxies import build_kernel, proxy_columns
from pretrain.losses.supervised import SUPERVISED, target_scale
from pretrain.losses.temperature import Temperature

Rows = np.ndarray[Any, np.dtype[np.int64]]
ContrastiveLoss = Callable[[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]], torch.Tensor]


def recipe_kernel(recipe: Recipe, scans: Manifest, rows: Rows) -> Kernel:
    """The kernel of the recipe's proxies; rules such as ``scott`` look at the values of the scans to be trained on."""
    proxies = {name: proxy.options() for name, proxy in recipe.loss.proxies.items()}
    columns = proxy_columns(proxies)
    values = scans.proxies(columns, rows)
    return build_kernel(proxies, {name: torch.from_numpy(values[:, place]) for place, name in enumerate(columns)})


def loss_options(section: Loss) -> dict[str, Any]:
    """What the recipe's loss takes of ``loss:``; UserError for another loss's name or an option it does not have."""
    loss, default = find_loss(section.name), Loss()
    for name in SHARED_OPTIONS:
        if not takes(loss, name) and getattr(section, name) != getattr(default, name):
            raise UserError(f"loss.{name} is no option of the loss {section.name}; leave it out")
    if section.temperature_bounds is not None:
        if not takes(loss, "temperature"):
            raise UserError(f"loss.temperature_bounds is no option of the loss {section.name}; leave it out")
        Temperature(section.temperature, *section.temperature_bounds)
    shared = {name: getattr(section, name) for name in SHARED_OPTIONS if takes(loss, name)}
    return {**shared, **check_own_options(section.name, section.options)}


def build_loss(recipe: Recipe, scans: Manifest, rows: Rows) -> ContrastiveLoss:
    """The recipe's loss over all ranks: (views (2, B, P), learned temperature, batch of the loader) -> this rank's scalar.

    The mean of the ranks' scalars is the loss of the whole batch, and so is the mean of their gradients.
    """
    kernel, options = recipe_kernel(recipe, scans, rows), loss_options(recipe.loss)
    gather = AllGather() if distributed.world_size() > 1 else None
    people_of = subjects_of(recipe, scans)
    loss = find_loss(recipe.loss.name)
    if recipe.loss.name in SUPERVISED:
        options |= target_scale(torch.from_numpy(scans.proxies(proxy_columns(recipe.loss.proxies), rows)))

    def compare(views: torch.Tensor, temperature: torch.Tensor | None, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        learned = {} if temperature is None else {"temperature": temperature}
        people = people_of(batch)
        return loss(views, batch["proxies"], kernel=kernel, gather=gather, subjects=people, **{**options, **learned})

    return compare


def build_watch(recipe: Recipe, scans: Manifest, rows: Rows) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Effective positives (B,) of this rank's scans in a batch, with the loss's own kernel and exclusions. Collective."""
    kernel, people_of = recipe_kernel(recipe, scans, rows), subjects_of(recipe, scans)
    gather = AllGather() if distributed.world_size() > 1 else None

    def watch(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return effective_positives(
            batch["proxies"], kernel, gather=gather, subjects=people_of(batch), cross_view=recipe.loss.cross_view
        )

    return watch


def subjects_of(recipe: Recipe, scans: Manifest) -> Callable[[dict[str, torch.Tensor]], torch.Tensor | None]:
    """Participant numbers (B,) of a batch where ``loss.mask_subjects`` wants them, else None."""
    if not recipe.loss.mask_subjects:
        return lambda batch: None
    subjects = torch.from_numpy(scans.subjects())
    return lambda batch: subjects[batch["scan"].cpu()].to(batch["proxies"].device)


def train_step(
    engine: Any, loss: ContrastiveLoss, batch: dict[str, torch.Tensor], step: int, dtype: torch.dtype,
    micro: int | None = None, votes: Callable[[], Sequence[float]] = tuple,
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """Forward, backward and update on one batch of the loader; the figures to log, and the sums of the votes. Collective.

    ``micro`` scans are embedded at a time where it is given. What ``votes`` gives, asked for after the forward pass, is
    added up over the ranks in the collective that the loss needs anyway. Raises NotFinite on every rank before the weights
    change when any rank's loss or gradient is not finite; a gradient that overflowed in fp16 is the scaler's concern
    (pretrain.engine.engine.update).
    """
    views_2B1DHW = batch["views"].to(dtype)
    watchdog.phase(f"the forward pass of step {step}")

    def batch_loss(embeddings_2BP: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        watchdog.phase(f"the exchange of embeddings of step {step}")
        return loss(embeddings_2BP, temperature, batch)

    if micro is None or micro >= views_2B1DHW.shape[1]:
        value, temperature, backward = full_pass(engine, views_2B1DHW, batch_loss)
    else:
        value, temperature, backward = cached_pass(engine, views_2B1DHW, batch_loss, micro)
    # One small collective gives the whole batch's loss and tells every rank of any rank's NaN.
    # float() waits for the device: votes are read last, so that a signal during the forward pass counts in this step.
    total, *sums = distributed.reduce_scalars([float(value.detach()), *votes()])
    mean = total / distributed.world_size()
    if not math.isfinite(mean):
        raise NotFinite(f"step {step}: the loss is {mean}")
    watchdog.phase(f"the gradient reduction of step {step}")
    backward()
    lr = float(engine.get_lr()[0])
    try:
        updated = update(engine)
    except NotFinite as error:
        raise NotFinite(f"step {step}: {error}") from None
    learned = {} if temperature is None else {"temperature": float(temperature.detach())}
    return {"loss": mean, "lr": lr, **updated, **learned}, sums


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
