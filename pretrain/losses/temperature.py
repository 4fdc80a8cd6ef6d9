"""A temperature that is learned with the encoder, within bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient leads back inside: at a bound only a step further out is stopped, so it cannot get stuck."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,), (low, high), gradient = ctx.saved_tensors, ctx.bounds, gradients[0]
        # A descent step goes against the gradient.
        outward = ((value <= low) & (gradient > 0)) | ((value >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


class Temperature(nn.Module):
    """τ = exp(log τ), clamped to [low, high]; log τ is the one parameter, (1,) float32.

    (DeepSpeed cannot broadcast a parameter of no dimension.)

    Its gradient is exact under data parallelism like the encoder's: every rank holds its own anchors' share.
    Weight decay would pull it towards 1: leave it out of decay.
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
        """τ, a scalar tensor to be given to a loss."""
        wide = self.log_temperature.to(torch.promote_types(self.log_temperature.dtype, torch.float32))
        clamped: Tensor = _Clamp.apply(wide, *self.bounds)  # type: ignore[no-untyped-call]
        return clamped.exp()[0]
