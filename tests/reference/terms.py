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


def shown_places(placement: Tensor, cutout: Tensor, cell: tuple[int, int, int], grid: int) -> list[list[float]]:
    """The places in one view of the points of a cell that the view shows."""
    found = []
    for point in points_of(cell, grid):
        place = [sum(float(placement[i, j]) * point[j] for j in range(3)) + float(placement[i, 3]) for i in range(3)]
        in_box = all(float(cutout[0, i]) <= place[i] < float(cutout[1, i]) for i in range(3))
        if all(0 <= p <= 1 for p in place) and not in_box:
            found.append(place)
    return found


def interpolated(
    last_map: Tensor, place: Sequence[float], sides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Tensor:
    """Trilinear interpolation of a map (C, d, h, w), which covers the padded volume, at a place of the volume: (C,)."""
    neighbours = []
    for axis in range(3):
        positions = last_map.shape[1 + axis]
        before, after = padding[axis]
        index = (place[axis] * sides[axis] + before) / (sides[axis] + before + after) * positions - 0.5
        index = min(max(index, 0.0), positions - 1.0)
        low = min(math.floor(index), positions - 1)
        neighbours.append([(low, 1 - (index - low)), (min(low + 1, positions - 1), index - low)])
    total = torch.zeros_like(last_map[:, 0, 0, 0])
    for (i, a), (j, b), (k, c) in itertools.product(*neighbours):
        total = total + a * b * c * last_map[:, i, j, k]
    return total


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
