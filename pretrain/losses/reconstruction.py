"""Reconstruction: a light decoder rebuilds the voxels of a view that cutout and masking hid from the encoder.

    L = Σ_h (x̂_h - x_h)² / H        h runs over the H hidden voxels of all views of all ranks; x is in units of the z-score

The decoder is part of the training only; it is not exported.

b = scans of a forward pass, B = scans of this rank, N = volumes, C = channels of the encoder's map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pretrain.encoders.centres import Axes, MapAxis
from pretrain.losses.gather import Gather, SingleProcess
from pretrain.losses.interpolation import linear_weights, map_positions
from pretrain.losses.pairs import full_precision

CHANNELS = (64, 32, 16, 8)


class Decoder(nn.Sequential):
    """(N, C, d, h, w) -> (N, 1, 8 d, 8 h, 8 w): a 1x1x1 convolution, three transposed ones that double the sides, another.

    It has 64 C + 21,633 parameters: 87,169 for DenseNet121 (C = 1,024), 54,401 for ResNet18 (C = 512). A map whose positions
    are fewer than 8 voxels apart has fewer doublings, so that the output is not finer than the volume.

    Args:
        channels: C.
        layer: the block whose map is decoded; None is the last map.
        doublings: 0 to 3.
    """

    def __init__(self, channels: int, layer: str | None = None, doublings: int = len(CHANNELS) - 1) -> None:
        layers: list[nn.Module] = [nn.Conv3d(channels, CHANNELS[0], 1), nn.ReLU()]
        for before, after in pairwise(CHANNELS[: doublings + 1]):
            layers += [nn.ConvTranspose3d(before, after, 2, stride=2), nn.ReLU()]
        super().__init__(*layers, nn.Conv3d(CHANNELS[doublings], 1, 1))
        self.layer, self.doublings = layer, doublings

    def rebuild(self, map_NCdhw: Tensor, sides: Sequence[int], axes: Axes) -> Tensor:
        """Return volumes (N, 1, D, H, W), float32 or better, interpolated linearly from the decoder's output.

        Args:
            map_NCdhw: the map.
            sides: (D, H, W).
            axes: where the map's positions lie, in voxels.
        """
        parts = 2**self.doublings
        d, h, w = (
            MapAxis(axis.first - axis.step / 2 + axis.step / (2 * parts), axis.step / parts) for axis in axes
        )  # of the decoder's output: each position of the map becomes so many equal parts of its cell
        return _interpolated(self(map_NCdhw), sides, (d, h, w))


def doublings_for(step: float) -> int:
    """Return how often a decoder doubles the sides of a map of positions ``step`` voxels apart: not beyond single voxels."""
    return min(len(CHANNELS) - 1, max(0, int(math.log2(step))))


@full_precision
def _interpolated(coarse: Tensor, sides: Sequence[int], axes: Axes) -> Tensor:
    volumes = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
    for dim, (side, axis) in enumerate(zip(sides, axes, strict=True), start=2):
        places = (torch.arange(side, device=volumes.device, dtype=torch.float64) + 0.5) / side
        weights = linear_weights(map_positions(places, side, axis), volumes.shape[dim]).to(volumes.dtype)
        volumes = (volumes.movedim(dim, -1) @ weights.T).movedim(-1, dim)
    return volumes


def hidden_voxels(masked: Tensor, cutout: Tensor, sides: Sequence[int]) -> Tensor:
    """Return which voxels are hidden, (2, b, 1, D, H, W) bool: those of masked patches, and those in the box of the cutout.

    Args:
        masked: (2, b, n, n, n) bool; the patches divide each side evenly.
        cutout: (2, b, 2, 3) low and high corner of the box, shares of the sides.
        sides: (D, H, W).
    """
    box: Tensor | None = None
    hidden = masked
    for axis, side in enumerate(sides):
        voxels = torch.arange(side, device=masked.device)
        hidden = hidden.index_select(2 + axis, voxels * masked.shape[2 + axis] // side)
        centres = (voxels + 0.5) / side
        inside = (cutout[:, :, 0, axis, None] <= centres) & (centres < cutout[:, :, 1, axis, None])
        inside = inside.view(*inside.shape[:2], *(side if other == axis else 1 for other in range(3)))
        box = inside if box is None else box & inside
    assert box is not None
    return (hidden | box)[:, :, None]


@full_precision
def squared_errors(rebuilt: Tensor, views: Tensor, hidden: Tensor) -> Tensor:
    """Return, for each view, the sum of the squared errors over its hidden voxels, and their number: (2, b, 2).

    Args:
        rebuilt: (2, b, 1, D, H, W).
        views: the views as they were before anything was hidden, of the same shape.
        hidden: bool, of the same shape.
    """
    errors = (rebuilt - views).square().masked_fill(~hidden, 0.0).flatten(2).sum(dim=2)
    return torch.stack([errors, hidden.flatten(2).sum(dim=2).to(errors.dtype)], dim=2)


def reconstruction_error(errors_2B2: Tensor, gather: Gather | None = None) -> Tensor:
    """Return this rank's contribution to the mean squared error over the hidden voxels of all ranks. Collective.

    As for the contrastive losses, the mean over the ranks of the values, and of the gradients, is that of the whole batch,
    also if the ranks hold different numbers of scans. It is 0 if no voxel is hidden on any rank.

    Args:
        errors_2B2: what `squared_errors` returns, for all scans of this rank.
        gather: how to reach the other ranks; None is a single process.
    """
    ranks = gather or SingleProcess()
    count = ranks.sum(errors_2B2[..., 1].double().sum()).clamp(min=1.0)
    return errors_2B2[..., 0].sum() * (ranks.world_size / count).to(errors_2B2.dtype)
