"""The losses by tiles: forward and backward in memory linear in the batch, with no (2B, 2G) matrix kept.

y-Aware InfoNCE (`y_aware_sum`) has a closed form. With the weights of an anchor's row divided by their sum,

    L_i = logsumexp_j s_ij - Σ_j w_ij s_ij         dL_i / ds_ij = p_ij - w_ij         s_ij = <z_i, z_j> / τ

and both halves go by tiles:
- p: tile after tile of columns updates the running maximum and the running sum of exp of each row (online logsumexp);
  a second pass forms p_ij = exp(s_ij - logsumexp_i) tile by tile and multiplies it onto the embeddings at once.
  One process compares everything with itself, s_ij = s_ji, so half the tiles serve rows and columns alike: two
  products of (2N, 2N, D) in all, where autograd on the plain form takes three.
- w: Σ_j w_ij z_j and its transpose need the kernel between *scans*, (B, G), not between views (2B, 2G), and no
  similarity at all.
The gradient is formed together with the value, in one call, and kept (2(B + G) D values) until backward asks for it.

Every other loss (`sum_by_rows`) goes by blocks of rows against all columns, each through autograd on its own.

B = scans of this rank, G = scans of all ranks, D = embedding size, T = scans of a tile, u, v = views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.pairs import Pairs

# Scans of a tile, or None for the plain form.
TileSize = int | Literal["auto"] | None
# Sum of the losses of this rank's scans [first, last), both views.
Piece = Callable[[Pairs, int, int], Tensor]

# A tile of 1024 x 1024 floats (4 MB) was as fast as any on a CPU with 32 MB of cache, and 512 or 2048 within 5 %.
CPU_TILE = 1024
GPU_TILE = 8192
# Logits of a strip of rows are kept between the two passes up to this size, and computed twice beyond it.
STRIP_BYTES = 128 * 2**20
# Takes the place of -inf: a row's first tiles may hold nothing else, and inf - inf is NaN.
MASKED = -1e30


def check_tile(tile: TileSize) -> None:
    """Refuse a tile size that is neither a positive number, "auto" nor None."""
    if tile is not None and tile != "auto" and (not isinstance(tile, int) or tile < 1):
        raise UserError(f"tile={tile!r} is not allowed; give a number of scans >= 1, 'auto', or None for no tiling")


def _tile_scans(tile: TileSize, z: Tensor) -> int:
    if isinstance(tile, int):
        return tile
    return GPU_TILE if z.is_cuda else CPU_TILE


def _row_scans(tile: TileSize, pairs: Pairs) -> int:
    """Scans per block of rows against all columns: 2R x 2G values of a strip, at least one scan."""
    if isinstance(tile, int):
        return tile
    return max(1, STRIP_BYTES // (8 * 4 * pairs.total * pairs.z_2BD.element_size()))


class _SumByRows(torch.autograd.Function):
    """Sum a loss over blocks of rows, forming each block's gradient at once and keeping only the gradients' sum."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, temperature: Tensor, pairs: Pairs, piece: Piece, rows: int
    ) -> Tensor:
        inputs = [tensor.detach().requires_grad_() for tensor in (z_2BD, z_2GD, temperature)]
        sums = [torch.zeros_like(tensor) for tensor in inputs]
        total = z_2BD.new_zeros(())
        part = replace(pairs, z_2BD=inputs[0], z_2GD=inputs[1], temperature=inputs[2])
        for first in range(0, pairs.scans, rows):
            with torch.enable_grad():
                value = piece(part, first, min(pairs.scans, first + rows))
                gradients = torch.autograd.grad(value, inputs, allow_unused=True)
            total += value.detach()
            for whole, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    whole += gradient
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * kept for kept in ctx.saved_tensors), None, None, None)


def sum_over_scans(pairs: Pairs, piece: Piece, tile: TileSize) -> Tensor:
    """The sum of ``piece`` over this rank's scans, at once (tile None) or by blocks of rows."""
    check_tile(tile)
    if tile is None:
        return piece(pairs, 0, pairs.scans)
    temperature = torch.as_tensor(pairs.temperature, dtype=pairs.z_2BD.dtype, device=pairs.z_2BD.device)
    rows = _row_scans(tile, pairs)
    total: Tensor = _SumByRows.apply(pairs.z_2BD, pairs.z_2GD, temperature, pairs, piece, rows)  # type: ignore[no-untyped-call]
    return total


class _Range(NamedTuple):
    """Scans [first, last) of a view."""

    view: int
    first: int
    last: int


def _ranges(scans: int, tile: int) -> list[_Range]:
    return [_Range(view, first, min(scans, first + tile)) for view in (0, 1) for first in range(0, scans, tile)]


class _Tiles:
    """Tiles of the logits of this rank's rows against all columns, with what is left out set to MASKED."""

    def __init__(self, pairs: Pairs, rows_2BD: Tensor, columns_2GD: Tensor, inverse_temperature: Tensor) -> None:
        self.pairs = pairs
        self.rows_2BD, self.columns_2GD = rows_2BD, columns_2GD
        self.scaled_2BD = rows_2BD * inverse_temperature

    def columns_of(self, row: _Range, columns: list[_Range]) -> Iterator[_Range]:
        """The column tiles that a row tile meets."""
        return (column for column in columns if not (self.pairs.cross_view and column.view == row.view))

    def logits(self, row: _Range, column: _Range) -> Tensor:
        """(rows, columns) of the two ranges, a fresh tensor."""
        pairs = self.pairs
        columns_CD = self.columns_2GD[column.view, column.first : column.last]
        tile = self.scaled_2BD[row.view, row.first : row.last] @ columns_CD.T
        # Row b and column start + b are one scan: the tile's diagonal with this offset, where it crosses the tile.
        offset = pairs.start + row.first - column.first
        crosses = -tile.shape[0] < offset < tile.shape[1]
        if pairs.subjects_B is not None and pairs.subjects_G is not None:
            subjects_R, subjects_C = (
                pairs.subjects_B[row.first : row.last],
                pairs.subjects_G[column.first : column.last],
            )
            left_out = subjects_R[:, None] == subjects_C[None, :]
            if crosses:
                left_out.diagonal(offset).fill_(False)
            tile.masked_fill_(left_out, MASKED)
        if crosses and row.view == column.view:
            tile.diagonal(offset).fill_(MASKED)
        return tile


class _LogSums:
    """Online logsumexp of rows: running maximum, and running sum of exp(logit - maximum)."""

    def __init__(self, like_2BD: Tensor) -> None:
        self.largest_2B = like_2BD.new_full(like_2BD.shape[:2], MASKED)
        self.sum_2B = like_2BD.new_zeros(like_2BD.shape[:2])

    def add(self, row: _Range, logits: Tensor) -> None:
        """Take in a tile (rows of the range, any columns)."""
        place = row.view, slice(row.first, row.last)
        before = self.largest_2B[place]
        largest = torch.maximum(before, logits.amax(dim=1))
        added = torch.exp(logits - largest[:, None]).sum(dim=1)
        self.sum_2B[place] = self.sum_2B[place] * torch.exp(before - largest) + added
        self.largest_2B[place] = largest

    def result(self) -> Tensor:
        """(2, B)"""
        return self.largest_2B + self.sum_2B.log()


def _softmax_half(tiles: _Tiles, tile: int, factors_2B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp (2, B), and the gradients of Σ_i f_i logsumexp_i in the rows and the columns, but for 1/τ."""
    pairs = tiles.pairs
    rows, columns = _ranges(pairs.scans, tile), _ranges(pairs.total, tile)
    sums = _LogSums(tiles.rows_2BD)
    grad_rows, grad_columns = torch.zeros_like(tiles.rows_2BD), torch.zeros_like(tiles.columns_2GD)
    log_sums = sums.largest_2B
    keep_strip = 2 * pairs.total * tile * tiles.rows_2BD.element_size() <= STRIP_BYTES
    for row in rows:
        place = row.view, slice(row.first, row.last)
        strip = {}
        for column in tiles.columns_of(row, columns):
            logits = tiles.logits(row, column)
            sums.add(row, logits)
            if keep_strip:
                strip[column] = logits
        log_sums = sums.result()
        for column in tiles.columns_of(row, columns):
            logits = strip.pop(column) if keep_strip else tiles.logits(row, column)
            p = logits.sub_(log_sums[place][:, None]).exp_().mul_(factors_2B[place][:, None])
            there = column.view, slice(column.first, column.last)
            grad_rows[place].addmm_(p, tiles.columns_2GD[there])
            grad_columns[there].addmm_(p.T, tiles.rows_2BD[place])
    return log_sums, grad_rows, grad_columns


def _softmax_half_alone(tiles: _Tiles, tile: int, factors_2B: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one process, whose columns are its rows: logsumexp (2, B) and the whole gradient (2, B, D).

    s_ij = s_ji, so a tile below the diagonal is the transpose of one above it and is never formed.
    """
    ranges = _ranges(tiles.pairs.scans, tile)
    tile_pairs = [(row, column) for index, row in enumerate(ranges) for column in tiles.columns_of(row, ranges[index:])]
    sums = _LogSums(tiles.rows_2BD)
    for row, column in tile_pairs:
        logits = tiles.logits(row, column)
        sums.add(row, logits)
        if row != column:
            sums.add(column, logits.T)
    log_sums = sums.result()
    gradient = torch.zeros_like(tiles.rows_2BD)
    for row, column in tile_pairs:
        place, there = (row.view, slice(row.first, row.last)), (column.view, slice(column.first, column.last))
        logits = tiles.logits(row, column)
        p = (logits - log_sums[place][:, None]).exp_().mul_(factors_2B[place][:, None])
        p += (logits.sub_(log_sums[there][None, :])).exp_().mul_(factors_2B[there][None, :])
        gradient[place].addmm_(p, tiles.rows_2BD[there])
        if row != column:
            gradient[there].addmm_(p.T, tiles.rows_2BD[place])
    return log_sums, gradient


class _WeightHalf(NamedTuple):
    """With shares w_ij (each row's weights over their sum, or twice the weights over their columns' sums):

    ``attracted`` (2, B, D): Σ_j w_ij z_j. ``attracting`` (2, G, D): Σ_i w_ij z_i. ``factors`` (2, B): Σ_j w_ij.
    """

    attracted_2BD: Tensor
    attracting_2GD: Tensor
    factors_2B: Tensor


def _weight_half(pairs: Pairs, rows_2BD: Tensor, columns_2GD: Tensor, by_row: bool, step: int) -> _WeightHalf:
    """By strips of the scans' kernel (step, G): a view's weights are its scan's, but for itself.

    Where all views are compared, Σ_j w_ij z_j over both views of all scans counts the anchor itself (weight 1, the
    scan's own) once too often. Where only the other view's columns are, it is plainly that view's sum.
    """
    attracted, attracting = torch.zeros_like(rows_2BD), torch.zeros_like(columns_2GD)
    factors = rows_2BD.new_ones(rows_2BD.shape[:2])
    columns_G = None if by_row else 2.0 / pairs.column_sums()
    # (views of the columns, G, D): the sum over both views, or each by itself, the other view's first.
    facing = columns_2GD.flip(0) if pairs.cross_view else columns_2GD.sum(dim=0, keepdim=True)
    for first in range(0, pairs.scans, step):
        rows = slice(first, min(pairs.scans, first + step))
        weights = pairs.kernel_weights(rows.start, rows.stop)
        if columns_G is not None:
            weights *= columns_G
        own = weights[pairs.own(rows.start, rows.stop)]
        scale = weights.sum(dim=1) if pairs.cross_view else 2.0 * weights.sum(dim=1) - own
        pulled = torch.stack([weights @ view for view in facing]).expand(2, -1, -1)
        if not pairs.cross_view:
            pulled = pulled - own[:, None] * rows_2BD[:, rows]
        if by_row:
            pulled, own, sources = pulled / scale[:, None], own / scale, rows_2BD[:, rows] / scale[:, None]
        else:
            factors[:, rows], sources = scale, rows_2BD[:, rows]
        attracted[:, rows] = pulled
        pulling = sources.flip(0) if pairs.cross_view else sources.sum(dim=0, keepdim=True)
        attracting += torch.stack([weights.T @ view for view in pulling])
        if not pairs.cross_view:
            columns = slice(pairs.start + rows.start, pairs.start + rows.stop)
            attracting[:, columns] -= own[:, None] * rows_2BD[:, rows]
    return _WeightHalf(attracted, attracting, factors)


class _YAwareSum(torch.autograd.Function):
    """Σ_i Σ_j w_ij (logsumexp_i - s_ij) over this rank's anchors, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, inverse_temperature: Tensor, pairs: Pairs, by_row: bool, tile: int
    ) -> Tensor:
        step = max(1, min(tile, STRIP_BYTES // (8 * pairs.total * z_2BD.element_size())))
        half = _weight_half(pairs, z_2BD, z_2GD, by_row, step)
        tiles = _Tiles(pairs, z_2BD, z_2GD, inverse_temperature)
        if pairs.alone:
            log_sums, repelled = _softmax_half_alone(tiles, tile, half.factors_2B)
            grad_rows, grad_columns = repelled - half.attracted_2BD, -half.attracting_2GD
            # Here every pair's pull on both its ends is in ``repelled``: half of it is Σ_ij p_ij <z_i, z_j>.
            in_temperature = 0.5 * (z_2BD * repelled).sum() - (z_2BD * half.attracted_2BD).sum()
        else:
            log_sums, repelled, grad_columns = _softmax_half(tiles, tile, half.factors_2B)
            grad_rows, grad_columns = repelled - half.attracted_2BD, grad_columns - half.attracting_2GD
            in_temperature = (z_2BD * grad_rows).sum()
        ctx.save_for_backward(grad_rows * inverse_temperature, grad_columns * inverse_temperature, in_temperature)
        similarity = (z_2BD * half.attracted_2BD).sum(dim=2) * inverse_temperature
        return (half.factors_2B * log_sums - similarity).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * kept for kept in ctx.saved_tensors), None, None, None)


def y_aware_sum(pairs: Pairs, by_row: bool, tile: TileSize) -> Tensor:
    """This rank's sum over anchors of y-Aware InfoNCE, normalised by rows or (x 2) by columns; see the head."""
    check_tile(tile)
    z = pairs.z_2BD
    inverse = 1.0 / torch.as_tensor(pairs.temperature, dtype=z.dtype, device=z.device)
    size = _tile_scans(tile, z)
    total: Tensor = _YAwareSum.apply(z, pairs.z_2GD, inverse, pairs, by_row, size)  # type: ignore[no-untyped-call]
    return total
