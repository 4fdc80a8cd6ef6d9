"""One optimisation step: embed both views, compute the loss over all ranks, and step only if it is finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from infra import distributed, watchdog
from pretrain.config import OptimizerSection
from pretrain.engine.engine import NotFinite, update
from pretrain.engine.grad_cache import cached_pass, full_pass
from pretrain.model import VIEW_DETAILS

# (embeddings (2, B, P), learned temperature or None, batch of the loader, further outputs of the model) -> this rank's scalar,
# or, if the model has further outputs, the terms of the loss (T,)
BatchLoss = Callable[..., torch.Tensor]


def train_step(
    engine: Any, loss: BatchLoss, batch: dict[str, torch.Tensor], step: int, dtype: torch.dtype,
    micro: int | None = None, votes: Callable[[], Sequence[float]] = tuple,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """Run forward pass, backward pass and update on one batch. Collective.

    Args:
        engine: the DeepSpeed engine.
        loss: the loss of this rank's embeddings.
        batch: a batch of the loader; ``views`` (2, B, 1, D, H, W) on the training device.
        step: number of the step, for messages.
        dtype: type of the network's input.
        micro: scans that are embedded at a time (GradCache); None embeds all at once.
        votes: called after the forward pass; its numbers are summed over the ranks in the collective that the loss needs.
        weights: names and weights of the terms of the loss, if it has several; they are logged apart, as ``loss/NAME``.

    Returns:
        the metrics to log (loss, lr, grad_norm, ...) and the sums of the votes.

    Raises NotFinite on every rank, before any weight changes, if the loss or the gradient of any rank is not finite. A
    gradient that overflows in fp16 is left to the loss scaler (pretrain.engine.engine.update).
    """
    views_2B1DHW = batch["views"].to(dtype)
    watchdog.phase(f"the forward pass of step {step}")

    def loss_of_batch(
        embeddings_2BP: torch.Tensor, temperature: torch.Tensor | None, *further: torch.Tensor
    ) -> torch.Tensor:
        watchdog.phase(f"the exchange of embeddings of step {step}")
        value = loss(embeddings_2BP, temperature, batch, *further)
        return value * value.new_tensor(list(weights.values())) if weights else value

    details = {name: batch[name] for name in VIEW_DETAILS if name in batch}
    if micro is None or micro >= views_2B1DHW.shape[1]:
        value, temperature, backward = full_pass(engine, views_2B1DHW, loss_of_batch, details)
    else:
        value, temperature, backward = cached_pass(engine, views_2B1DHW, loss_of_batch, micro, details)
    # One small collective returns the loss of the whole batch and tells every rank of any rank's NaN.
    # float() waits for the device: votes are read afterwards, so that a signal during the forward pass counts in this step.
    own_terms = [float(term) for term in value.detach().reshape(-1).tolist()]
    reduced = distributed.reduce_scalars([*own_terms, *votes()])
    terms, sums = [total / distributed.world_size() for total in reduced[: len(own_terms)]], reduced[len(own_terms) :]
    mean = sum(terms[1:], start=terms[0])
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
    apart = {f"loss/{name}": term / weights[name] for name, term in zip(weights, terms, strict=True)} if weights else {}
    return {"loss": mean, **apart, "lr": lr, **updated, **learned}, sums


def lr_factor(settings: OptimizerSection, total_steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """Return the factor on ``optimizer.lr`` as a function of the step.

    Linear warm-up, then constant, cosine to 0, or a factor every ``step_epochs`` epochs.
    """

    def decay(step: int) -> float:
        if settings.decay == "cosine":
            decaying = max(1, total_steps - settings.warmup_steps)
            progress = min(1.0, max(0, step - settings.warmup_steps) / decaying)
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if settings.decay == "step":
            return settings.step_factor ** math.floor(step / (steps_per_epoch * settings.step_epochs))
        return 1.0

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return warmup * decay(step)

    return factor
