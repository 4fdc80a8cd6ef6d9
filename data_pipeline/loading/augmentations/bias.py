"""Bias field of the receive coil."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.loading.augmentations.operator import STRICT, GraphContext, Operator, Probability, Step, ViewContext


@dataclass(frozen=True, config=STRICT)
class Bias:
    """Multiplies intensities above the scan's minimum by a smooth field between exp(-``strength``) and exp(``strength``).

    The logarithm of the field is a sum over the axes of a half and a whole cosine wave with random phases and amplitudes.
    """

    p: float = Probability
    strength: float = Field(default=0.4, ge=0.0, le=2.0)


def _draw(settings: Bias, u: NDArray[np.float64], shape: tuple[int, ...]) -> list[NDArray[np.float32]] | None:
    """Return the field's factor along each axis, (D,), (H,) and (W,); ``u`` holds a phase and two amplitudes per axis."""
    factors = []
    for length, (phase, half, whole) in zip(shape, u.reshape(3, 3), strict=True):
        along = (np.arange(length) + 0.5) / length
        waves = sum((a - 0.5) * np.cos(np.pi * k * (along + 2.0 * phase)) for k, a in ((1, half), (2, whole)))
        # Each amplitude is at most one half, so the sum over the three axes stays within ± strength.
        factors.append(np.exp(settings.strength / 3.0 * waves).astype(np.float32))
    return factors if any(np.any(factor != 1) for factor in factors) else None


def _arrays(context: ViewContext, factors: list[NDArray[np.float32]] | None) -> list[NDArray[Any]]:
    factors = factors or [np.ones(length, np.float32) for length in context.shape]
    return [factor.reshape(*(-1 if axis == own else 1 for axis in range(4))) for own, factor in enumerate(factors)]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    along_d, along_h, along_w = (factor.gpu() if context.gpu else factor for factor in arrays)
    return context.low + (view - context.low) * (along_d * (along_h * along_w))


BIAS = Operator(
    Bias, range(29, 39), _draw, Step(_arrays, (("FLOAT", 4), ("FLOAT", 4), ("FLOAT", 4)), _apply, uses_range=True)
)
