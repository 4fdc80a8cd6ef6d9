"""The pairs that a contrastive loss compares: this rank's views (rows) with the views of all ranks (columns).

Anchor i = (view v, scan b) is row v·B + b; column j = (view u, scan g) is u·G + g. With two views of four scans a to d on
two ranks, rank 1 holds the rows of scans c and d. In the matrix below, s is the anchor itself, which is excluded; o is
its other view, with weight 1; w is the kernel's weight, the same for all four pairs of views of two scans:

                 columns, view 0      columns, view 1
                  a   b   c   d        a   b   c   d
    view 0   c    w   w   s   w        w   w   o   w
             d    w   w   w   s        w   w   w   o
    view 1   c    w   w   o   w        w   w   s   w
             d    w   w   w   o        w   w   w   s

B = scans of this rank, R = scans of a block of rows, G = scans of all ranks, D = embedding size, P = proxies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel
from pretrain.losses.gather import Gather, SingleProcess

# A vector counts as zero if its largest entry is smaller than this; dividing by it would overflow float32.
ZERO = 1e-30
# Entries of the kernel matrix in memory at a time, in computations that go over the whole matrix.
KERNEL_BLOCK = 2**20

Loss = TypeVar("Loss", bound=Callable[..., Any])


def full_precision(loss: Loss) -> Loss:
    """Decorate a loss so that it is computed outside autocast, which would compute similarities in half precision."""

    @functools.wraps(loss)
    def without_autocast(*arguments: Any, **options: Any) -> Any:
        """Compute the loss with autocast off."""
        devices = (value.device.type for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        with torch.autocast(next(devices, "cpu"), enabled=False):
            return loss(*arguments, **options)

    return cast(Loss, without_autocast)


def normalised(views: Tensor) -> Tensor:
    """Scale embeddings (..., D) of any floating type to unit length, in float32 (float64 for float64).

    A zero vector stays zero: it has no direction, so its similarity to everything is 0 and it gets no gradient. Every other
    vector is first divided by its largest entry, so that very short and very long vectors are normalised exactly.
    """
    z = views if views.dtype == torch.float64 else views.float()
    # The unit vector does not depend on the scale, so the gradient is exact with the scale detached.
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    # The comparison is False for NaN, which must stay NaN so that the check of the loss sees it.
    is_zero = largest < ZERO
    z = z / torch.where(is_zero, 1.0, largest)
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return torch.where(is_zero, 0.0, z / torch.where(is_zero, 1.0, length))


class Block(NamedTuple):
    """A block of rows against all columns.

    Attributes:
        logits: (2R, 2G), <z_i, z_j> / τ.
        weights: (2R, 2G), the kernel; 1 for the other view of the anchor's scan, 0 for excluded pairs.
        keep: (2R, 2G) bool, False for the anchor itself and for other excluded pairs.
    """

    logits: Tensor
    weights: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Pairs:
    """The rows of this rank and the columns of all ranks, with their proxies and subjects. Made by `gather_pairs`.

    Attributes:
        z_2BD, z_2GD: unit embeddings of the rows and of the columns.
        proxies_BP, proxies_GP: their proxies, NaN if missing.
        subjects_B, subjects_G: their subjects, or None if scans of one subject are not excluded.
        sites_B, sites_G: their sites, or None if scans of different sites are not excluded.
        start: index of this rank's first scan among the columns.
        world_size: number of ranks.
        kernel: weight of two scans.
        temperature: τ.
        cross_view: whether a first view is compared only with second views, and a second view only with first ones.
    """

    z_2BD: Tensor
    z_2GD: Tensor
    proxies_BP: Tensor
    proxies_GP: Tensor
    subjects_B: Tensor | None
    subjects_G: Tensor | None
    sites_B: Tensor | None
    sites_G: Tensor | None
    start: int
    world_size: int
    kernel: Kernel
    temperature: float | Tensor
    cross_view: bool

    @property
    def scans(self) -> int:
        """Number of scans of this rank, B."""
        return self.z_2BD.shape[1]

    @property
    def total(self) -> int:
        """Number of scans of all ranks, G."""
        return self.z_2GD.shape[1]

    @property
    def columns_are_rows(self) -> bool:
        """Whether no other rank holds a scan."""
        return self.total == self.scans

    @property
    def anchor_factor(self) -> float:
        """The factor W / 2G on this rank's sum over its anchors.

        Data parallelism averages gradients over the W ranks. The average of the ranks' sums times W / 2G is the sum over
        all anchors divided by 2G, which is the mean of a single process, even if the ranks hold different numbers of scans.
        """
        return self.world_size / (2 * self.total)

    def with_columns(self, columns_GD: Tensor) -> Pairs:
        """Return these pairs with one vector per scan (G, D), such as a centroid, as columns instead of the views."""
        return replace(self, z_2GD=columns_GD[None])

    def own_diagonal(self, rows: range, columns: range) -> int | None:
        """Return the tile's diagonal where row and column are the same scan, as in torch.diagonal; None if there is none.

        The tile (R, C) has the scans ``rows`` of this rank and the scans ``columns`` of all ranks.
        """
        offset = self.start + rows.start - columns.start
        return offset if -len(rows) < offset < len(columns) else None

    def comparable(self, rows: range, columns: range) -> Tensor | None:
        """Return (R, C) bool, False for pairs of scans that are excluded; None if no pair is excluded.

        Two scans of one subject, or of different sites, are neither positives nor negatives of each other. A scan is not
        excluded with itself.
        """
        keep: Tensor | None = None
        if self.subjects_B is not None and self.subjects_G is not None:
            keep = self.subjects_B[rows.start : rows.stop, None] != self.subjects_G[None, columns.start : columns.stop]
        if self.sites_B is not None and self.sites_G is not None:
            same = self.sites_B[rows.start : rows.stop, None] == self.sites_G[None, columns.start : columns.stop]
            keep = same if keep is None else keep & same
        if keep is None:
            return None
        diagonal = self.own_diagonal(rows, columns)
        if diagonal is not None:
            keep.diagonal(diagonal).fill_(True)
        return keep

    def kernel_weights(self, rows: range, columns: range) -> Tensor:
        """Return the kernel (R, C) between scans; 1 for a scan with itself (its other view), 0 for excluded pairs."""
        weights = self.kernel(self.proxies_BP[rows.start : rows.stop], self.proxies_GP[columns.start : columns.stop])
        keep = self.comparable(rows, columns)
        if keep is not None:
            weights = weights.masked_fill(~keep, 0.0)
        diagonal = self.own_diagonal(rows, columns)
        if diagonal is not None:
            weights.diagonal(diagonal).fill_(1.0)
        return weights

    def block(self, rows: range) -> Block:
        """Return the rows of these scans, both views, against all columns."""
        columns, count, total = range(self.total), len(rows), self.total
        z_RD, z_CD = self.z_2BD[:, rows.start : rows.stop].flatten(0, 1), self.z_2GD.flatten(0, 1)
        logits = (z_RD @ z_CD.T) / self.temperature
        keep = torch.ones(2, count, 2, total, dtype=torch.bool, device=z_RD.device)
        comparable, diagonal = self.comparable(rows, columns), self.own_diagonal(rows, columns)
        if comparable is not None:
            keep &= comparable[None, :, None]
        for view in (0, 1):
            if self.cross_view:
                keep[view, :, view] = False
            elif diagonal is not None:
                keep[view, :, view].diagonal(diagonal).fill_(False)
        weights = self.kernel_weights(rows, columns)[None, :, None] * keep
        return Block(logits, weights.view(2 * count, 2 * total), keep.view(2 * count, 2 * total))

    def column_sums(self) -> Tensor:
        """Return (G,): the sum of the weights in a scan's column (of either view) over all 2G anchors of all ranks.

        It is computed from the gathered proxies, a block of anchors at a time, and needs no further collective.
        """
        all_rows = replace(
            self,
            z_2BD=self.z_2GD,
            proxies_BP=self.proxies_GP,
            subjects_B=self.subjects_G,
            sites_B=self.sites_G,
            start=0,
            world_size=1,
        )
        columns, step = range(self.total), max(1, KERNEL_BLOCK // self.total)
        sums = self.z_2GD.new_zeros(self.total)
        for first in columns[::step]:
            sums += all_rows.kernel_weights(columns[first : first + step], columns).sum(dim=0)
        return sums if self.cross_view else 2.0 * sums - 1.0


def gather_pairs(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 1.0,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    sites: Tensor | None = None,
    cross_view: bool = False,
) -> Pairs:
    """Check the arguments of a loss, normalise the embeddings and gather the columns of all ranks.

    Args:
        views: (2, B, D) embeddings of any floating type.
        proxies: (B, P), NaN if missing.
        kernel: (A, P), (B, P) -> (A, B).
        temperature: τ > 0.
        gather: how to reach the other ranks; None is a single process.
        subjects: (B,) integers, or None.
        sites: (B,) integers, or None; two scans of different sites are not compared.
        cross_view: whether a first view is compared only with second views, and a second view only with first ones.

    Raises:
        UserError: if a shape or type is wrong, the temperature is not above 0, or no rank holds a scan.
    """
    _check(views, proxies, temperature, {"subjects": subjects, "sites": sites})
    z_2BD = normalised(views)
    proxies_BP = proxies.detach().to(z_2BD.device, z_2BD.dtype)
    given = [
        proxies_BP,
        None if subjects is None else subjects.to(z_2BD.device),
        None if sites is None else sites.to(z_2BD.device),
    ]
    metadata = [values for values in given if values is not None]
    columns = (gather or SingleProcess())(z_2BD, metadata)
    if columns.z_2GD.shape[1] == 0:
        raise UserError("views holds no scan on any rank; a loss needs at least one")
    gathered = iter(columns.metadata)
    proxies_GP, subjects_G, sites_G = (None if values is None else next(gathered) for values in given)
    assert proxies_GP is not None
    return Pairs(
        z_2BD=z_2BD,
        z_2GD=columns.z_2GD,
        proxies_BP=proxies_BP,
        proxies_GP=proxies_GP,
        subjects_B=given[1],
        subjects_G=subjects_G,
        sites_B=given[2],
        sites_G=sites_G,
        start=columns.start,
        world_size=columns.world_size,
        kernel=kernel,
        temperature=temperature,
        cross_view=cross_view,
    )


def _check(views: Tensor, proxies: Tensor, temperature: float | Tensor, codes: Mapping[str, Tensor | None]) -> None:
    if views.ndim != 3 or views.shape[0] != 2 or views.shape[2] == 0 or not views.is_floating_point():
        raise UserError(f"views has shape {tuple(views.shape)}, type {views.dtype}; give floating (2, B, D)")
    scans = views.shape[1]
    if proxies.ndim != 2 or len(proxies) != scans:
        raise UserError(f"proxies has shape {tuple(proxies.shape)} for {scans} scans; give (B, P) = ({scans}, P)")
    for name, values in codes.items():
        if values is not None and (values.shape != (scans,) or values.is_floating_point()):
            raise UserError(f"{name} has shape {tuple(values.shape)}, type {values.dtype}; give integers ({scans},)")
    if not isinstance(temperature, Tensor) and not 0.0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature} is not allowed; give a finite number above 0 (the paper: 0.1)")
