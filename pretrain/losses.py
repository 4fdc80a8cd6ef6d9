"""Contrastive losses over proxies: one function each, listed in `LOSSES`.

Every loss takes ``views`` (2, B, D): the embeddings of two views of this rank's B scans, in any floating type and
unnormalised, and ``proxies`` (B, P), NaN where missing, and returns a scalar. Similarities are computed in float32
(float64 where the views are) between L2-normalised embeddings.

With a ``gather`` (`pretrain.gather.AllGather`), rows are this rank's 2B anchors and columns the 2G views of all ranks.
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
from typing import Literal

from torch import Tensor

from infra.errors import UserError
from pretrain.gather import Alone, Gather
from pretrain.kernels import Kernel
from pretrain.pairs import Block, Pairs, full_precision, gather_pairs

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
        temperature: τ > 0.
        normalization: "row" is the formula above. "column" is what the authors' published code computes:
            -(1/N) Σ_i Σ_{j≠i} [ w_ij / Σ_{k≠j} w_kj ] log p(j|i): weights divided by the sums of their columns, so that
            scans of common proxies weigh more, and the sum by N, not 2N, so that it is about twice as large.
        gather: how to reach the other ranks; None is one process.

    Returns:
        This rank's share, a scalar: see the head of this module.
    """
    if normalization not in ("row", "column"):
        raise UserError(
            f"normalization={normalization!r} is not allowed; choose 'row' (the paper) or 'column' (its code)"
        )
    pairs = gather_pairs(views, proxies, kernel=kernel, temperature=temperature, gather=gather)
    if normalization == "row":
        return _over_anchors(pairs, _row_normalised)
    # 1/N is twice 1/2N.
    factors = (2.0 / pairs.column_sums()).repeat(2)
    return _over_anchors(pairs, lambda block: _weighted(block, block.weights * factors))


def _row_normalised(block: Block) -> Tensor:
    return _weighted(block, block.weights / block.weights.sum(dim=1, keepdim=True))


def _weighted(block: Block, shares: Tensor) -> Tensor:
    """(2R,): -Σ_j shares_ij log p(j|i), shares (2R, 2G)."""
    denominator = block.logits.masked_fill(~block.keep, float("-inf")).logsumexp(dim=1)
    return shares.sum(dim=1) * denominator - (shares * block.logits).sum(dim=1)


def _over_anchors(pairs: Pairs, anchor_losses: Callable[[Block], Tensor]) -> Tensor:
    """This rank's share of the mean over all anchors."""
    return anchor_losses(pairs.block(0, pairs.scans)).sum() * pairs.share


LOSSES: dict[str, Callable[..., Tensor]] = {
    "y-aware": y_aware_infonce,
}
