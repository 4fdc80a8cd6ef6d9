"""The dense loss: a contrastive loss between the same places of the brain, cell by cell of a grid.

The scan is divided into G x G x G cells. The known transform of each view says where a cell lies in it; a map of the encoder is
sampled there, between the centres of its positions (`pretrain.encoders.centres`), so that a cell's vector describes the same
place in every view of every scan:

    scan (registered)                  view 1 (shifted)               view 2 (mirrored)
    +----+----+----+                 +----+----+----+               +----+----+----+
    | 0  | 1  | 2  |     --->     0  | 1  | 2  |    |               | 2  | 1  | 0  |
    +----+----+----+                 +----+----+----+               +----+----+----+
                                 cell 0 is outside: left out

A point of a cell is shown if it is inside the view, and neither in the box of cutout nor in a masked patch. A position of the
map is left out if more than half of the voxels around it, a step wide, are hidden in one of these ways: what it holds is then
a guess from further away. (Whether its centre is hidden would say little: a masked patch, 1/8 of a side, is smaller than the
steps of last maps.) A view shows a cell if at least half of the weight of its points is on shown points and visible positions.

Cell by cell, the scans that show the cell in both views are compared by the recipe's loss, with its kernel, positives and
negatives; the dense loss is the mean over the cells that at least two scans show.

N = views, B = scans of this rank, K = G³ cells, S = 8 points of a cell, T = d h w positions of the map, C = its channels,
n = masked patches per side, P = size of the projection. Places are shares of the sides, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.encoders.centres import Axes
from pretrain.losses.gather import AllGather, SingleProcess
from pretrain.losses.interpolation import linear_weights, map_positions
from pretrain.losses.pairs import full_precision

# A cell is sampled at 2 x 2 x 2 points, and a view shows it if it shows half of them.
POINTS_PER_SIDE = 2
SHOWN_POINTS = 4
ROUNDING = 0.01  # of the sum of the points' weights, so that half is half on every device
# (views (2, B', P), proxies (B', number of proxies), gather, subjects (B',) or None) -> this rank's scalar
CellLoss = Callable[[Tensor, Tensor, AllGather | SingleProcess, Tensor | None], Tensor]


def cell_points(grid: int, like: Tensor) -> Tensor:
    """Return the points (K, S, 3) of the cells of a scan."""
    count = POINTS_PER_SIDE * grid
    along = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count
    points = torch.stack(torch.meshgrid(along, along, along, indexing="ij"), dim=-1)
    cells = points.view((grid, POINTS_PER_SIDE) * 3 + (3,))
    return cells.permute((0, 2, 4, 1, 3, 5, 6)).reshape(grid**3, POINTS_PER_SIDE**3, 3)


def points_in_views(
    placement_N34: Tensor, cutout_N23: Tensor, masked_Nnnn: Tensor, grid: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return where the cells' points lie in the views, (N, K, S, 3), and whether the views show them, (N, K, S) bool.

    Args:
        placement_N34: affine maps from a place in the scan to its place in the view.
        cutout_N23: low and high corners of the boxes that cutout hid.
        masked_Nnnn: bool, which patches are masked; they divide each side evenly.
        grid: G.
    """
    points_KS3 = cell_points(grid, placement_N34)
    linear, shift = placement_N34[:, None, None, :, :3], placement_N34[:, None, None, :, 3]
    places_NKS3 = (linear * points_KS3[None, :, :, None, :]).sum(dim=-1) + shift
    low, high = cutout_N23[:, None, None, 0], cutout_N23[:, None, None, 1]
    in_view = ((places_NKS3 >= 0) & (places_NKS3 <= 1)).all(dim=-1)
    in_cutout = ((places_NKS3 >= low) & (places_NKS3 < high)).all(dim=-1)
    patches = masked_Nnnn.shape[1]
    i, j, k = (places_NKS3 * patches).long().clamp(0, patches - 1).unbind(dim=-1)
    number = ((i * patches + j) * patches + k).flatten(1)
    in_patch = masked_Nnnn.flatten(1).gather(1, number).view(in_view.shape)
    return places_NKS3, in_view & ~in_cutout & ~in_patch


def visible_positions(
    cutout_N23: Tensor, masked_Nnnn: Tensor, axes: Axes, sides: Sequence[int], positions: Sequence[int]
) -> Tensor:  # fmt: skip
    """Return the positions of a map of whose cell at least half is neither in the box of cutout nor masked, (N, d, h, w) bool.

    The cell of a position is a step wide around its centre, as far as it is inside the volume.

    Args:
        cutout_N23: low and high corners of the boxes.
        masked_Nnnn: bool, which patches are masked.
        axes: where the map's positions lie, in voxels.
        sides: (D, H, W) of the views, in voxels.
        positions: (d, h, w).
    """
    cutout = cutout_N23.double()
    numbers = torch.arange(max(masked_Nnnn.shape[1] + 1, *positions), dtype=torch.float64, device=cutout.device)
    edges = numbers[: masked_Nnnn.shape[1] + 1] / masked_Nnnn.shape[1]
    inside, in_box = [], []  # how long the cells' overlaps with the patches are: (p, n), and in the box: (N, p, n)
    for axis, count in enumerate(positions):
        centres = (axes[axis].first + axes[axis].step * numbers[:count]) / sides[axis]
        half = axes[axis].step / sides[axis] / 2
        low = torch.maximum((centres - half)[:, None], edges[:-1])
        high = torch.minimum((centres + half)[:, None], edges[1:])
        inside.append((high - low).clamp(min=0))
        box_low, box_high = (cutout[:, side, axis, None, None] for side in (0, 1))
        in_box.append((torch.minimum(high, box_high) - torch.maximum(low, box_low)).clamp(min=0))
    open_Nnnn = (~masked_Nnnn).double()
    seen = torch.einsum("Nabc,ia,jb,kc->Nijk", open_Nnnn, *inside)
    seen = seen - torch.einsum("Nabc,Nia,Njb,Nkc->Nijk", open_Nnnn, *in_box)
    whole = torch.einsum("i,j,k->ijk", *(overlaps.sum(dim=1) for overlaps in inside))
    return 2 * seen >= whole * (1 - 1e-6)


@full_precision
def sample_cells(
    map_NCdhw: Tensor, placement_N34: Tensor, cutout_N23: Tensor, masked_Nnnn: Tensor, *, grid: int, axes: Axes,
    sides: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the mean (N, K, C) of the map over the shown points of each cell, and which cells the views show, (N, K) bool.

    The mean is 0 if no point of the cell is shown.

    Args:
        map_NCdhw: a feature map of the views.
        placement_N34: affine maps from a place in the scan to its place in the view.
        cutout_N23: low and high corners of the boxes that cutout hid.
        masked_Nnnn: bool, which patches are masked.
        grid: G.
        axes: where the map's positions lie, in voxels.
        sides: (D, H, W) of the views, in voxels.
    """
    values = map_NCdhw.to(torch.promote_types(map_NCdhw.dtype, torch.float32))
    cutout = cutout_N23.to(values.dtype)
    places, shown = points_in_views(placement_N34.to(values.dtype), cutout, masked_Nnnn, grid)
    along = [
        linear_weights(map_positions(places[..., axis], sides[axis], axes[axis]), positions)
        for axis, positions in enumerate(values.shape[2:])
    ]
    planes = (along[0] * shown[..., None])[..., :, None] * along[1][..., None, :]  # (N, K, S, d, h)
    weights_NKT = (planes.flatten(3).transpose(2, 3) @ along[2]).flatten(2)
    visible = visible_positions(cutout_N23, masked_Nnnn, axes, sides, values.shape[2:])
    weights_NKT = weights_NKT * visible.flatten(1)[:, None]
    points_NK = weights_NKT.sum(dim=2)
    means = (weights_NKT / points_NK.clamp(min=1e-6)[..., None]) @ values.flatten(2).transpose(1, 2)
    return means, points_NK >= SHOWN_POINTS - ROUNDING


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
