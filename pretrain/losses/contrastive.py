"""Contrastive losses with proxies. Each loss is one function; `LOSSES` lists them by name.

Every loss takes ``views`` (2, B, D), the embeddings of two views of this rank's B scans, unnormalised and of any floating
type, and ``proxies`` (B, P), NaN if missing. It returns a scalar. Similarities are computed in float32 (float64 for
float64 views) between L2-normalised embeddings.

With a ``gather`` (`pretrain.losses.gather.AllGather`), the rows are the 2B anchors of this rank and the columns are the 2G
views of all ranks. The scalar is then this rank's contribution, scaled such that

- the *mean over the ranks* of the scalars is the loss of a single process with the whole batch (see `global_loss`), and
- the *mean over the ranks* of the gradients, which data parallelism (DDP, DeepSpeed ZeRO 0 to 3) computes, is exactly the
  gradient of that process for every parameter, also if the ranks hold different numbers of scans.

No further factor is needed. If all ranks hold the same number of scans, the scalar is the mean over this rank's anchors.

The value is finite in all these cases: a zero vector has similarity 0 to everything and gets no gradient; identical
embeddings give log(2G - 1); a single scan gives 0; a scan with a missing proxy, or without a related scan, has its own
other view as its only positive. Embeddings with NaN give NaN.

B = scans of this rank, G = N = scans of all ranks, D = embedding size, P = proxies, W = ranks, τ = temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel, cauchy
from pretrain.losses.gather import Gather, SingleProcess
from pretrain.losses.pairs import Block, Pairs, full_precision, gather_pairs
from pretrain.losses.tiled import TileSize, sum_over_scans, y_aware_sum

Normalization = Literal["row", "column"]


def global_loss(loss: Tensor, gather: Gather | None = None) -> Tensor:
    """Return the loss of the whole batch, for logging: the mean of the ranks' scalars, detached. Collective."""
    ranks = gather or SingleProcess()
    return ranks.sum(loss) / ranks.world_size


@full_precision
def y_aware_infonce(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 0.1,
    normalization: Normalization = "row",
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    sites: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """y-Aware InfoNCE (Dufumier et al., MICCAI 2021, Eq. 3 of arXiv:2106.08808).

        p(j|i) = exp(<z_i, z_j>/τ) / Σ_{k≠i} exp(<z_i, z_k>/τ)
        L      = -(1/2N) Σ_i Σ_{j≠i} [ w_ij / Σ_{k≠i} w_ik ] log p(j|i)

    i, j and k run over the 2N views. w_ij is the kernel between the proxies of the two scans, and 1 for the two views of
    one scan. With three scans a, b, c the weights w_ij are (k_ab the kernel between a and b; - the anchor itself):

                 a1     b1     c1     a2     b2     c2
        a1       -      k_ab   k_ac   1      k_ab   k_ac
        b1       k_ab   -      k_bc   k_ab   1      k_bc
        c1       k_ac   k_bc   -      k_ac   k_bc   1
        a2       1      k_ab   k_ac   -      k_ab   k_ac
        b2       k_ab   1      k_bc   k_ab   -      k_bc
        c2       k_ac   k_bc   1      k_ac   k_bc   -

    A kernel of bandwidth 0 gives NT-Xent (SimCLR, arXiv:2002.05709); the kernel "same" gives SupCon (arXiv:2004.11362,
    L_out).

    Args:
        views: (2, B, D) embeddings.
        proxies: (B, P), NaN if missing.
        kernel: (A, P), (B, P) -> (A, B), see `pretrain.kernels.KERNELS`.
        temperature: τ > 0; a tensor for a learned one (`pretrain.losses.temperature`).
        normalization: "row" is the formula above. "column" is the formula of the authors' published code,
            -(1/N) Σ_i Σ_{j≠i} [ w_ij / Σ_{k≠j} w_kj ] log p(j|i). It divides the weights by the sums of their columns, so
            that scans with common proxies count more, and it divides the total by N instead of 2N, so that the value is
            about twice as large.
        gather: how to reach the other ranks; None is a single process.
        subjects: (B,) integers; two scans of one subject are neither positives nor negatives of each other. None: all
            scans are compared.
        sites: (B,) integers; two scans of different sites are not compared. None: all scans are.
        cross_view: compare an anchor only with the other kind of view, for positives and negatives alike.
        tile: None keeps the (2B, 2G) matrices in memory, which suits small batches. "auto", or a number of scans, computes
            the same value by tiles in memory linear in the batch, see `pretrain.losses.tiled`.

    Returns:
        This rank's contribution, a scalar; see the head of this module.

    Raises:
        UserError: if an argument has a wrong shape, type or value.
    """
    if normalization not in ("row", "column"):
        raise UserError(
            f"normalization={normalization!r} is not allowed; give 'row' (the paper) or 'column' (its code)"
        )
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, sites=sites,
        cross_view=cross_view,
    )  # fmt: skip
    by_row = normalization == "row"
    if tile is not None:
        return y_aware_sum(pairs, by_row, tile) * pairs.anchor_factor
    # Both views of a scan have the same column sum. The factor 2 turns the mean over 2N anchors into a division by N.
    factors = None if by_row else (2.0 / pairs.column_sums()).repeat(2)
    return _mean_over_anchors(pairs, lambda block: _y_aware_rows(block, factors), None)


def _y_aware_rows(block: Block, column_factors: Tensor | None) -> Tensor:
    """Return (2R,): -Σ_j v_ij log p(j|i), with v the normalised weights."""
    normalised = _divided_by_row(block.weights) if column_factors is None else block.weights * column_factors
    return normalised.sum(dim=1) * _log_sum(block) - (normalised * block.logits).sum(dim=1)


def _divided_by_row(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=1, keepdim=True)


@full_precision
def threshold_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    sites: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Contrastive regression, "threshold" weighting (Barbano et al., ISBI 2023, arXiv:2211.08326).

        L = -(1/2N) Σ_i Σ_{k≠i} [ w_ik / Σ_{t≠i} w_it ] log( exp(s_ik) / Σ_{t≠i: w_it < w_ik} exp(s_it) )

    with s_ij = <z_i, z_j>/τ. The denominator of a positive k contains only the views that are less related to the anchor
    than k. A positive without such views has no term. The authors' public code uses one denominator for all positives, in
    which t is counted once per positive that is more related; here each positive has its own, as in the formula.

    Arguments, result and errors as in `y_aware_infonce`. Each row is sorted: O(B G log G) time.
    """
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, sites=sites,
        cross_view=cross_view,
    )  # fmt: skip
    return _mean_over_anchors(pairs, _threshold_rows, tile)


def _threshold_rows(block: Block) -> Tensor:
    return _ranked_rows(block, _divided_by_row(block.weights), ties=False)


@full_precision
def exp_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    sites: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Contrastive regression, "exp" weighting (Barbano et al., ISBI 2023, arXiv:2211.08326; arXiv:2507.01794).

        L = -(1/2N) Σ_i Σ_{k≠i} [ w_ik / Σ_{t≠i} w_it ] log( exp(s_ik) / Σ_{t≠i} exp(s_it (1 - w_it)) )

    with s_ij = <z_i, z_j>/τ: the more related two scans are, the weaker is their repulsion. The sum runs over every t ≠ i,
    as in the authors' public code. That code also subtracts the maximum of each row from s before weighting; this changes
    the value and is not done here. Arguments, result and errors as in `y_aware_infonce`.
    """
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, sites=sites,
        cross_view=cross_view,
    )  # fmt: skip
    return _mean_over_anchors(pairs, _exp_rows, tile)


def _exp_rows(block: Block) -> Tensor:
    repulsion = _log_sum(block._replace(logits=block.logits * (1.0 - block.weights)))
    return repulsion - (_divided_by_row(block.weights) * block.logits).sum(dim=1)


@full_precision
def rank_n_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel | None = None,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    sites: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Rank-N-Contrast (Zha et al., NeurIPS 2023, arXiv:2210.01189).

        L = -(1/2N) Σ_i (1/|J_i|) Σ_{j in J_i} log( exp(s_ij) / Σ_{k≠i: d_ik >= d_ij} exp(s_ik) )

    with s_ij = <z_i, z_j>/τ (the paper also proposes the negative L2 distance) and d the distance of the proxies, 0 for the
    other view of the anchor's scan. Only the order of the kernel's weights matters: d_ik >= d_ij means w_ik <= w_ij. The
    default kernel, Cauchy's, decreases at every distance; kernels that reach 0 have ties there. J_i is the set of all
    j ≠ i with w_ij > 0. Scans with a missing proxy are not in J_i, but they are in the denominators.

    Arguments, result and errors as in `y_aware_infonce`. Each row is sorted: O(B G log G) time.
    """
    kernel = kernel or cauchy(bandwidth=1.0)
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, sites=sites,
        cross_view=cross_view,
    )  # fmt: skip
    return _mean_over_anchors(pairs, _rank_rows, tile)


def _rank_rows(block: Block) -> Tensor:
    ranked = (block.weights > 0).to(block.weights.dtype)
    return _ranked_rows(block, _divided_by_row(ranked), ties=True)


@full_precision
def decoupled_uniformity(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    scale: Annotated[float, Field(gt=0)] = 2.0,
    ridge: Annotated[float, Field(ge=0)] | None = None,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    tile: TileSize = None,
) -> Tensor:
    """Kernel decoupled uniformity (Dufumier et al., ICML 2023, arXiv:2206.01646).

        L = log( 1/(N (N - 1)) Σ_{a≠b} exp(-t |μ_a - μ_b|²) )        μ = (K + λ I)⁻¹ K z̄

    where a and b run over the scans, z̄_a is the mean of the embeddings of the two views, and K is the kernel matrix of the
    scans, with 1 on its diagonal. There is no temperature. A kernel of bandwidth 0 gives plain decoupled uniformity, except
    for the factor 1/(1 + λ) on the centroids.

    The centroids need the whole K: with or without tiles, every rank holds (G, G) values (64 MB for 4096 scans) and solves
    one linear system. Only the sum over pairs is computed by tiles. A single scan gives 0.
    Arguments not listed here are those of `y_aware_infonce`.

    Args:
        scale: t > 0.
        ridge: λ >= 0; None is 1/√N. This and the default of ``scale`` are those of the authors' public code.
        subjects: (B,) integers; two scans of one subject do not repel each other.

    Returns:
        The loss of the whole batch, the same on every rank; its gradient is this rank's contribution.

    Raises:
        UserError: if an argument has a wrong shape, type or value.
    """
    if scale <= 0.0 or (ridge is not None and ridge < 0.0):
        raise UserError(f"scale={scale}, ridge={ridge} are not allowed; scale must be above 0, ridge at least 0")
    pairs = gather_pairs(views, proxies, kernel=kernel, gather=gather, subjects=subjects)
    if pairs.total == 1:
        return pairs.z_2BD.sum() * 0.0
    kernel_GG = kernel(pairs.proxies_GP, pairs.proxies_GP)
    kernel_GG.fill_diagonal_(1.0)
    penalty = (pairs.total**-0.5 if ridge is None else ridge) * torch.eye(pairs.total).to(kernel_GG)
    centroids_GD = torch.linalg.solve(kernel_GG + penalty, kernel_GG) @ pairs.z_2GD.mean(dim=0)
    spread = pairs.with_columns(centroids_GD)
    local = sum_over_scans(spread, lambda part, rows: _repulsion(part, rows, scale), tile)
    total = (gather or SingleProcess()).sum(local)
    value = (total / (pairs.total * (pairs.total - 1))).log()
    # The value is that of the whole batch; the gradient is this rank's contribution to the gradient of log Σ.
    return value + (local - local.detach()) * (pairs.world_size / total)


def _repulsion(pairs: Pairs, rows: range, scale: float) -> Tensor:
    """Return Σ exp(-t |μ_a - μ_b|²) over the scans ``rows`` a of this rank and all other scans b."""
    centroids_GD, columns = pairs.z_2GD[0], range(pairs.total)
    rows_RD = centroids_GD[pairs.start + rows.start : pairs.start + rows.stop]
    squares = rows_RD.square().sum(1)[:, None] + centroids_GD.square().sum(1)[None, :] - 2.0 * rows_RD @ centroids_GD.T
    excluded = torch.zeros_like(squares, dtype=torch.bool)
    comparable = pairs.comparable(rows, columns)
    if comparable is not None:
        excluded |= ~comparable
    excluded.diagonal(pairs.start + rows.start).fill_(True)
    return torch.exp(-scale * squares).masked_fill(excluded, 0.0).sum()


def _mean_over_anchors(pairs: Pairs, anchor_losses: Callable[[Block], Tensor], tile: TileSize) -> Tensor:
    """Return this rank's contribution to the mean over all anchors. ``anchor_losses``: block of R scans -> (2R,)."""
    return sum_over_scans(pairs, lambda part, rows: anchor_losses(part.block(rows)).sum(), tile) * pairs.anchor_factor


def _log_sum(block: Block) -> Tensor:
    """Return (2R,): the logsumexp of the kept logits of each row."""
    return block.logits.masked_fill(~block.keep, float("-inf")).logsumexp(dim=1)


def _ranked_rows(block: Block, normalised: Tensor, ties: bool) -> Tensor:
    """Return (2R,): -Σ_k v_ik (s_ik - logsumexp_t s_it) over the t that are less related to the anchor than k.

    v are the ``normalised`` weights (2R, 2G). With ``ties`` the t that are as related as k are included, also k itself.
    """
    # Excluded pairs get infinite weight, so that they come last and are in no sum.
    weights = block.weights.masked_fill(~block.keep, float("inf"))
    sorted_weights, order = weights.sort(dim=1)
    running = block.logits.gather(1, order).logcumsumexp(dim=1)
    # Number of views in the sum: those with a weight below that of k, or, with ties, up to that of k.
    count = torch.searchsorted(sorted_weights, weights, right=ties)
    repulsion = running.gather(1, (count - 1).clamp(min=0))
    return (normalised * (repulsion - block.logits)).masked_fill(count == 0, 0.0).sum(dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "y-aware": y_aware_infonce,
    "threshold": threshold_contrast,
    "exp": exp_contrast,
    "rank-n-contrast": rank_n_contrast,
    "decoupled-uniformity": decoupled_uniformity,
}
