"""Gaussian noise, cut from a bank that is drawn once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

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
from infra.random_streams import NOISE_BANK, generator

BANK_MARGIN = 64  # voxels by which the bank is longer than a volume along each axis


@dataclass(frozen=True, config=STRICT)
class Noise:
    """Adds Gaussian noise to the z-scored volume; its standard deviation is uniform in ``sigma``."""

    p: float = Probability
    sigma: tuple[float, float] = (0.1, 1.0)


class NoiseCut(NamedTuple):
    """A view's noise: its standard deviation, its sign, and the corner in the bank from which it is cut."""

    sigma: float
    corner: tuple[int, int, int]
    sign: float


@lru_cache(maxsize=2)
def noise_bank(shape: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    """Return standard normal values, ``BANK_MARGIN`` longer than ``shape`` along each axis, from which noise is cut.

    A cut at a drawn corner with a drawn sign is one of 2 x 64³ noise volumes, uncorrelated voxel by voxel, and costs no more
    than a copy. DALI's own noise has one state per batch; this noise is the same on whichever rank the scan is read.
    """
    size = [n + BANK_MARGIN for n in shape]
    bank = generator(seed, NOISE_BANK).standard_normal(size, dtype=np.float32).astype(np.float16)
    bank.setflags(write=False)
    return bank


def _draw(settings: Noise, u: NDArray[np.float64], shape: tuple[int, ...]) -> NoiseCut | None:
    sigma = between(settings.sigma, u[0])
    d, h, w = (int(v) for v in u[1:4] * BANK_MARGIN)
    return NoiseCut(sigma, (d, h, w), 1.0 if u[4] < 0.5 else -1.0) if sigma > 0 else None


def _arrays(context: ViewContext, cut: NoiseCut | None) -> list[NDArray[Any]]:
    if cut is None:  # a view without noise takes neither memory nor time in transport
        return [np.array(0.0, np.float32), np.zeros((1, 1, 1, 1), np.float16)]
    box = tuple(slice(first, first + n) for first, n in zip(cut.corner, context.shape, strict=True))
    noise = np.ascontiguousarray(noise_bank(context.shape, context.seed)[box][..., None])
    return [np.array(cut.sigma * cut.sign, np.float32), noise]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    from nvidia.dali import fn, types

    factor, noise = arrays
    return view + factor * fn.cast(noise.gpu() if context.gpu else noise, dtype=types.FLOAT)


NOISE = Operator(Noise, range(2, 8), _draw, Step(_arrays, (("FLOAT", 0), ("FLOAT16", 4)), _apply, volumes=1))
