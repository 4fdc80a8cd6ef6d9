"""Linear interpolation between the positions of a feature map, by matrix products, whose gradient is deterministic on a GPU.

The map of an encoder is taken to divide the padded volume evenly. Strided convolutions shift and round this by a fraction of a
position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def map_positions(places: Tensor, side: int, padding: tuple[int, int], positions: int) -> Tensor:
    """Convert positions along an axis of the volume to fractional indices of the map; same shape.

    Args:
        places: (...) shares of the side: 0 is the low face of the volume, 1 its high face.
        side: length of the axis in voxels.
        padding: voxels that the encoder adds before and after it.
        positions: number of positions of the map along this axis.
    """
    before, after = padding
    return (places * side + before) * (positions / (side + before + after)) - 0.5


def linear_weights(index: Tensor, positions: int) -> Tensor:
    """Return the weights (..., positions) that interpolate between positions 0, 1, ... at ``index`` (...).

    Beyond the first and the last position their values are repeated.
    """
    inner = index.clamp(0, positions - 1)
    return (1.0 - (inner[..., None] - torch.arange(positions, device=index.device)).abs()).clamp(min=0.0)
