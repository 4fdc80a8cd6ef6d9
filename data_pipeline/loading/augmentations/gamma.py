"""Contrast: a power of the intensities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.loading.augmentations.operator import STRICT, GraphContext, Operator, Probability, Step, ViewContext


@dataclass(frozen=True, config=STRICT)
class Gamma:
    """Scales intensities to 0..1 by the scan's minimum and maximum, raises them to a power, and scales them back.

    A power needs values from 0 up, which a z-scored scan does not have: 0..1 corresponds to a raw scan's air and brightest
    voxel. The range and the order of the intensities stay. log(power) is uniform between minus and plus ``log``.
    """

    p: float = Probability
    log: float = Field(default=0.3, ge=0.0, le=2.0)


def _draw(settings: Gamma, u: NDArray[np.float64], shape: tuple[int, ...]) -> float | None:
    power = float(np.exp((2.0 * u[0] - 1.0) * settings.log))
    return power if power != 1.0 else None


def _arrays(context: ViewContext, power: float | None) -> list[NDArray[Any]]:
    return [np.array(1.0 if power is None else power, np.float32)]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    from nvidia.dali import math

    # Rounding can give a value slightly below 0, whose power would be NaN.
    unit = math.clamp((view - context.low) / context.span, 0.0, 1.0)
    return context.low + context.span * math.pow(unit, arrays[0])


GAMMA = Operator(Gamma, range(27, 29), _draw, Step(_arrays, (("FLOAT", 0),), _apply, uses_range=True))
