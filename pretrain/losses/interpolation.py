"""Linear interpolation between the positions of a feature map, by matrix products, whose gradient is deterministic on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.encoders.centres import MapAxis


def map_positions(places: Tensor, side: int, axis: MapAxis) -> Tensor:
    """Convert places along an axis of the volume to fractional indices of the map; same shape.

    Args:
        places: (...) shares of the side: 0 is the low face of the volume, 1 its high face.
        side: length of the axis in voxels.
        axis: where the map's positions have their centres.
    """
    return (places * side - axis.first) / axis.step


def linear_weights(index: Tensor, positions: int) -> Tensor:
    """Return the weights (..., positions) that interpolate between positions 0, 1, ... at ``index`` (...).

    Beyond the first and the last position their values are repeated.
    """
    inner = index.clamp(0, positions - 1)
    return (1.0 - (inner[..., None] - torch.arange(positions, device=index.device)).abs()).clamp(min=0.0)
