"""Losses computed by tiles: forward and backward pass in memory linear in the batch, without a (2B, 2G) matrix.

The gradient of y-Aware InfoNCE (`y_aware_sum`) has a closed form. With the weights of an anchor's row divided by their sum,

    L_i = logsumexp_j s_ij - Σ_j w_ij s_ij         dL_i / ds_ij = p_ij - w_ij         s_ij = <z_i, z_j> / τ

It takes two passes over the tiles. The first pass accumulates the sums of each row: logsumexp (online, with a running
maximum and a running sum of exponentials), Σ w and Σ w s. The second pass computes p - w of a tile and multiplies it with
the embeddings at once. A tile holds all four pairs of views of R x C scans; its kernel is computed once, between the scans:

                    C scans, view 0    C scans, view 1
    R scans, view 0     p - w              p - w          the same w in all four quarters
    R scans, view 1     p - w              p - w

In a single process the rows are the columns, so that s_ij = s_ji and the kernel is symmetric. A tile above the diagonal is
then also used for its mirror image below (`_single_process`): in total two products of (2N, 2N, D), compared with three in
autograd's pass over the plain form. Several ranks (`_many_ranks`) need three, and keep the logits of one strip of rows
between the passes.

The gradient is computed together with the value and kept, 2(B + G) D numbers, until the backward pass. All other losses
(`sum_over_scans`) are computed in blocks of rows against all columns, each block through autograd.

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

# Number of scans per side of a tile; "auto" chooses it; None computes the plain form, without tiles.
TileSize = int | Literal["auto"] | None
# Sum of the losses of both views of the scans in a range of this rank's scans.
ScanLoss = Callable[[Pairs, range], Tensor]

# Scans per side of a tile, and bytes of the logits of a strip of rows. On a CPU with 1 MB of second-level cache per core,
# tiles of 256 to 768 scans took the same time within 9 %; 1024 took a third more.
CPU_TILE, CPU_STRIP = 384, 2**26
GPU_TILE, GPU_STRIP = 2048, 2**29
# Used instead of -inf: all entries of a row in its first tile may be masked, and inf - inf is NaN.
MASKED = -1e30
# |s| is at most 1/τ. Up to these values exp(s) and its sums neither overflow nor vanish, so no maximum is subtracted.
SAFE_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}


class Sizes(NamedTuple):
    """Numbers of scans in the rows and in the columns of a tile."""

    rows: int
    columns: int


def tile_sizes(tile: TileSize, pairs: Pairs) -> Sizes:
    """Return the given size of tiles, or, for "auto", one that fits the device's cache and memory."""
    if isinstance(tile, int):
        return Sizes(tile, tile)
    side, strip = (GPU_TILE, GPU_STRIP) if pairs.z_2BD.is_cuda else (CPU_TILE, CPU_STRIP)
    in_strip = strip // (4 * pairs.total * pairs.z_2BD.element_size())
    return Sizes(min(side, max(64, in_strip)), side)


def _check_tile(tile: TileSize) -> None:
    if tile is not None and tile != "auto" and (not isinstance(tile, int) or tile < 1):
        raise UserError(f"tile={tile!r} is not allowed; give a number of scans >= 1, 'auto', or None for no tiling")


class _SumByRows(torch.autograd.Function):
    """Sum a loss over blocks of rows. The gradient of each block is computed at once; only the gradients' sum is kept."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, temperature: Tensor, pairs: Pairs, scan_loss: ScanLoss, step: int
    ) -> Tensor:
        """Return Σ scan_loss over blocks of ``step`` scans of this rank."""
        inputs = [tensor.detach().requires_grad_() for tensor in (z_2BD, z_2GD, temperature)]
        sums = [torch.zeros_like(tensor) for tensor in inputs]
        total, scans = z_2BD.new_zeros(()), range(pairs.scans)
        local_pairs = replace(pairs, z_2BD=inputs[0], z_2GD=inputs[1], temperature=inputs[2])
        for first in scans[::step]:
            with torch.enable_grad():
                value = scan_loss(local_pairs, scans[first : first + step])
                gradients = torch.autograd.grad(value, inputs, allow_unused=True)
            total += value.detach()
            for gradient_sum, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    gradient_sum += gradient
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the gradient of the value."""
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None, None)


def sum_over_scans(pairs: Pairs, scan_loss: ScanLoss, tile: TileSize) -> Tensor:
    """Return the sum of ``scan_loss`` over this rank's scans, computed at once (tile None) or in blocks of rows.

    Raises UserError if ``tile`` is neither None, "auto" nor a number of scans of at least 1.
    """
    _check_tile(tile)
    if tile is None:
        return scan_loss(pairs, range(pairs.scans))
    temperature = torch.as_tensor(pairs.temperature, dtype=pairs.z_2BD.dtype, device=pairs.z_2BD.device)
    # Autograd keeps about eight matrices per block.
    step = tile if isinstance(tile, int) else max(1, tile_sizes(tile, pairs).rows // 8)
    total: Tensor = _SumByRows.apply(pairs.z_2BD, pairs.z_2GD, temperature, pairs, scan_loss, step)  # type: ignore[no-untyped-call]
    return total


class _Tiles:
    """The logits, the kernel and the normalised weights, tile by tile.

    The normalised weight is

        v_ij = w_ij / Σ_k w_ik      with ``by_row``
        v_ij = 2 w_ij / Σ_k w_kj    without
    """

    def __init__(self, pairs: Pairs, inverse_temperature: Tensor, by_row: bool, sizes: Sizes) -> None:
        self.pairs, self.by_row = pairs, by_row
        self.rows_2BD, self.columns_2GD = pairs.z_2BD.detach(), pairs.z_2GD.detach()
        self.scaled_2BD = self.rows_2BD * inverse_temperature
        self.cut_rows, self.cut_columns = _cut(self.rows_2BD, sizes.rows), _cut(self.columns_2GD, sizes.columns)
        self._cut_scaled = _cut(self.scaled_2BD, sizes.rows)
        # The product of the sums of two scans' views is the sum of the four products of their views. Across views only
        # two of the products are needed: those of the concatenated views, with the columns' views exchanged.
        partners = self.columns_2GD.flip(0) if pairs.cross_view else self.columns_2GD
        self._joined_rows, self._joined_columns = (
            self._join_views(z, pairs.cross_view) for z in (self.scaled_2BD, partners)
        )
        self.column_factors_G = self.columns_2GD.new_ones(pairs.total) if by_row else 2.0 / pairs.column_sums()

    @staticmethod
    def _join_views(z_2XD: Tensor, cross_view: bool) -> Tensor:
        return torch.cat([z_2XD[0], z_2XD[1]], dim=1) if cross_view else z_2XD[0] + z_2XD[1]

    def logits(self, rows: range, columns: range) -> Tensor:
        """Return the logits (2R, 2C), with MASKED for excluded pairs."""
        tile = self._cut_scaled[rows] @ self.cut_columns[columns].T
        return self.fill_excluded(tile, rows, columns, MASKED)

    def fill_excluded(self, tile: Tensor, rows: range, columns: range, value: float) -> Tensor:
        """Write ``value`` into (2R, 2C) for each anchor with itself and for other excluded pairs."""
        pairs = self.pairs
        comparable, diagonal = pairs.comparable(rows, columns), pairs.own_diagonal(rows, columns)
        if comparable is None and diagonal is None and not pairs.cross_view:
            return tile
        views = tile.view(2, len(rows), 2, len(columns))
        if comparable is not None:
            views.masked_fill_(~comparable[None, :, None], value)
        for view in (0, 1):
            if pairs.cross_view:
                views[view, :, view] = value
            elif diagonal is not None:
                views[view, :, view].diagonal(diagonal).fill_(value)
        return tile

    def kernel(self, rows: range, columns: range) -> Tensor:
        """Return the kernel (R, C) between scans."""
        return self.pairs.kernel_weights(rows, columns)

    def times_column_factors(self, kernel_RC: Tensor, columns: range) -> Tensor:
        """Return the kernel (R, C) times the factors of its columns."""
        return kernel_RC if self.by_row else kernel_RC * self.column_factors_G[columns.start : columns.stop]

    def similarities(self, rows: range, columns: range) -> Tensor:
        """Return (R, C): the sum of the logits of all pairs of views of two scans, also of a view with itself."""
        return self._joined_rows[rows.start : rows.stop] @ self._joined_columns[columns.start : columns.stop].T

    def self_terms(self) -> tuple[Tensor, Tensor]:
        """Return (B,), (B,): the weight of an anchor with itself, and the sum of the logits of both views with themselves.

        They are in the sums over pairs of scans but must not count; with ``cross_view`` they are 0.
        """
        start, scans = self.pairs.start, self.pairs.scans
        if self.pairs.cross_view:
            return (self.rows_2BD.new_zeros(scans),) * 2
        return self.column_factors_G[start : start + scans], (self.rows_2BD * self.scaled_2BD).sum(dim=(0, 2))


class _RowSums:
    """Σ_j w_ij and Σ_j w_ij s_ij of each scan of this rank (over both its views), accumulated tile by tile."""

    def __init__(self, tiles: _Tiles) -> None:
        self.tiles = tiles
        self.weights_B, self.products_B = tiles.rows_2BD.new_zeros(2, tiles.pairs.scans)

    def add(self, rows: range, weights_RC: Tensor, similarities_RC: Tensor) -> None:
        """Add a tile's weights (R, C) and similarities (R, C) to the sums of its rows."""
        self.weights_B[rows.start : rows.stop] += weights_RC.sum(dim=1)
        self.products_B[rows.start : rows.stop] += torch.linalg.vecdot(weights_RC, similarities_RC)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B,) each: the row factors, Σ_j v_ij of one view, and Σ_j v_ij s_ij of both views."""
        self_weights, self_logits = self.tiles.self_terms()
        sums = self.weights_B if self.tiles.pairs.cross_view else 2.0 * self.weights_B - self_weights
        products = self.products_B - self_weights * self_logits
        if self.tiles.by_row:
            return 1.0 / sums, torch.ones_like(sums), products / sums
        return torch.ones_like(sums), sums, products


class Gradients(NamedTuple):
    """The value Σ_i L_i and its gradients.

    Attributes:
        value: scalar.
        rows_2BD, columns_2GD: gradients with respect to rows and columns, without the factor 1/τ.
        inverse_temperature: gradient with respect to 1/τ.
    """

    value: Tensor
    rows_2BD: Tensor
    columns_2GD: Tensor
    inverse_temperature: Tensor


def _many_ranks(tiles: _Tiles) -> Gradients:
    """Compute the value and the gradients strip by strip of rows, with an online logsumexp."""
    grad_rows, grad_columns = _zeros(tiles.cut_rows), _zeros(tiles.cut_columns)
    value, sums = tiles.rows_2BD.new_zeros(()), _RowSums(tiles)
    for rows in tiles.cut_rows:
        largest = tiles.rows_2BD.new_full((2 * len(rows),), MASKED)
        running, strip = torch.zeros_like(largest), []
        for columns in tiles.cut_columns:
            logits = tiles.logits(rows, columns)
            weights = tiles.times_column_factors(tiles.kernel(rows, columns), columns)
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
            tiles.fill_excluded(p, rows, columns, 0.0)
            grad_rows[rows].addmm_(p, tiles.cut_columns[columns])
            grad_columns[columns].addmm_(p.T, tiles.cut_rows[rows])
    gradient = _join(grad_rows, tiles.rows_2BD)
    return Gradients(value, gradient, _join(grad_columns, tiles.columns_2GD), (tiles.rows_2BD * gradient).sum())


def _single_process(tiles: _Tiles) -> Gradients:
    """Compute the value and the gradients from half of the tiles. Rows must be columns, and exp(s) must not overflow."""
    ranges = list(tiles.cut_rows)
    tile_pairs = [(rows, columns) for index, rows in enumerate(ranges) for columns in ranges[index:]]
    sums, powers_2B = _RowSums(tiles), torch.zeros_like(tiles.rows_2BD[:, :, 0])
    for rows, columns in tile_pairs:
        powers, kernel = tiles.logits(rows, columns).exp_(), tiles.kernel(rows, columns)
        similarities = tiles.similarities(rows, columns)
        sums.add(rows, tiles.times_column_factors(kernel, columns), similarities)
        powers_2B[:, rows.start : rows.stop] += powers.sum(dim=1).view(2, -1)
        if rows != columns:
            sums.add(columns, tiles.times_column_factors(kernel.T, rows), similarities.T)
            powers_2B[:, columns.start : columns.stop] += powers.sum(dim=0).view(2, -1)
    factors_B, totals_B, products_B = sums.finish()
    value = (totals_B * powers_2B.log()).sum() - products_B.sum()
    # p_ij + p_ji and v_ij + v_ji are each a symmetric matrix times the sum of a factor of i and the same factor of j.
    scales_2B, cut_gradient = totals_B / powers_2B, _zeros(tiles.cut_rows)
    weight_factors_B = factors_B if tiles.by_row else tiles.column_factors_G
    for rows, columns in tile_pairs:
        p = tiles.logits(rows, columns).exp_()
        p.mul_(_outer_sum(scales_2B, rows, columns))
        _subtract(p, tiles.kernel(rows, columns).mul_(_outer_sum(weight_factors_B[None], rows, columns)))
        tiles.fill_excluded(p, rows, columns, 0.0)
        cut_gradient[rows].addmm_(p, tiles.cut_rows[columns])
        if rows != columns:
            cut_gradient[columns].addmm_(p.T, tiles.cut_rows[rows])
    gradient = _join(cut_gradient, tiles.rows_2BD)
    # Here the gradient of the rows includes that of the columns, so each pair is counted twice in the product below.
    return Gradients(value, gradient, torch.zeros_like(gradient), 0.5 * (tiles.rows_2BD * gradient).sum())


def _cut(z_2XD: Tensor, size: int) -> dict[range, Tensor]:
    """Cut embeddings into blocks of scans: range -> (2 x scans, D), both views, the operands of a tile's products."""
    scans = range(z_2XD.shape[1])
    blocks = (scans[first : first + size] for first in scans[::size])
    return {block: z_2XD[:, block.start : block.stop].reshape(2 * len(block), -1) for block in blocks}


def _zeros(cut: dict[range, Tensor]) -> dict[range, Tensor]:
    return {block: torch.zeros_like(values) for block, values in cut.items()}


def _join(cut: dict[range, Tensor], like_2XD: Tensor) -> Tensor:
    """Join blocks of `_cut` into one tensor of the shape of ``like_2XD``."""
    whole = torch.empty_like(like_2XD)
    for block, values in cut.items():
        whole[:, block.start : block.stop] = values.view(2, len(block), -1)
    return whole


def _outer_sum(values_XB: Tensor, rows: range, columns: range) -> Tensor:
    """Return (X R, X C): f_i + f_j of factors f (X, B), one per scan (X = 1) or one per view (X = 2)."""
    first, second = (values_XB[:, scans.start : scans.stop].flatten() for scans in (rows, columns))
    return first[:, None] + second[None, :]


def _subtract(p: Tensor, weights_RC: Tensor) -> None:
    """Subtract the weights of two scans from each of their four pairs of views in (2R, 2C), in place."""
    rows, columns = weights_RC.shape
    p.view(2, rows, 2, columns).sub_(weights_RC[None, :, None])


class _YAwareSum(torch.autograd.Function):
    """Σ_i Σ_j v_ij (logsumexp_i - s_ij) over this rank's anchors, with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, z_2BD: Tensor, z_2GD: Tensor, inverse_temperature: Tensor, pairs: Pairs, by_row: bool, sizes: Sizes
    ) -> Tensor:
        """Compute the value and save its gradients."""
        # The comparison is False for NaN.
        if pairs.columns_are_rows and float(inverse_temperature) <= SAFE_LOGIT[z_2BD.dtype]:
            gradients = _single_process(_Tiles(pairs, inverse_temperature, by_row, Sizes(sizes.columns, sizes.columns)))
        else:
            gradients = _many_ranks(_Tiles(pairs, inverse_temperature, by_row, sizes))
        rows, columns = gradients.rows_2BD * inverse_temperature, gradients.columns_2GD * inverse_temperature
        ctx.save_for_backward(rows, columns, gradients.inverse_temperature)
        return gradients.value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the gradient of the value."""
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None, None)


def y_aware_sum(pairs: Pairs, by_row: bool, tile: TileSize) -> Tensor:
    """Return this rank's sum of y-Aware InfoNCE over its anchors, with weights normalised by rows or by columns.

    ``pairs`` holds the embeddings (2, B, D) of this rank's rows and (2, G, D) of all ranks' columns; the result is a scalar.
    The sum by columns has the published factor 2. Raises UserError if ``tile`` is not possible.
    """
    _check_tile(tile)
    z = pairs.z_2BD
    inverse = 1.0 / torch.as_tensor(pairs.temperature, dtype=z.dtype, device=z.device)
    total: Tensor = _YAwareSum.apply(z, pairs.z_2GD, inverse, pairs, by_row, tile_sizes(tile, pairs))  # type: ignore[no-untyped-call]
    return total
