"""The dense loss: a contrastive loss between the same places of the brain, cell by cell of a grid.

The scan is divided into G x G x G cells. The known transform of each view says where a cell lies in it; the encoder's last map
is sampled there, so that a cell's vector describes the same place in every view of every scan:

    scan (registered)                  view 1 (shifted)               view 2 (mirrored)
    +----+----+----+                 +----+----+----+               +----+----+----+
    | 0  | 1  | 2  |     --->     0  | 1  | 2  |    |               | 2  | 1  | 0  |
    +----+----+----+                 +----+----+----+               +----+----+----+
                                 cell 0 is outside: left out

Cell by cell, the scans that show the cell in both views are compared by the recipe's loss, with its kernel, positives and
negatives; the dense loss is the mean over the cells that at least two scans show.

N = views, B = scans of this rank, K = G³ cells, S = 8 points of a cell, T = d h w positions of the map, C = its channels,
P = size of the projection. Places are shares of the sides, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.losses.gather import AllGather, SingleProcess
from pretrain.losses.interpolation import linear_weights, map_positions
from pretrain.losses.pairs import full_precision

# A cell is sampled at 2 x 2 x 2 points, and a view shows it if it shows half of them.
POINTS_PER_SIDE = 2
SHOWN_POINTS = 4
# (views (2, B', P), proxies (B', number of proxies), gather, subjects (B',) or None) -> this rank's scalar
CellLoss = Callable[[Tensor, Tensor, AllGather | SingleProcess, Tensor | None], Tensor]


def cell_points(grid: int, like: Tensor) -> Tensor:
    """Return the points (K, S, 3) of the cells of a scan."""
    count = POINTS_PER_SIDE * grid
    along = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count
    points = torch.stack(torch.meshgrid(along, along, along, indexing="ij"), dim=-1)
    cells = points.view((grid, POINTS_PER_SIDE) * 3 + (3,))
    return cells.permute((0, 2, 4, 1, 3, 5, 6)).reshape(grid**3, POINTS_PER_SIDE**3, 3)


def points_in_views(placement_N34: Tensor, cutout_N23: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Return where the cells' points lie in the views, (N, K, S, 3), and whether the views show them, (N, K, S) bool.

    Args:
        placement_N34: affine maps from a place in the scan to its place in the view.
        cutout_N23: low and high corners of the boxes that cutout hid.
        grid: G.
    """
    points_KS3 = cell_points(grid, placement_N34)
    linear, shift = placement_N34[:, None, None, :, :3], placement_N34[:, None, None, :, 3]
    places_NKS3 = (linear * points_KS3[None, :, :, None, :]).sum(dim=-1) + shift
    low, high = cutout_N23[:, None, None, 0], cutout_N23[:, None, None, 1]
    in_view = ((places_NKS3 >= 0) & (places_NKS3 <= 1)).all(dim=-1)
    in_cutout = ((places_NKS3 >= low) & (places_NKS3 < high)).all(dim=-1)
    return places_NKS3, in_view & ~in_cutout


def cells_shown(placement_2B34: Tensor, cutout_2B23: Tensor, grid: int) -> Tensor:
    """Return which cells both views of a scan show, (B, K) bool."""
    _, shown = points_in_views(placement_2B34.flatten(0, 1), cutout_2B23.flatten(0, 1), grid)
    return (shown.sum(dim=2) >= SHOWN_POINTS).view(2, -1, grid**3).all(dim=0)


@full_precision
def sample_cells(
    last_map_NCdhw: Tensor, placement_N34: Tensor, cutout_N23: Tensor, *, grid: int, sides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Tensor:  # fmt: skip
    """Return the mean (N, K, C) of the map over the points of each cell that the view shows; 0 if it shows none.

    Args:
        last_map_NCdhw: the encoder's last map, which covers the padded view.
        placement_N34: affine maps from a place in the scan to its place in the view.
        cutout_N23: low and high corners of the boxes that cutout hid.
        grid: G.
        sides: (D, H, W) of the views, in voxels.
        padding: voxels that the encoder adds before and after each side.
    """
    values = last_map_NCdhw.to(torch.promote_types(last_map_NCdhw.dtype, torch.float32))
    places, shown = points_in_views(placement_N34.to(values.dtype), cutout_N23.to(values.dtype), grid)
    along = [
        linear_weights(map_positions(places[..., axis], sides[axis], padding[axis], positions), positions)
        for axis, positions in enumerate(values.shape[2:])
    ]
    share_NKS = shown.to(values.dtype) / shown.sum(dim=2, keepdim=True).clamp(min=1)
    planes = (along[0] * share_NKS[..., None])[..., :, None] * along[1][..., None, :]  # (N, K, S, d, h)
    weights_NKT = (planes.flatten(3).transpose(2, 3) @ along[2]).flatten(2)
    return weights_NKT @ values.flatten(2).transpose(1, 2)


def dense_loss(
    cells_2BKP: Tensor, shown_BK: Tensor, proxies: Tensor, *, loss: CellLoss, gather: AllGather | None = None,
    subjects: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return this rank's contribution to the mean of ``loss`` over the cells that at least two scans show. Collective.

    The mean over the ranks of the values, and of the gradients, is that of the whole batch. It is 0 if no cell is shown by
    two scans. A cell costs one collective in each direction.

    Args:
        cells_2BKP: projected cells of both views.
        shown_BK: bool, which cells both views of a scan show; the others are left out.
        proxies: (B, number of proxies).
        loss: the loss of one cell.
        gather: how to reach the other ranks; None is a single process.
        subjects: (B,) integers, or None.
    """
    ranks = gather or SingleProcess()
    counts_WK = torch.zeros(ranks.world_size, shown_BK.shape[1], dtype=torch.int64, device=shown_BK.device)
    counts_WK[ranks.rank] = shown_BK.sum(dim=0)
    counts = ranks.sum(counts_WK).T.tolist()
    compared = [cell for cell, sizes in enumerate(counts) if sum(sizes) > 1]
    total = cells_2BKP.sum() * 0.0
    for cell in compared:
        scans = shown_BK[:, cell]
        own = None if subjects is None else subjects[scans]
        total = total + loss(cells_2BKP[:, scans, cell], proxies[scans], ranks.of_sizes(counts[cell]), own)
    return total / max(1, len(compared))
