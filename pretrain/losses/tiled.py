"""The losses by tiles: forward and backward in memory linear in the batch, with no (2B, 2G) matrix kept.

y-Aware InfoNCE (`y_aware_sum`) has a closed form. With the weights of an anchor's row divided by their sum,

    L_i = logsumexp_j s_ij - Σ_j w_ij s_ij         dL_i / ds_ij = p_ij - w_ij         s_ij = <z_i, z_j> / τ

and goes twice over the tiles. The first pass gathers each row's sums: logsumexp (online: tile after tile updates a
running maximum and a running sum of exp), Σ w, Σ w s. The second forms p - w of a tile and multiplies it onto the
embeddings at once. A tile is all four pairs of views of R x C scans; its kernel is computed once, between the scans.

One process compares everything with itself, so s_ij = s_ji and w's kernel is symmetric: a tile above the diagonal
serves for the one below (`_one_process`): two products of (2N, 2N, D) in all, where autograd on the plain form
takes three. Many ranks (`_many_ranks`) take three, keeping the logits of one strip of rows between the passes.

The gradient is formed together with the value, in one call, and kept (2(B + G) D values) until backward asks for it.
Every other loss (`sum_over_scans`) goes by blocks of rows against all columns, each through autograd on its own.

B = scans of this rank, G = scans of all ranks, D = embedding size, R x C = scans of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.losses.pairs import Pairs

# Scans of a tile, or None for the plain form.
TileSize = int | Literal["auto"] | None
# Sum of the losses of these scans of this rank, both views.
Piece = Callable[[Pairs, range], Tensor]

# Scans of a tile, and bytes of the logits of a strip of rows. On a CPU with 1 MB of second-level cache a core, tiles
# of 256 to 768 scans took the same time within 9 %; 1024 took a third more.
CPU_TILE, CPU_STRIP = 384, 2**26
GPU_TILE, GPU_STRIP = 2048, 2**29
# Takes the place of -inf: a row's first tile may hold nothing else, and inf - inf is NaN.
MASKED = -1e30
# No |s| exceeds 1/τ. Up to these, exp(s) and its sums neither overflow nor vanish, and no maximum is needed.
SAFE_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}


class Sizes(NamedTuple):
    """Scans of a tile: rows, columns."""

    rows: int
    columns: int


def tile_sizes(tile: TileSize, pairs: Pairs) -> Sizes:
    """The tiles to use: as given, or such that a tile suits the device and a strip of rows its memory."""
    if isinstance(tile, int):
        return Sizes(tile, tile)
    side, strip = (GPU_TILE, GPU_STRIP) if pairs.z_2BD.is_cuda else (CPU_TILE, CPU_STRIP)
    in_strip = strip // (4 * pairs.total * pairs.z_2BD.element_size())
    return Sizes(min(side, max(64, in_strip)), side)


def _check_tile(tile: TileSize) -> None:
    if tile is not None and tile != "auto" and (not isinstance(tile, int) or tile < 1):
        raise UserError(f"tile={tile!r} is not allowed; give a number of scans >= 1, 'auto', or None for no tiling")


class _SumByRows(torch.autograd.Function):
    """Sum a loss over blocks of rows, forming each block's gradient at once and keeping only the gradients' sum."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, temperature: Tensor, pairs: Pairs, piece: Piece, step: int
    ) -> Tensor:
        inputs = [tensor.detach().requires_grad_() for tensor in (z_2BD, z_2GD, temperature)]
        sums = [torch.zeros_like(tensor) for tensor in inputs]
        total, scans = z_2BD.new_zeros(()), range(pairs.scans)
        part = replace(pairs, z_2BD=inputs[0], z_2GD=inputs[1], temperature=inputs[2])
        for first in scans[::step]:
            with torch.enable_grad():
                value = piece(part, scans[first : first + step])
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
    _check_tile(tile)
    if tile is None:
        return piece(pairs, range(pairs.scans))
    temperature = torch.as_tensor(pairs.temperature, dtype=pairs.z_2BD.dtype, device=pairs.z_2BD.device)
    # Autograd keeps about eight matrices of a block.
    step = tile if isinstance(tile, int) else max(1, tile_sizes(tile, pairs).rows // 8)
    total: Tensor = _SumByRows.apply(pairs.z_2BD, pairs.z_2GD, temperature, pairs, piece, step)  # type: ignore[no-untyped-call]
    return total


class _Tiles:
    """The logits and the kernel, tile by tile, and the shares of the weights in a row's loss.

    share_ij is w_ij times a factor of its row, 1 / Σ_k w_ik, or of its column, 2 / Σ_k w_kj; the other factor is 1.
    """

    def __init__(self, pairs: Pairs, inverse_temperature: Tensor, by_row: bool, sizes: Sizes) -> None:
        self.pairs, self.by_row = pairs, by_row
        self.rows_2BD, self.columns_2GD = pairs.z_2BD.detach(), pairs.z_2GD.detach()
        self.scaled_2BD = self.rows_2BD * inverse_temperature
        self.cut_rows, self.cut_columns = _cut(self.rows_2BD, sizes.rows), _cut(self.columns_2GD, sizes.columns)
        self._cut_scaled = _cut(self.scaled_2BD, sizes.rows)
        # <sum of a scan's views, sum of another's> is the sum of their four products; across views, two of them.
        facing = self.columns_2GD.flip(0) if pairs.cross_view else self.columns_2GD
        self._near, self._far = (self._joined(z, pairs.cross_view) for z in (self.scaled_2BD, facing))
        self.column_factors_G = self.columns_2GD.new_ones(pairs.total) if by_row else 2.0 / pairs.column_sums()

    @staticmethod
    def _joined(z_2XD: Tensor, cross_view: bool) -> Tensor:
        return torch.cat([z_2XD[0], z_2XD[1]], dim=1) if cross_view else z_2XD[0] + z_2XD[1]

    def logits(self, rows: range, columns: range) -> Tensor:
        """(2R, 2C), with MASKED where a pair is left out."""
        tile = self._cut_scaled[rows] @ self.cut_columns[columns].T
        return self.leave_out(tile, rows, columns, MASKED)

    def leave_out(self, tile: Tensor, rows: range, columns: range, value: float) -> Tensor:
        """Write ``value`` in (2R, 2C) where the anchor meets itself or a pair is left out."""
        pairs = self.pairs
        related, diagonal = pairs.related(rows, columns), pairs.crossing(rows, columns)
        if related is None and diagonal is None and not pairs.cross_view:
            return tile
        views = tile.view(2, len(rows), 2, len(columns))
        if related is not None:
            views.masked_fill_(~related[None, :, None], value)
        for view in (0, 1):
            if pairs.cross_view:
                views[view, :, view] = value
            elif diagonal is not None:
                views[view, :, view].diagonal(diagonal).fill_(value)
        return tile

    def kernel(self, rows: range, columns: range) -> Tensor:
        """(R, C): w between scans."""
        return self.pairs.kernel_weights(rows, columns)

    def by_columns(self, kernel_RC: Tensor, columns: range) -> Tensor:
        """(R, C): w times its column's factor."""
        return kernel_RC if self.by_row else kernel_RC * self.column_factors_G[columns.start : columns.stop]

    def similarities(self, rows: range, columns: range) -> Tensor:
        """(R, C): the sum of the logits of the pairs of views of two scans, a scan's with itself included."""
        return self._near[rows.start : rows.stop] @ self._far[columns.start : columns.stop].T

    def own(self) -> tuple[Tensor, Tensor]:
        """(B,), (B,): an anchor's weight with itself, and the sum of both views' logits with themselves: not its own."""
        start, scans = self.pairs.start, self.pairs.scans
        if self.pairs.cross_view:
            return (self.rows_2BD.new_zeros(scans),) * 2
        return self.column_factors_G[start : start + scans], (self.rows_2BD * self.scaled_2BD).sum(dim=(0, 2))


class _RowSums:
    """Σ_j w_ij and Σ_j w_ij s_ij of each scan of this rank (both its views), gathered tile by tile."""

    def __init__(self, tiles: _Tiles) -> None:
        self.tiles = tiles
        self.weights_B, self.products_B = tiles.rows_2BD.new_zeros(2, tiles.pairs.scans)

    def add(self, rows: range, weights_RC: Tensor, similarities_RC: Tensor) -> None:
        self.weights_B[rows.start : rows.stop] += weights_RC.sum(dim=1)
        self.products_B[rows.start : rows.stop] += torch.linalg.vecdot(weights_RC, similarities_RC)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: factors of a row's shares, Σ_j share_ij of a view, and Σ_j share_ij s_ij of both views."""
        own, own_products = self.tiles.own()
        sums = self.weights_B if self.tiles.pairs.cross_view else 2.0 * self.weights_B - own
        products = self.products_B - own * own_products
        if self.tiles.by_row:
            return 1.0 / sums, torch.ones_like(sums), products / sums
        return torch.ones_like(sums), sums, products


class Gradients(NamedTuple):
    """The value Σ_i L_i, and its gradient in the rows, in the columns (both but for 1/τ), and in 1/τ."""

    value: Tensor
    rows_2BD: Tensor
    columns_2GD: Tensor
    inverse_temperature: Tensor


def _many_ranks(tiles: _Tiles) -> Gradients:
    grad_rows, grad_columns = _zeros(tiles.cut_rows), _zeros(tiles.cut_columns)
    value, sums = tiles.rows_2BD.new_zeros(()), _RowSums(tiles)
    for rows in tiles.cut_rows:
        largest = tiles.rows_2BD.new_full((2 * len(rows),), MASKED)
        running, strip = torch.zeros_like(largest), []
        for columns in tiles.cut_columns:
            logits = tiles.logits(rows, columns)
            weights = tiles.by_columns(tiles.kernel(rows, columns), columns)
            sums.add(rows, weights, tiles.similarities(rows, columns))
            before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
            running = running * torch.exp(before - largest) + torch.exp(logits - largest[:, None]).sum(dim=1)
            strip.append((columns, logits, weights))
        factors, totals, products = (sum_B[rows.start : rows.stop] for sum_B in sums.finish())
        log_sums, totals = largest + running.log(), totals.repeat(2)
        value += (totals * log_sums).sum() - products.sum()
        for columns, logits, weights in strip:
            p = logits.sub_(log_sums[:, None]).exp_().mul_(totals[:, None])
            _subtract(p, weights * factors[:, None])
            tiles.leave_out(p, rows, columns, 0.0)
            grad_rows[rows].addmm_(p, tiles.cut_columns[columns])
            grad_columns[columns].addmm_(p.T, tiles.cut_rows[rows])
    gradient = _join(grad_rows, tiles.rows_2BD)
    return Gradients(value, gradient, _join(grad_columns, tiles.columns_2GD), (tiles.rows_2BD * gradient).sum())


def _one_process(tiles: _Tiles) -> Gradients:
    """Rows are columns, and exp(s) is safe: half the tiles do, see the head."""
    ranges = list(tiles.cut_rows)
    tile_pairs = [(rows, columns) for index, rows in enumerate(ranges) for columns in ranges[index:]]
    sums, powers_2B = _RowSums(tiles), torch.zeros_like(tiles.rows_2BD[:, :, 0])
    for rows, columns in tile_pairs:
        powers, kernel = tiles.logits(rows, columns).exp_(), tiles.kernel(rows, columns)
        similarities = tiles.similarities(rows, columns)
        sums.add(rows, tiles.by_columns(kernel, columns), similarities)
        powers_2B[:, rows.start : rows.stop] += powers.sum(dim=1).view(2, -1)
        if rows != columns:
            sums.add(columns, tiles.by_columns(kernel.T, rows), similarities.T)
            powers_2B[:, columns.start : columns.stop] += powers.sum(dim=0).view(2, -1)
    factors_B, totals_B, products_B = sums.finish()
    value = (totals_B * powers_2B.log()).sum() - products_B.sum()
    # p_ij + p_ji and share_ij + share_ji: each is one symmetric matrix times the sum of a factor of i and one of j.
    scales_2B, cut_gradient = totals_B / powers_2B, _zeros(tiles.cut_rows)
    either_B = factors_B if tiles.by_row else tiles.column_factors_G
    for rows, columns in tile_pairs:
        p = tiles.logits(rows, columns).exp_()
        p.mul_(_outer_sum(scales_2B, rows, columns))
        _subtract(p, tiles.kernel(rows, columns).mul_(_outer_sum(either_B[None], rows, columns)))
        tiles.leave_out(p, rows, columns, 0.0)
        cut_gradient[rows].addmm_(p, tiles.cut_rows[columns])
        if rows != columns:
            cut_gradient[columns].addmm_(p.T, tiles.cut_rows[rows])
    gradient = _join(cut_gradient, tiles.rows_2BD)
    # Every pair pulls on both its ends here.
    return Gradients(value, gradient, torch.zeros_like(gradient), 0.5 * (tiles.rows_2BD * gradient).sum())


def _cut(z_2XD: Tensor, size: int) -> dict[range, Tensor]:
    """Scans -> (2 scans, D), both views: the operands of a tile's products, cut out once."""
    scans = range(z_2XD.shape[1])
    parts = (scans[first : first + size] for first in scans[::size])
    return {part: z_2XD[:, part.start : part.stop].reshape(2 * len(part), -1) for part in parts}


def _zeros(cut: dict[range, Tensor]) -> dict[range, Tensor]:
    return {part: torch.zeros_like(values) for part, values in cut.items()}


def _join(cut: dict[range, Tensor], like_2XD: Tensor) -> Tensor:
    whole = torch.empty_like(like_2XD)
    for part, values in cut.items():
        whole[:, part.start : part.stop] = values.view(2, len(part), -1)
    return whole


def _outer_sum(values_XB: Tensor, rows: range, columns: range) -> Tensor:
    """(X R, X C): v_i + v_j, of one view (X = 1) or both."""
    first, second = (values_XB[:, part.start : part.stop].flatten() for part in (rows, columns))
    return first[:, None] + second[None, :]


def _subtract(p: Tensor, shares_RC: Tensor) -> None:
    """Subtract the scans' shares from each of the four pairs of views in (2R, 2C)."""
    rows, columns = shares_RC.shape
    p.view(2, rows, 2, columns).sub_(shares_RC[None, :, None])


class _YAwareSum(torch.autograd.Function):
    """Σ_i Σ_j share_ij (logsumexp_i - s_ij) over this rank's anchors, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, inverse_temperature: Tensor, pairs: Pairs, by_row: bool, sizes: Sizes
    ) -> Tensor:
        # Not more than SAFE_LOGIT, and NaN neither.
        if pairs.alone and float(inverse_temperature) <= SAFE_LOGIT[z_2BD.dtype]:
            found = _one_process(_Tiles(pairs, inverse_temperature, by_row, Sizes(sizes.columns, sizes.columns)))
        else:
            found = _many_ranks(_Tiles(pairs, inverse_temperature, by_row, sizes))
        rows, columns = found.rows_2BD * inverse_temperature, found.columns_2GD * inverse_temperature
        ctx.save_for_backward(rows, columns, found.inverse_temperature)
        return found.value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * kept for kept in ctx.saved_tensors), None, None, None)


def y_aware_sum(pairs: Pairs, by_row: bool, tile: TileSize) -> Tensor:
    """This rank's sum over anchors of y-Aware InfoNCE, shares by rows or (twice, as published) by columns."""
    _check_tile(tile)
    z = pairs.z_2BD
    inverse = 1.0 / torch.as_tensor(pairs.temperature, dtype=z.dtype, device=z.device)
    total: Tensor = _YAwareSum.apply(z, pairs.z_2GD, inverse, pairs, by_row, tile_sizes(tile, pairs))  # type: ignore[no-untyped-call]
    return total
