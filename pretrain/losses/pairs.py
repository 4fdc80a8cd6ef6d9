"""The pairs that a contrastive loss compares: this rank's views (rows) against the views of all ranks (columns).

Anchor i = (view v, scan b) is row v·B + b; column j = (view u, scan g) is u·G + g. With two views of four scans on two
ranks, rank 1 holds the rows of scans c and d (s: the anchor itself, left out; o: its other view, weight 1; w: the
kernel's weight, the same for the four pairs of views of two scans):

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel
from pretrain.losses.gather import Alone, Gather

# A vector whose largest entry is smaller than this counts as zero: dividing by it would overflow float32.
ZERO = 1e-30
# Values of the scans' kernel that are held at a time where all of it is walked through.
KERNEL_BLOCK = 2**20

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def full_precision(loss: Loss) -> Loss:
    """The loss out of reach of autocast, which would take its similarities in half precision."""

    @functools.wraps(loss)
    def guarded(*arguments: Any, **options: Any) -> Tensor:
        devices = (value.device.type for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        with torch.autocast(next(devices, "cpu"), enabled=False):
            return loss(*arguments, **options)

    return cast(Loss, guarded)


def normalised(views: Tensor) -> Tensor:
    """Embeddings (..., D) of any floating type -> unit vectors, float32 (float64 stays).

    A zero vector stays zero: its similarity to everything is 0, and it gets no gradient, since it has no direction.
    Every other vector is normalised exactly, however short or long: it is scaled by its largest entry first.
    """
    z = views if views.dtype == torch.float64 else views.float()
    # Normalising forgets the scale, so the scale may be held constant and the gradient is still exact.
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    # False for NaN: it must stay one, and be seen by the check on the loss.
    dead = largest < ZERO
    z = z / torch.where(dead, 1.0, largest)
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return torch.where(dead, 0.0, z / torch.where(dead, 1.0, length))


class Block(NamedTuple):
    """A block of rows against all columns.

    ``logits`` (2R, 2G): <z_i, z_j> / τ. ``weights`` (2R, 2G): the kernel, 1 for the other view of the anchor's scan,
    0 where not kept. ``keep`` (2R, 2G) bool: False for the anchor itself and for pairs that are left out altogether.
    """

    logits: Tensor
    weights: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Pairs:
    """This rank's rows and everyone's columns, with what relates them. Made by `gather_pairs`."""

    z_2BD: Tensor
    z_2GD: Tensor
    proxies_BP: Tensor
    proxies_GP: Tensor
    subjects_B: Tensor | None
    subjects_G: Tensor | None
    start: int
    world_size: int
    kernel: Kernel
    temperature: float | Tensor
    cross_view: bool

    @property
    def scans(self) -> int:
        """B."""
        return self.z_2BD.shape[1]

    @property
    def total(self) -> int:
        """G."""
        return self.z_2GD.shape[1]

    @property
    def alone(self) -> bool:
        """No other rank holds a scan: the columns are the rows."""
        return self.total == self.scans

    @property
    def share(self) -> float:
        """W / 2G, the factor on this rank's sum over anchors.

        Data parallelism averages gradients over the W ranks. Each rank's sum over its own anchors times W / 2G
        averages to the sum over all anchors divided by 2G: the mean of one process, even where the ranks hold
        different numbers of scans.
        """
        return self.world_size / (2 * self.total)

    def with_columns(self, columns_GD: Tensor) -> Pairs:
        """The same with one vector per scan, such as a centroid, in place of the views' columns."""
        return replace(self, z_2GD=columns_GD[None])

    def crossing(self, rows: range, columns: range) -> int | None:
        """Which diagonal of the (R, C) tile of these scans holds them against themselves; None if none does."""
        offset = self.start + rows.start - columns.start
        return offset if -len(rows) < offset < len(columns) else None

    def related(self, rows: range, columns: range) -> Tensor | None:
        """(R, C) bool: which of this rank's scans and which columns are not left out; None: nothing is.

        Two scans of one subject are neither positives nor negatives of each other; a scan is kept with itself.
        """
        if self.subjects_B is None or self.subjects_G is None:
            return None
        keep = self.subjects_B[rows.start : rows.stop, None] != self.subjects_G[None, columns.start : columns.stop]
        diagonal = self.crossing(rows, columns)
        if diagonal is not None:
            keep.diagonal(diagonal).fill_(True)
        return keep

    def kernel_weights(self, rows: range, columns: range) -> Tensor:
        """(R, C): the kernel between scans, 1 for a scan with itself (that is, with its other view)."""
        weights = self.kernel(self.proxies_BP[rows.start : rows.stop], self.proxies_GP[columns.start : columns.stop])
        keep = self.related(rows, columns)
        if keep is not None:
            weights = weights.masked_fill(~keep, 0.0)
        diagonal = self.crossing(rows, columns)
        if diagonal is not None:
            weights.diagonal(diagonal).fill_(1.0)
        return weights

    def block(self, rows: range) -> Block:
        """These scans' rows, both views, against all columns."""
        columns, count, total = range(self.total), len(rows), self.total
        z_RD, z_CD = self.z_2BD[:, rows.start : rows.stop].flatten(0, 1), self.z_2GD.flatten(0, 1)
        logits = (z_RD @ z_CD.T) / self.temperature
        keep = torch.ones(2, count, 2, total, dtype=torch.bool, device=z_RD.device)
        related, diagonal = self.related(rows, columns), self.crossing(rows, columns)
        if related is not None:
            keep &= related[None, :, None]
        for view in (0, 1):
            if self.cross_view:
                keep[view, :, view] = False
            elif diagonal is not None:
                keep[view, :, view].diagonal(diagonal).fill_(False)
        weights = self.kernel_weights(rows, columns)[None, :, None] * keep
        return Block(logits, weights.view(2 * count, 2 * total), keep.view(2 * count, 2 * total))

    def column_sums(self) -> Tensor:
        """(G,): the sum of the weights in the column of either view of each scan, over all 2G anchors of all ranks.

        Computed from the gathered proxies, a block of anchors at a time, so that it needs no further collective.
        """
        everyone = replace(
            self, z_2BD=self.z_2GD, proxies_BP=self.proxies_GP, subjects_B=self.subjects_G, start=0, world_size=1
        )
        columns, step = range(self.total), max(1, KERNEL_BLOCK // self.total)
        sums = self.z_2GD.new_zeros(self.total)
        for first in columns[::step]:
            sums += everyone.kernel_weights(columns[first : first + step], columns).sum(dim=0)
        return sums if self.cross_view else 2.0 * sums - 1.0


def gather_pairs(
    views: Tensor,
    proxies: Tensor,
    *,
    kernel: Kernel,
    temperature: float | Tensor = 1.0,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
    cross_view: bool = False,
) -> Pairs:
    """Check what a loss was given, normalise the embeddings and gather the columns of all ranks."""
    _check(views, proxies, temperature, subjects)
    z_2BD = normalised(views)
    proxies_BP = proxies.detach().to(z_2BD.device, z_2BD.dtype)
    sides = [proxies_BP] if subjects is None else [proxies_BP, subjects.to(z_2BD.device)]
    columns = (gather or Alone())(z_2BD, sides)
    if columns.z_2GD.shape[1] == 0:
        raise UserError("views holds no scan on any rank; a loss needs at least one")
    return Pairs(
        z_2BD=z_2BD,
        z_2GD=columns.z_2GD,
        proxies_BP=proxies_BP,
        proxies_GP=columns.sides[0],
        subjects_B=None if subjects is None else sides[1],
        subjects_G=None if subjects is None else columns.sides[1],
        start=columns.start,
        world_size=columns.world_size,
        kernel=kernel,
        temperature=temperature,
        cross_view=cross_view,
    )


def _check(views: Tensor, proxies: Tensor, temperature: float | Tensor, subjects: Tensor | None) -> None:
    if views.ndim != 3 or views.shape[0] != 2 or views.shape[2] == 0 or not views.is_floating_point():
        raise UserError(f"views has shape {tuple(views.shape)}, type {views.dtype}; give floating (2, B, D)")
    scans = views.shape[1]
    if proxies.ndim != 2 or len(proxies) != scans:
        raise UserError(f"proxies has shape {tuple(proxies.shape)} for {scans} scans; give (B, P) = ({scans}, P)")
    if subjects is not None and (subjects.shape != (scans,) or subjects.is_floating_point()):
        raise UserError(f"subjects has shape {tuple(subjects.shape)}, type {subjects.dtype}; give integers ({scans},)")
    if not isinstance(temperature, Tensor) and not 0.0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature} is not allowed; give a finite number above 0 (the paper: 0.1)")
