"""LAMB and LARS: optimisers for large batches that scale each layer's step to the norm of its weights.

Under ZeRO the optimiser of a rank holds parts of layers, end to end in flat tensors. After ``set_shards`` it still uses the
norms of whole layers: it sums the squares over the ranks, in one small collective per group of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.partitions import Segment, Shard

EPSILON = 1e-6


class LayerWise(torch.optim.Optimizer):
    """The base of LAMB and LARS. A group with ``scaled: False`` (biases and norms) takes the plain step, as in both papers."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"scaled": True, **defaults})
        self._segments: dict[torch.Tensor, list[Segment]] = {}
        self._layer_numbers: dict[str, int] = {}

    def set_shards(self, shards: Sequence[Shard], names: Sequence[str]) -> None:
        """Set the segments of layers in each tensor of this rank; other ranks hold the rest. ``names`` lists every layer."""
        self._segments = dict(shards)
        self._layer_numbers = {name: number for number, name in enumerate(names)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step for every parameter that has a gradient. Collective if layers are cut over ranks."""
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue  # ZeRO updates one group at a time and empties the others
            tensors = [p for p in group["params"] if p.grad is not None]
            steps = [self.direction(p, group) for p in tensors]
            if group["scaled"]:
                self._scale(tensors, steps, group)
            else:
                for tensor, step in zip(tensors, steps, strict=True):
                    self.rescale(step, tensor, 1.0, group)
            for tensor, step in zip(tensors, steps, strict=True):
                self.apply(tensor, step, group)

    def direction(self, tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the unscaled step for ``tensor``, a new tensor of its shape. Its norm per layer goes into `ratio`."""
        raise NotImplementedError

    def ratio(self, weights: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the scale (L,) of each layer from the norms (L,) of its weights and of its unscaled step."""
        raise NotImplementedError

    def rescale(
        self, step: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | float, group: dict[str, Any]
    ) -> None:
        """Scale the step of a layer in place."""
        step.mul_(scale)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """Subtract the scaled step from the weights ``tensor`` in place."""
        raise NotImplementedError

    def _scale(self, tensors: list[torch.Tensor], steps: list[torch.Tensor], group: dict[str, Any]) -> None:
        weight_parts, step_parts, layers = [], [], []
        for tensor, step in zip(tensors, steps, strict=True):
            for segment in self._segments.get(tensor, [Segment("", 0, tensor.numel(), 0)]):
                weight_parts.append(tensor.view(-1).narrow(0, segment.offset, segment.size))
                step_parts.append(step.view(-1).narrow(0, segment.offset, segment.size))
                layers.append(segment.name)
        norms = torch.stack([_norms(weight_parts), _norms(step_parts)])
        if self._layer_numbers:
            norms = self._norms_of_whole_layers(norms, layers)
        scales = self.ratio(norms[0], norms[1], group)
        for step_part, weight_part, scale in zip(step_parts, weight_parts, scales, strict=True):
            self.rescale(step_part, weight_part, scale, group)

    def _norms_of_whole_layers(self, norms: torch.Tensor, layers: list[str]) -> torch.Tensor:
        """Return the norms (2, S) of the whole layers from those of this rank's S segments. Collective."""
        squares = torch.zeros(2, len(self._layer_numbers), device=norms.device)
        columns = torch.tensor([self._layer_numbers[name] for name in layers], dtype=torch.long, device=norms.device)
        squares[:, columns] = norms.square()
        shared = squares.cuda() if dist.get_backend() == "nccl" else squares  # an off-loaded optimiser is on the CPU
        dist.all_reduce(shared)
        whole: torch.Tensor = shared.to(norms.device).sqrt()[:, columns]
        return whole


class Lamb(LayerWise):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): Adam's step plus weight decay, scaled by |w| / |step|.

    The paper's φ is the identity. The step of a layer is not scaled if its weights or its step are 0.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def direction(self, tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return m / (√v + ε) + λ w, with both moments corrected for their start at 0."""
        state, gradient, (beta1, beta2) = self.state[tensor], tensor.grad, group["betas"]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(EPSILON)
        step: torch.Tensor = (state["exp_avg"] / (1 - beta1**count)).div_(root)
        return step.add_(tensor, alpha=group["weight_decay"])

    def ratio(self, weights: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return |w| / |step|, or 1 if either is 0."""
        return torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """Update w <- w - lr scale step."""
        tensor.sub_(step, alpha=group["lr"])


class Lars(LayerWise):
    """LARS (You et al. 2017, arXiv:1708.03888, algorithm 1): scaled gradient plus weight decay, with momentum 0.9.

    The scale of a layer is 0.001 |w| / (|g| + λ |w|). A layer is not scaled if its weights or its gradient are 0.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.9,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    def direction(self, tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return a copy of the gradient g."""
        assert tensor.grad is not None
        return tensor.grad.clone()

    def ratio(self, weights: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return 0.001 |w| / (|g| + λ |w|), or 1 if |w| or |g| is 0."""
        scales = group["trust"] * weights / (steps + group["weight_decay"] * weights)
        return torch.where((weights > 0) & (steps > 0), scales, 1.0)

    def rescale(
        self, step: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | float, group: dict[str, Any]
    ) -> None:
        """Replace g by scale (g + λ w) in place."""
        step.add_(weights, alpha=group["weight_decay"]).mul_(scale)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """Update v <- 0.9 v + lr scale (g + λ w), then w <- w - v."""
        state = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        tensor.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(step, alpha=group["lr"]))


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    norms: torch.Tensor = torch.stack(torch._foreach_norm(tensors)) if tensors else torch.zeros(0)
    return norms
