"""Gradient caching: large contrastive batches in the memory of a micro-batch (Gao et al. 2021, arXiv:2101.06983).

A step has three parts:

1. Embed every micro-batch without a graph. Keep the embeddings and the state of the random generators before each.
2. Compute the loss over the embeddings of all ranks, and its gradient with respect to this rank's embeddings. This takes
   one collective in each direction.
3. Embed every micro-batch again, with a graph and from the saved random state, and back-propagate that gradient.

By the chain rule the sum of these gradients equals the gradient of one pass over the whole batch, under every ZeRO stage.
Dropout and drop-path draw the same masks in both passes. Batch normalisation uses the statistics of each micro-batch, the
same in both passes, and updates its running statistics in the second pass only; choose group normalisation if the
statistics of the whole batch matter. The cost is one more forward pass.

B = scans of this rank, P = embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# (embeddings (2, B, P), learned temperature or None, further outputs of the model (2, B, ...)) -> this rank's loss: a scalar,
# or its terms (T,), whose sum is differentiated
EmbeddingLoss = Callable[..., Tensor]


class ForwardPass(NamedTuple):
    """The result of a forward pass: ``loss`` (scalar, or terms), the learned ``temperature`` or None, and ``backward()``."""

    loss: Tensor
    temperature: Tensor | None
    backward: Callable[[], None]


def full_pass(
    engine: Any, views: Tensor, loss: EmbeddingLoss, details: Mapping[str, Tensor] = MappingProxyType({})
) -> ForwardPass:
    """Embed this rank's ``views`` (2, B, 1, D, H, W) in one pass and compute their loss. Collective.

    ``details``, tensors (2, B, ...), are keyword arguments of the model.
    """
    embeddings, temperature, *further = engine(views, **details)
    value = loss(at_least_float32(embeddings), temperature, *map(at_least_float32, further))
    return ForwardPass(value, temperature, lambda: engine.backward(_total(value)))


def cached_pass(
    engine: Any, views: Tensor, loss: EmbeddingLoss, micro: int, details: Mapping[str, Tensor] = MappingProxyType({})
) -> ForwardPass:
    """Compute the same loss and gradients as `full_pass` from micro-batches of ``micro`` scans.

    Both the forward pass and ``backward()`` are collective; every rank must have the same number of micro-batches.

    Args:
        engine: DeepSpeed's engine around the model, which returns embeddings (2, b, P), the learned temperature, and perhaps
            further outputs (2, b, ...).
        views: this rank's views (2, B, 1, D, H, W).
        loss: a function of all embeddings of this rank (2, B, P), the temperature and the further outputs (2, B, ...), called
            once.
        micro: scans per micro-batch; the last one is smaller if ``micro`` does not divide B.
        details: tensors (2, B, ...), keyword arguments of the model.
    """
    micro_batches, random_states = _split(views, details, micro), []
    parts, temperature = [], None
    with torch.no_grad(), frozen_statistics(engine.module):
        for micro_views, micro_details in micro_batches:
            random_states.append(_random_state(micro_views))
            embeddings, temperature, *further = engine(micro_views, **micro_details)
            parts.append([at_least_float32(output) for output in (embeddings, *further)])
    outputs = [torch.cat(pieces, dim=1).requires_grad_() for pieces in zip(*parts, strict=True)]
    leaves = list(outputs)
    if temperature is not None:
        leaves.append(temperature.detach().clone().requires_grad_())
    value = loss(outputs[0], leaves[-1] if temperature is not None else None, *outputs[1:])

    def backward() -> None:
        """Embed the micro-batches again and back-propagate the gradient of the model's outputs."""
        # The gathered loss gives these embeddings the gradient of the losses of all ranks; no further factor is needed.
        gradients = torch.autograd.grad(_total(value), leaves)
        split = [torch.split(gradient, micro, dim=1) for gradient in gradients[: len(outputs)]]
        for index, (micro_views, micro_details) in enumerate(micro_batches):
            _set_random_state(micro_views, random_states[index])
            engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
            embeddings, learned, *further = engine(micro_views, **micro_details)
            surrogate = (at_least_float32(embeddings) * split[0][index]).sum()
            for output, gradient in zip(further, split[1:], strict=True):
                surrogate = surrogate + (at_least_float32(output) * gradient[index]).sum()
            if learned is not None:  # in equal shares: ZeRO expects every parameter in every backward pass
                surrogate = surrogate + learned * gradients[-1] / len(micro_batches)
            engine.backward(surrogate, scale_wrt_gas=False)

    return ForwardPass(value, temperature, backward)


def _split(views: Tensor, details: Mapping[str, Tensor], micro: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the micro-batches of ``micro`` scans, each with its details."""
    micro_details = {name: torch.split(tensor, micro, dim=1) for name, tensor in details.items()}
    return [
        (micro_views, {name: pieces[index] for name, pieces in micro_details.items()})
        for index, micro_views in enumerate(torch.split(views, micro, dim=1))
    ]


def _total(loss: Tensor) -> Tensor:
    return loss if loss.ndim == 0 else loss.sum()


def at_least_float32(embeddings: Tensor) -> Tensor:
    """Convert 16-bit embeddings to float32, so that the loss and its gradient are not rounded to 16 bits."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch normalisation use batch statistics, as in training, without updating its running statistics."""
    tracking = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def _random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


def _set_random_state(like: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], like.device)
