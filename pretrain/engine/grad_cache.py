"""Large contrastive batches in the memory of a micro-batch (Gao et al. 2021, arXiv:2101.06983), exact and under ZeRO.

1. embed every micro-batch without a graph, keeping only embeddings and the random state before each
2. the loss over all embeddings of all ranks, and its gradient on this rank's embeddings: one collective each way
3. embed every micro-batch again, with its random state and a graph, and pull that gradient through it

The gradients add up to those of one pass over the whole batch: the chain rule, term by term. Dropout and drop-path draw
the same masks in both passes. Batch normalisation takes the statistics of each micro-batch, in both passes the same,
and moves its running statistics in the second alone; choose group normalisation where the statistics of a whole batch
matter. Costs one more forward pass.

B = scans of this rank, P = embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# (views (2, B, P), temperature or None) -> this rank's scalar
Compare = Callable[[Tensor, Tensor | None], Tensor]


def whole(engine: Any, views: Tensor, compare: Compare) -> tuple[Tensor, Callable[[], None]]:
    """The loss of one pass over the batch, and what runs its backward pass. ``views`` (2, B, 1, D, H, W)."""
    embeddings, temperature = engine(views)
    value = compare(wide(embeddings), temperature)
    return value, lambda: engine.backward(value)


def cached(engine: Any, views: Tensor, compare: Compare, micro: int) -> tuple[Tensor, Callable[[], None]]:
    """The same from micro-batches of ``micro`` scans; both are collective, every rank with as many micro-batches."""
    parts, states = torch.split(views, micro, dim=1), []
    embedded, temperature = [], None
    with torch.no_grad(), still_statistics(engine.module):
        for part in parts:
            states.append(_random_state(part))
            embeddings, temperature = engine(part)
            embedded.append(wide(embeddings))
    leaves = [torch.cat(embedded, dim=1).requires_grad_()]
    if temperature is not None:
        leaves.append(temperature.detach().clone().requires_grad_())
    value = compare(leaves[0], leaves[1] if temperature is not None else None)

    def backward() -> None:
        # The loss leaves on its own embeddings what all ranks' losses say about them; no further factor belongs here.
        pulls, *rest = torch.autograd.grad(value, leaves)
        for number, (part, pull) in enumerate(zip(parts, torch.split(pulls, micro, dim=1), strict=True)):
            _set_random_state(part, states[number])
            engine.set_gradient_accumulation_boundary(number + 1 == len(parts))
            embeddings, again = engine(part)
            pulled = (wide(embeddings) * pull).sum()
            if rest:  # a part of it each time: ZeRO expects every parameter in every backward pass
                pulled = pulled + again * rest[0] / len(parts)
            engine.backward(pulled, scale_wrt_gas=False)

    return value, backward


def wide(embeddings: Tensor) -> Tensor:
    """At least float32: the loss and its gradient are not to be rounded to the encoder's type."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Batch normalisation that normalises as in training but leaves its running statistics alone."""
    moving = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True


def _random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


def _set_random_state(like: Tensor, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], like.device)
