"""Gaussian blur."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from data_pipeline.loading.augmentations.operator import (
    STRICT,
    GraphContext,
    Operator,
    Probability,
    Step,
    ViewContext,
    between,
)

NO_BLUR = 1e-3  # voxels; DALI refuses 0, and at 0.001 every weight of the kernel but the middle one is exactly 0


@dataclass(frozen=True, config=STRICT)
class Blur:
    """Blurs with a Gaussian whose standard deviation, in voxels, is uniform in ``sigma``."""

    p: float = Probability
    sigma: tuple[float, float] = (0.1, 1.0)


def _draw(settings: Blur, u: NDArray[np.float64], shape: tuple[int, ...]) -> float | None:
    sigma = between(settings.sigma, u[0])
    return sigma if sigma > NO_BLUR else None


def _arrays(context: ViewContext, sigma: float | None) -> list[NDArray[Any]]:
    return [np.array([NO_BLUR if sigma is None else sigma], np.float32)]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    from nvidia.dali import fn

    return fn.gaussian_blur(view, sigma=arrays[0])


BLUR = Operator(Blur, range(2), _draw, Step(_arrays, (("FLOAT", 1),), _apply))
