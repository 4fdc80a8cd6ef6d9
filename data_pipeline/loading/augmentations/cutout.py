"""Cutout: a box of zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.loading.augmentations.operator import STRICT, GraphContext, Operator, Probability, Step, ViewContext


@dataclass(frozen=True, config=STRICT)
class Cutout:
    """Sets a box with ``side`` (share) of each side, at a random position, to 0."""

    p: float = Probability
    side: float = Field(default=0.25, gt=0.0, lt=1.0)


class Box(NamedTuple):
    """A box in shares of the volume's sides: its low corner (3,), and its side."""

    corner: NDArray[np.float32]
    side: float


def _draw(settings: Cutout, u: NDArray[np.float64], shape: tuple[int, ...]) -> Box:
    return Box((u[:3] * (1.0 - settings.side)).astype(np.float32), settings.side)


def _arrays(context: ViewContext, box: Box | None) -> list[NDArray[Any]]:
    corner, side = box or Box(np.zeros(3, np.float32), 0.0)
    return [corner, np.full(3, side, np.float32)]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    from nvidia.dali import fn

    corner, sides = arrays
    return fn.erase(view, anchor=corner, shape=sides, axis_names="DHW", normalized=True, fill_value=0.0)


# Erasing an empty box costs less than skipping the step.
CUTOUT = Operator(Cutout, range(8, 12), _draw, Step(_arrays, (("FLOAT", 1), ("FLOAT", 1)), _apply, always=True))
