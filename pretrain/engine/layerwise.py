"""LAMB and LARS: optimisers for large batches that scale each layer's step to the size of its weights.

Under ZeRO a rank's optimiser holds parts of layers, laid end to end. Told which (``learn_parts``), it takes the norms of
whole layers all the same, added up over the ranks in one small collective a group of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.partitions import Piece

EPSILON = 1e-6


class LayerWise(torch.optim.Optimizer):
    """What both share. A group with ``scaled: False`` (biases and norms) keeps the plain step, as in both papers."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"scaled": True, **defaults})
        self._parts: dict[torch.Tensor, list[Piece]] = {}
        self._numbers: dict[str, int] = {}

    def learn_parts(self, parts: Sequence[tuple[torch.Tensor, list[Piece]]], names: Sequence[str]) -> None:
        """The layers in each tensor that is stepped here, other ranks holding the rest of them; ``names``: every layer."""
        self._parts = dict(parts)
        self._numbers = {name: number for number, name in enumerate(names)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there; a collective where layers are cut over ranks."""
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue  # ZeRO steps one group at a time and hides the others
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
        """The step along ``tensor`` whose size by layer counts, to be changed in place."""
        raise NotImplementedError

    def ratio(self, weights: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The scale of each layer (L,) from the norms (L,) of its weights and of its direction."""
        raise NotImplementedError

    def rescale(
        self, step: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | float, group: dict[str, Any]
    ) -> None:
        """Scale the step of a layer, in place."""
        step.mul_(scale)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """Move the weights."""
        raise NotImplementedError

    def _scale(self, tensors: list[torch.Tensor], steps: list[torch.Tensor], group: dict[str, Any]) -> None:
        weights, moves, layers = [], [], []
        for tensor, step in zip(tensors, steps, strict=True):
            for piece in self._parts.get(tensor, [Piece("", 0, tensor.numel(), 0)]):
                weights.append(tensor.view(-1).narrow(0, piece.offset, piece.size))
                moves.append(step.view(-1).narrow(0, piece.offset, piece.size))
                layers.append(piece.name)
        sizes = torch.stack([_norms(weights), _norms(moves)])
        if self._numbers:
            sizes = self._over_ranks(sizes, layers)
        for move, part, scale in zip(moves, weights, self.ratio(sizes[0], sizes[1], group), strict=True):
            self.rescale(move, part, scale, group)

    def _over_ranks(self, sizes: torch.Tensor, layers: list[str]) -> torch.Tensor:
        """Norms (2, pieces) of the whole layers from those of the pieces. Collective."""
        squares = torch.zeros(2, len(self._numbers), device=sizes.device)
        mine = torch.tensor([self._numbers[name] for name in layers], dtype=torch.long, device=sizes.device)
        squares[:, mine] = sizes.square()
        shared = squares.cuda() if dist.get_backend() == "nccl" else squares  # an off-loaded optimiser is on the CPU
        dist.all_reduce(shared)
        whole: torch.Tensor = shared.to(sizes.device).sqrt()[:, mine]
        return whole


class Lamb(LayerWise):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): Adam's step plus weight decay, scaled by |w| / |step|.

    φ is the identity; a layer whose weights or step are 0 keeps the step as it is.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def direction(self, tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """m / (√v + ε) + λ w, both moments corrected for their start at 0."""
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
        """|w| / |step|."""
        return torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """w <- w - lr scale step."""
        tensor.sub_(step, alpha=group["lr"])


class Lars(LayerWise):
    """LARS (You et al. 2017, arXiv:1708.03888, algorithm 1): gradient plus weight decay, scaled, under momentum 0.9.

    A layer's scale is 0.001 |w| / (|g| + λ |w|); a layer whose weights or gradient are 0 is not scaled.
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
        """g."""
        assert tensor.grad is not None
        return tensor.grad.clone()

    def ratio(self, weights: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """0.001 |w| / (|g| + λ |w|)."""
        scales = group["trust"] * weights / (steps + group["weight_decay"] * weights)
        return torch.where((weights > 0) & (steps > 0), scales, 1.0)

    def rescale(
        self, step: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | float, group: dict[str, Any]
    ) -> None:
        """scale (g + λ w)."""
        step.add_(weights, alpha=group["weight_decay"]).mul_(scale)

    def apply(self, tensor: torch.Tensor, step: torch.Tensor, group: dict[str, Any]) -> None:
        """v <- 0.9 v + lr scale (g + λ w); w <- w - v."""
        state = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        tensor.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(step, alpha=group["lr"]))


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    norms: torch.Tensor = torch.stack(torch._foreach_norm(tensors)) if tensors else torch.zeros(0)
    return norms
