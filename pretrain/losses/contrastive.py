"""Contrastive losses over proxies: one function each, listed in `LOSSES`.

Every loss takes ``views`` (2, B, D): the embeddings of two views of this rank's B scans, in any floating type and
unnormalised, and ``proxies`` (B, P), NaN where missing, and returns a scalar. Similarities are computed in float32
(float64 where the views are) between L2-normalised embeddings.

With a ``gather`` (`pretrain.losses.gather.AllGather`), rows are this rank's 2B anchors and columns the 2G views of all ranks.
The scalar is then this rank's share, scaled so that
- the *mean over ranks* of the scalars is the loss of one process holding the whole batch (`global_loss` gives it), and
- the *mean over ranks* of the gradients, which data parallelism (DDP, DeepSpeed ZeRO 0-3) forms anyway, is exactly that
  process's gradient, on every parameter, also where the ranks hold different numbers of scans.
No further factor belongs on it. With equal B the scalar is the mean over this rank's anchors.

Finite in every case: a zero vector has similarity 0 to everything and no gradient; identical embeddings give
log(2G - 1); one scan in all gives 0; a scan with missing proxies, or without any related scan, has its own other view
as its one positive. Embeddings that hold NaN give NaN.

B = scans of this rank, G = scans of all ranks, N = G, D = embedding size, P = proxies, W = ranks, τ = temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel, cauchy
from pretrain.losses.gather import Alone, Gather
from pretrain.losses.pairs import Block, Pairs, full_precision, gather_pairs
from pretrain.losses.tiled import TileSize, sum_over_scans, y_aware_sum

Normalization = Literal["row", "column"]


def global_loss(loss: Tensor, gather: Gather | None = None) -> Tensor:
    """The loss of the whole batch, from each rank's scalar: their mean over the ranks, detached. For logging."""
    ranks = gather or Alone()
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
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """y-Aware InfoNCE (Dufumier et al., MICCAI 2021, Eq. 3 of arXiv:2106.08808).

        p(j|i) = exp(<z_i, z_j>/τ) / Σ_{k≠i} exp(<z_i, z_k>/τ)
        L      = -(1/2N) Σ_i Σ_{j≠i} [ w_ij / Σ_{k≠i} w_ik ] log p(j|i)

    over the 2N views, with w_ij the kernel between the proxies of the two scans, and 1 for the two views of one scan.
    A kernel of bandwidth 0 makes it NT-Xent (SimCLR, arXiv:2002.05709); the kernel "same" makes it SupCon
    (arXiv:2004.11362, L_out).

    Args:
        views: (2, B, D) embeddings.
        proxies: (B, P), NaN where missing.
        kernel: (A, P), (B, P) -> (A, B), see `pretrain.kernels.KERNELS`.
        temperature: τ > 0; a tensor may be learned (`pretrain.losses.temperature`).
        normalization: "row" is the formula above. "column" is what the authors' published code computes:
            -(1/N) Σ_i Σ_{j≠i} [ w_ij / Σ_{k≠j} w_kj ] log p(j|i): weights divided by the sums of their columns, so that
            scans of common proxies weigh more, and the sum by N, not 2N, so that it is about twice as large.
        gather: how to reach the other ranks; None is one process.
        subjects: (B,) integers; two scans of one subject are then neither positives nor negatives of each other.
        cross_view: compare an anchor with the views of the other kind only (positives and negatives alike).
        tile: None keeps the (2B, 2G) matrices, which small batches may; "auto", or a number of scans, computes the
            same by tiles in linear memory, see `pretrain.losses.tiled`.

    Returns:
        This rank's share, a scalar: see the head of this module.
    """
    if normalization not in ("row", "column"):
        raise UserError(
            f"normalization={normalization!r} is not allowed; give 'row' (the paper) or 'column' (its code)"
        )
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, cross_view=cross_view
    )
    by_row = normalization == "row"
    if tile is not None:
        return y_aware_sum(pairs, by_row, tile) * pairs.share
    # The columns of both views of a scan have one sum; 1/N is twice 1/2N.
    factors = None if by_row else (2.0 / pairs.column_sums()).repeat(2)
    return _mean_over_anchors(pairs, lambda block: _y_aware_rows(block, factors), None)


def _y_aware_rows(block: Block, column_factors: Tensor | None) -> Tensor:
    """(2R,): -Σ_j share_ij log p(j|i)."""
    if column_factors is None:
        shares = block.weights / block.weights.sum(dim=1, keepdim=True)
    else:
        shares = block.weights * column_factors
    return shares.sum(dim=1) * _log_sum(block) - (shares * block.logits).sum(dim=1)


@full_precision
def threshold_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Contrastive regression, "threshold" weighting (Barbano et al., ISBI 2023, arXiv:2211.08326).

        L = -(1/2N) Σ_i Σ_{k≠i} [ w_ik / Σ_{t≠i} w_it ] log( exp(s_ik) / Σ_{t≠i: w_it < w_ik} exp(s_it) )

    with s = <z_i, z_j>/τ: every positive k repels only what is less related to the anchor than itself. A positive to
    which nothing is less related has no term. The authors' public code shares one denominator among all positives
    (each t counted once per positive that is more related); here each has its own, as in the formula.

    Arguments and result as in `y_aware_infonce`. Needs a sort of each row: O(B G log G) time.
    """
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, cross_view=cross_view
    )
    return _mean_over_anchors(pairs, _threshold_rows, tile)


def _threshold_rows(block: Block) -> Tensor:
    shares = block.weights / block.weights.sum(dim=1, keepdim=True)
    return _ranked(block, shares, ties=False)


@full_precision
def exp_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Contrastive regression, "exp" weighting (Barbano et al., ISBI 2023, arXiv:2211.08326; arXiv:2507.01794).

        L = -(1/2N) Σ_i Σ_{k≠i} [ w_ik / Σ_{t≠i} w_it ] log( exp(s_ik) / Σ_{t≠i} exp(s_it (1 - w_it)) )

    with s = <z_i, z_j>/τ: the more related, the weaker the repulsion. The sum runs over every t ≠ i, as in the authors'
    public code; that code also subtracts each row's maximum from s before weighting, which changes the value, and is
    not done here. Arguments and result as in `y_aware_infonce`.
    """
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, cross_view=cross_view
    )
    return _mean_over_anchors(pairs, _exp_rows, tile)


def _exp_rows(block: Block) -> Tensor:
    shares = block.weights / block.weights.sum(dim=1, keepdim=True)
    repulsion = _log_sum(block._replace(logits=block.logits * (1.0 - block.weights)))
    return repulsion - (shares * block.logits).sum(dim=1)


@full_precision
def rank_n_contrast(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel | None = None,
    temperature: float | Tensor = 0.1,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    cross_view: bool = False,
    tile: TileSize = None,
) -> Tensor:
    """Rank-N-Contrast (Zha et al., NeurIPS 2023, arXiv:2210.01189).

        L = -(1/2N) Σ_i (1/|J_i|) Σ_{j in J_i} log( exp(s_ij) / Σ_{k≠i: d_ik >= d_ij} exp(s_ik) )

    with s = <z_i, z_j>/τ (the paper also offers the negative L2 distance) and d the distance of the proxies, 0 for the
    other view of the anchor's scan. The kernel gives only the order: d_ik >= d_ij where w_ik <= w_ij. The default,
    Cauchy's, falls with the distance at every distance; others tie where they reach 0. J_i holds every j ≠ i with
    w_ij > 0: all of them, but for scans with missing proxies, which are compared with but never ranked.

    Arguments and result as in `y_aware_infonce`. Needs a sort of each row: O(B G log G) time.
    """
    kernel = kernel or cauchy(bandwidth=1.0)
    pairs = gather_pairs(
        views, proxies, kernel=kernel, temperature=temperature, gather=gather, subjects=subjects, cross_view=cross_view
    )
    return _mean_over_anchors(pairs, _rank_rows, tile)


def _rank_rows(block: Block) -> Tensor:
    ranked = (block.weights > 0).to(block.weights.dtype)
    return _ranked(block, ranked / ranked.sum(dim=1, keepdim=True), ties=True)


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

    over scans, with z̄_a the mean of the two views' embeddings, K the kernel matrix of the scans (1 on its diagonal),
    ``scale`` t = 2 and ``ridge`` λ = 1/√N by default, as in the authors' public code. There is no temperature. A kernel
    of bandwidth 0 gives plain decoupled uniformity, but for the factor 1/(1 + λ) on the centroids.

    The centroids need all of K: every rank holds (G, G) values (64 MB for 4096 scans) and solves one system, tiled or
    not; the sum over pairs alone goes by tiles. One scan in all gives 0. Two scans of one subject (``subjects``) do not
    repel each other. Other arguments and the result as in `y_aware_infonce`, except that the returned value is the
    loss of the whole batch on every rank.
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
    own = sum_over_scans(spread, lambda part, rows: _repulsion(part, rows, scale), tile)
    everyone = (gather or Alone()).sum(own)
    value = (everyone / (pairs.total * (pairs.total - 1))).log()
    # The value is the whole batch's; the gradient is this rank's share of that of log Σ.
    return value + (own - own.detach()) * (pairs.world_size / everyone)


def _repulsion(pairs: Pairs, rows: range, scale: float) -> Tensor:
    """Σ exp(-t |μ_a - μ_b|²) over these scans a of this rank and all other scans b."""
    centroids_GD, columns = pairs.z_2GD[0], range(pairs.total)
    own_RD = centroids_GD[pairs.start + rows.start : pairs.start + rows.stop]
    squares = own_RD.square().sum(1)[:, None] + centroids_GD.square().sum(1)[None, :] - 2.0 * own_RD @ centroids_GD.T
    left_out = torch.zeros_like(squares, dtype=torch.bool)
    related = pairs.related(rows, columns)
    if related is not None:
        left_out |= ~related
    left_out.diagonal(pairs.start + rows.start).fill_(True)
    return torch.exp(-scale * squares).masked_fill(left_out, 0.0).sum()


def _mean_over_anchors(pairs: Pairs, anchor_losses: Callable[[Block], Tensor], tile: TileSize) -> Tensor:
    """This rank's share of the mean over all anchors of ``anchor_losses``: block of R scans -> (2R,)."""
    return sum_over_scans(pairs, lambda part, rows: anchor_losses(part.block(rows)).sum(), tile) * pairs.share


def _log_sum(block: Block) -> Tensor:
    """(2R,): logsumexp of each row's kept logits."""
    return block.logits.masked_fill(~block.keep, float("-inf")).logsumexp(dim=1)


def _ranked(block: Block, shares: Tensor, ties: bool) -> Tensor:
    """(2R,): -Σ_k share_ik (s_ik - logsumexp of s_it over the t less related than k, or as related with ``ties``)."""
    # What is left out sorts last, after everything that anyone compares with.
    order = block.weights.masked_fill(~block.keep, float("inf"))
    ranked, places = order.sort(dim=1)
    running = block.logits.gather(1, places).logcumsumexp(dim=1)
    # How many are compared with: the positions below k's weight, or up to and with it.
    count = torch.searchsorted(ranked, order, right=ties)
    repulsion = running.gather(1, (count - 1).clamp(min=0))
    return (shares * (repulsion - block.logits)).masked_fill(count == 0, 0.0).sum(dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "y-aware": y_aware_infonce,
    "threshold": threshold_contrast,
    "exp": exp_contrast,
    "rank-n-contrast": rank_n_contrast,
    "decoupled-uniformity": decoupled_uniformity,
}
