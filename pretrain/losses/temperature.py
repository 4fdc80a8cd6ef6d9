"""A temperature that is learned together with the encoder, within bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError


class _Clamp(torch.autograd.Function):
    """A clamp whose gradient can lead back inside: at a bound, gradients that would cross it are zeroed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        """Clamp a tensor to [low, high]."""
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, with 0 where a descent step would leave the bounds."""
        (value,), (low, high), gradient = ctx.saved_tensors, ctx.bounds, gradients[0]
        # A descent step goes against the gradient, so a positive gradient lowers the value.
        outward = ((value <= low) & (gradient > 0)) | ((value >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


class Temperature(nn.Module):
    """A learned temperature τ, clamped to [low, high].

    The only parameter is log τ, (1,) float32; DeepSpeed cannot broadcast a parameter without dimensions. Like the encoder's,
    its gradient is exact under data parallelism, since every rank contributes the gradient of its own anchors. Exclude it
    from weight decay, which would pull τ towards 1.

    Args:
        start: first τ.
        low, high: bounds of τ.

    Raises:
        UserError: unless 0 < low <= start <= high.
    """

    def __init__(self, start: float = 0.1, low: float = 0.01, high: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < low <= start <= high < math.inf:
            raise UserError(
                f"temperature={start}, temperature_bounds=[{low}, {high}] are not allowed; needs 0 < low <= temperature <= high"
            )
        self.bounds = math.log(low), math.log(high)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(start)]))

    def forward(self) -> Tensor:
        """Return τ, a scalar tensor for a loss."""
        wide = self.log_temperature.to(torch.promote_types(self.log_temperature.dtype, torch.float32))
        clamped: Tensor = _Clamp.apply(wide, *self.bounds)  # type: ignore[no-untyped-call]
        return clamped.exp()[0]
