"""The number of positives that an anchor effectively has, which depends on the kernel and the batch size.

The weights of an anchor's row, divided by their sum, are a distribution over the other 2G - 1 views. Its perplexity,
exp(-Σ_j w_ij log w_ij), is the number of equally weighted positives with the same entropy: 1 if the only positive is the
other view of the anchor's own scan (SimCLR), 2G - 1 if all views have the same weight.

B = scans of this rank, G = scans of all ranks, P = proxies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.kernels import Kernel
from pretrain.losses.gather import Gather, SingleProcess
from pretrain.losses.pairs import KERNEL_BLOCK, gather_pairs

# An anchor with fewer effective positives than this learns from little more than its own other view.
FEW_POSITIVES = 2.0
# Upper edges of the histogram's bins, except the last bin, in effective positives: powers of two.
EDGES = tuple(float(2**power) for power in range(1, 13))


@dataclass(frozen=True)
class Positives:
    """Effective positives per anchor, over the scans of one or more batches of all ranks.

    Attributes:
        scans: number of scans.
        mean: mean of the effective positives.
        below_two: share of scans with fewer than two.
        missing: share of scans with a missing proxy.
        histogram: number of scans with effective positives in [1, 2), [2, 4), [4, 8), …; the last bin is open.
    """

    scans: int
    mean: float
    below_two: float
    missing: float
    histogram: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log: ``positives/mean``, ``below_2``, ``missing``, and the share of scans in each bin."""
        edges = (1.0, *EDGES)
        bins = {
            f"positives/from_{int(edge)}": n / max(1, self.scans) for edge, n in zip(edges, self.histogram, strict=True)
        }
        summary = {"positives/mean": self.mean, "positives/below_2": self.below_two, "positives/missing": self.missing}
        return {**summary, **bins}


def effective_positives(
    proxies: Tensor,
    kernel: Kernel,
    *,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    cross_view: bool = False,
) -> Tensor:
    """Return (B,): the effective positives of this rank's scans in the batch of all ranks; equal for both views.

    ``proxies`` (B, P), ``kernel``, ``subjects`` (B,) and ``cross_view`` as in the losses. Collective if ``gather`` is.
    """
    # With empty embeddings, the loss's own functions do the gathering, the checks and the exclusions.
    views = torch.zeros(2, len(proxies), 1, dtype=torch.float64, device=proxies.device)
    pairs = gather_pairs(views, proxies, kernel=kernel, gather=gather, subjects=subjects, cross_view=cross_view)
    rows, columns, step = range(pairs.scans), range(pairs.total), max(1, KERNEL_BLOCK // pairs.total)
    parts = [views.new_zeros(0)]
    for first in rows[::step]:
        block = rows[first : first + step]
        weights = pairs.kernel_weights(block, columns)
        # Another scan counts for its two views, the anchor's own scan only for its other view.
        copies = torch.full_like(weights, 1.0 if cross_view else 2.0)
        copies.diagonal(pairs.start + first).fill_(1.0)
        total = (copies * weights).sum(dim=1)
        # -Σ p log p with p = w / total, in a form to which w = 0 adds 0.
        entropy = total.log() - (copies * torch.special.xlogy(weights, weights)).sum(dim=1) / total
        parts.append(entropy.exp())
    return torch.cat(parts)


def positive_statistics(
    positives: Sequence[Tensor], proxies: Sequence[Tensor], gather: Gather | None = None
) -> Positives:
    """Summarise the batches of this rank, such as those of an epoch, over all ranks; one small collective.

    Args:
        positives: results (B,) of `effective_positives`, one per batch.
        proxies: the proxies (B, P) of the same batches.
        gather: how to reach the other ranks; None is a single process.
    """
    counts = torch.cat([*(batch.cpu() for batch in positives), torch.zeros(0, dtype=torch.float64)])
    missing_scans = sum(int(batch.isnan().any(dim=1).sum()) for batch in proxies)
    # Rounding may turn a perplexity of exactly 2 into 2 - 1e-16.
    rounded = counts * (1.0 + 1e-9)
    bins = torch.bucketize(rounded, torch.tensor(EDGES, dtype=torch.float64), right=True)
    summary = [float(len(counts)), float(counts.sum()), float((rounded < FEW_POSITIVES).sum()), float(missing_scans)]
    local = torch.cat([torch.tensor(summary, dtype=torch.float64), bins.bincount(minlength=len(EDGES) + 1).double()])
    scans, total, below, missing, *histogram = (gather or SingleProcess()).sum(local).tolist()
    if scans == 0:
        return Positives(0, math.nan, math.nan, math.nan, tuple(int(n) for n in histogram))
    return Positives(int(scans), total / scans, below / scans, missing / scans, tuple(int(n) for n in histogram))
