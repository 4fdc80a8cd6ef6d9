"""Naive versions of the further terms of the loss, reconstruction and dense: loops over voxels, points and cells.

They share no code with the package. They are slow and meant for a few scans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference import naive


def hidden_voxels(masked: Tensor, cutout: Tensor, sides: Sequence[int]) -> Tensor:
    """Which voxels of one view (D, H, W) are in a masked patch (n, n, n) or have their centre in the box (2, 3)."""
    hidden = torch.zeros(*sides, dtype=torch.bool)
    count = len(masked)
    for voxel in itertools.product(*map(range, sides)):
        patch = tuple(int(v * count / side) for v, side in zip(voxel, sides, strict=True))
        centre = [(v + 0.5) / side for v, side in zip(voxel, sides, strict=True)]
        in_box = all(cutout[0, axis] <= centre[axis] < cutout[1, axis] for axis in range(3))
        hidden[voxel] = bool(masked[patch]) or in_box
    return hidden


def reconstruction(rebuilt: Tensor, views: Tensor, hidden: Tensor) -> Tensor:
    """(1/H) Σ_h (x̂_h - x_h)²"""
    return (rebuilt[hidden] - views[hidden]).square().sum() / max(1, int(hidden.sum()))


def points_of(cell: tuple[int, int, int], grid: int) -> list[list[float]]:
    """The eight points of a cell, at a quarter and three quarters of each side."""
    return [
        [(c + quarter) / grid for c, quarter in zip(cell, quarters, strict=True)]
        for quarters in itertools.product((0.25, 0.75), repeat=3)
    ]


def hidden_at(place: Sequence[float], cutout: list[list[float]], masked: list[list[list[bool]]]) -> bool:
    """Whether a place of a view is in the box (2, 3), or in a masked patch (n, n, n); both are lists."""
    i, j, k = (min(int(p * len(masked)), len(masked) - 1) for p in place)
    return masked[i][j][k] or all(low <= p < high for p, low, high in zip(place, *cutout, strict=True))


def shown_places(
    placement: Tensor, cutout: Tensor, masked: Tensor, cell: tuple[int, int, int], grid: int
) -> list[list[float]]:
    """The places in one view of the points of a cell that the view shows."""
    found = []
    for point in points_of(cell, grid):
        place = [sum(float(placement[i, j]) * point[j] for j in range(3)) + float(placement[i, 3]) for i in range(3)]
        if all(0 <= p <= 1 for p in place) and not hidden_at(place, cutout.tolist(), masked.tolist()):
            found.append(place)
    return found


def is_visible(
    position: Sequence[int], cutout: Tensor, masked: Tensor, axes: Sequence[tuple[float, float]], sides: Sequence[int],
    samples: int = 12,
) -> bool | None:  # fmt: skip
    """Whether at least half of the cell of a map's position is not hidden: by a fine grid of places; None: about half."""
    places = []
    for axis, (first, step) in enumerate(axes):
        low = max(0.0, first + (position[axis] - 0.5) * step) / sides[axis]
        high = min(float(sides[axis]), first + (position[axis] + 0.5) * step) / sides[axis]
        places.append([low + (n + 0.5) / samples * (high - low) for n in range(samples)])
    box, patches = cutout.tolist(), masked.tolist()
    seen = [not hidden_at(place, box, patches) for place in itertools.product(*places)]
    share = sum(seen) / len(seen)
    return None if abs(share - 0.5) < 0.05 else share > 0.5


def weights_of(
    shape: Sequence[int], place: Sequence[float], axes: Sequence[tuple[float, float]], sides: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Weights of a map's positions in the trilinear interpolation at a place of the volume.

    ``axes`` are the centre of the first position and the distance of two, in voxels.
    """
    neighbours = []
    for axis, (first, step) in enumerate(axes):
        index = min(max((place[axis] * sides[axis] - first) / step, 0.0), shape[axis] - 1.0)
        low = min(math.floor(index), shape[axis] - 1)
        neighbours.append([(low, 1 - (index - low)), (min(low + 1, shape[axis] - 1), index - low)])
    weights: dict[tuple[int, ...], float] = {}
    for (i, a), (j, b), (k, c) in itertools.product(*neighbours):
        weights[i, j, k] = weights.get((i, j, k), 0.0) + a * b * c
    return weights


def sampled(
    values: Tensor, places: Sequence[Sequence[float]], visible: Tensor, axes: Sequence[tuple[float, float]],
    sides: Sequence[int],
) -> tuple[Tensor, float]:  # fmt: skip
    """The mean of a map (C, d, h, w) over places, from the visible positions alone: (C,); and the sum of their weights."""
    total, sum_of_weights = torch.zeros_like(values[:, 0, 0, 0]), 0.0
    for place in places:
        for position, weight in weights_of(values.shape[1:], place, axes, sides).items():
            if visible[position]:
                total, sum_of_weights = total + weight * values[(slice(None), *position)], sum_of_weights + weight
    return (total / sum_of_weights if sum_of_weights else total), sum_of_weights


def dense(
    cells: Tensor, shown: Sequence[Sequence[bool]], proxies: Tensor, twin: Callable[..., Tensor],
    weight: naive.PairWeight, subjects: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """(1/|K|) Σ_k L(the scans that show cell k in both views) over the cells K that two scans show. cells (2, N, K, P)."""
    terms = []
    for cell in range(cells.shape[2]):
        scans = [scan for scan in range(cells.shape[1]) if shown[scan][cell]]
        if len(scans) > 1:
            own = {} if subjects is None else {"subjects": [subjects[scan] for scan in scans]}
            terms.append(twin(cells[:, scans, cell], proxies[scans], weight, **own))
    return torch.stack(terms).mean() if terms else cells.sum() * 0.0
