"""Pooling of a feature map to features, and the size of the map. One definition for encoders, blocks, monitor and fine-tuning.

N = scans, C = channels, d x h x w = positions of the map. Order of the features: all features of channel 0, then of channel 1,
and so on. Within a channel ``none`` has the positions in C order (the last axis of the volume runs fastest), and ``gridG`` has
the cells in the same order: feature c G³ + i G² + j G + k is the mean of channel c over cell (i, j, k). Cell i of an axis of d
positions holds the positions from floor(i d / G) to below ceil((i + 1) d / G), as in torch's AdaptiveAvgPool3d, which has no
CPU kernel for bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from infra.errors import UserError

LARGEST_GRID = 8
GRIDS = {f"grid{cells}": cells for cells in range(2, LARGEST_GRID + 1)}
SPATIAL = (*GRIDS, "none")  # poolings that need a map; a class token has no place in them
NONE_NEEDS_GRID = (
    "encoder.options.pooling='none' needs encoder.options.grid, on which the number of features depends; set it to the sides "
    "of the scans in voxels, as [121, 145, 121]"
)
MOST_FEATURES = 2**20  # of an encoder; config.json allows no more


def grid_mean(features_NCdhw: torch.Tensor, cells: int) -> torch.Tensor:
    """Return the means (N, C cells³) of a map (N, C, d, h, w) over ``cells`` cells along each axis.

    Raises UserError if an axis has fewer positions than cells.
    """
    sides = tuple(features_NCdhw.shape[2:])
    check_cells(cells, sides)
    pooled = features_NCdhw
    for axis, side in enumerate(sides, 2):  # a cell is a box, so its mean is taken axis by axis
        bounds = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        pooled = torch.stack(
            [pooled.narrow(axis, low, high - low).mean(dim=axis) for low, high in bounds], dim=axis
        )  # fmt: skip
    return pooled.flatten(1)


# (N, C, ...) -> (N, F). AdaptiveAvgPool3d has no CPU kernel for bfloat16; mean() has one.
POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda features: features.flatten(2).mean(dim=2),
    "max": lambda features: features.flatten(2).amax(dim=2),
    "std": lambda features: features.flatten(2).std(dim=2, correction=0),
    "mean+max": lambda features: torch.cat([POOLINGS["mean"](features), POOLINGS["max"](features)], dim=1),
    "class": lambda features: features[:, :, 0],
    "first": lambda features: features.flatten(2)[:, :, 0],  # of a map: the position at the low face of every axis
    **{name: partial(grid_mean, cells=cells) for name, cells in GRIDS.items()},
    "none": lambda features: features.flatten(1),
}


def check_cells(cells: int, sides: Sequence[int]) -> None:
    """Raise UserError if a map has fewer positions along a side than a grid has cells."""
    if len(sides) != 3 or min(sides) < cells:
        shape = "x".join(map(str, sides))
        raise UserError(
            f"pooling grid{cells} needs a map of {cells} or more positions along each side, and the map is {shape}; choose "
            "fewer cells, none, or an earlier block"
        )


def feature_count(pooling: str, channels: int, sides: Sequence[int] | None) -> int:
    """Return the number of features of a map with so many channels; ``sides`` (3,) are needed for ``none`` only."""
    if pooling in GRIDS:
        return channels * GRIDS[pooling] ** 3
    if pooling == "none":
        assert sides is not None
        return channels * math.prod(sides)
    return channels * (2 if pooling == "mean+max" else 1)


def as_map(output: torch.Tensor, patches: Sequence[int]) -> torch.Tensor:
    """Return a map (N, C, d, h, w) as it is; put tokens (N, C, T) on their grid of ``patches`` (3,), without the class token.

    Raises UserError if the tokens are not those of such a grid.
    """
    if output.ndim == 5:
        return output
    count = math.prod(patches)
    if output.ndim != 3 or output.shape[2] - count not in (0, 1):
        raise UserError(
            f"poolings {', '.join(GRIDS)} and none need a map of positions, and this block's output has the shape "
            f"{'x'.join(map(str, output.shape))}; choose mean, max or std, or another block"
        )
    return output[:, :, output.shape[2] - count :].reshape(*output.shape[:2], *patches)


def map_shapes(trunk: nn.Module, blocks: Sequence[str], sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shape of the output of each block, without the scans, for one volume of ``sides`` voxels.

    Nothing is computed and no memory is taken: torch's device ``meta`` knows shapes only. The name "" is the trunk itself.
    A block that returns no single tensor has the shape ().
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: object) -> None:
        shapes[name] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()

    handles = [
        trunk.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: note(name, output))
        for name in blocks
        if name
    ]
    try:
        note("", run_on_meta(trunk, torch.empty(1, 1, *sides, device="meta")))
    finally:
        for handle in handles:
            handle.remove()
    return [shapes.get(name, ()) for name in blocks]


def run_on_meta(trunk: nn.Module, *arguments: Any) -> Any:
    """Return what a trunk in evaluation mode returns for arguments on torch's device ``meta``; it is not compiled for it."""
    training = trunk.training
    weights = {
        f"trunk.{name}": torch.empty_like(
            value, device="meta", dtype=torch.float32 if value.is_floating_point() else None
        )
        for name, value in (*trunk.named_parameters(), *trunk.named_buffers())
    }
    try:
        with torch.no_grad():
            trunk.eval()
            return functional_call(_NotCompiled(trunk), weights, arguments)
    finally:
        trunk.train(training)


class _NotCompiled(nn.Module):
    """Calls a trunk without the form of it that ``trunk.compile()`` made."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, *arguments: Any) -> Any:
        """Return the trunk's output."""
        return self.trunk.forward(*arguments)
