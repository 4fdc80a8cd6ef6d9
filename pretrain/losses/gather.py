"""Gather what the loss compares from all ranks, in one flat collective each way, with exact gradients.

    rank r holds     embeddings (2, B_r, D) and side columns (B_r, ...): proxies, subjects
    forward          all_gather of one record per scan: its 2 D floats and its side values, as bytes
    every rank has   embeddings (2, G, D) and side columns (G, ...), G = sum of B_r, in rank order
    backward         reduce_scatter (sum) of the gradient (G, 2 D): every rank gets what all ranks' losses
                     say about its own scans

The ranks may hold different numbers of scans; all_gather pads their blocks to the largest, S = max B_r. With W ranks,
e bytes of a float and s bytes of side values of a scan (4 P of float32 proxies, 8 more for subjects), a rank sends
    forward    (W - 1) (S (2 D e + s) + 8)      the 8 bytes of its size not where the sizes are given
    backward   (G - B_r) 2 D e                  = (W - 1) B 2 D e where all hold B (NCCL: padded to S)
bytes: O(G D), whatever the loss does with the (2 B, 2 G) pairs. The benchmark measures them.

B = scans of this rank, G = scans of all ranks, D = embedding size, W = ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import UserError

# torch 2.13 renamed these two and warns about the old names; 2.11 has the old names alone.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Backends on which the sum goes by an exchange of parts, see _reduce_scatter.
EXCHANGED = ("gloo",)


@dataclass(frozen=True)
class Columns:
    """The scans of all ranks, the columns against which this rank's rows are compared.

    ``start`` is the place of this rank's first scan among the columns: row b and column start + b are one scan.
    """

    z_2GD: Tensor
    sides: tuple[Tensor, ...]
    start: int
    world_size: int


class Gather(Protocol):
    """What a loss needs to know of the other ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def __call__(self, z_2BD: Tensor, sides: Sequence[Tensor]) -> Columns: ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over the ranks."""
        ...


class Alone:
    """The gather of one process: its columns are its rows."""

    rank = 0
    world_size = 1

    def __call__(self, z_2BD: Tensor, sides: Sequence[Tensor]) -> Columns:
        return Columns(z_2BD, tuple(sides), start=0, world_size=1)

    def sum(self, value: Tensor) -> Tensor:
        return value.detach()


def _bytes(rows: Tensor) -> Tensor:
    """(B, ...) of any type -> (B, bytes of a row) uint8."""
    return rows.reshape(len(rows), _width(rows)).contiguous().view(torch.uint8)


def _width(rows: Tensor) -> int:
    """Values in one row of (B, ...), also where B = 0."""
    return math.prod(rows.shape[1:])


class _GatherRows(torch.autograd.Function):
    """(B, F) floats and (B, s) bytes of every rank -> (G, F) and (G, s); the gradient of the floats is exact."""

    @staticmethod
    def forward(
        ctx: Any, rows_BF: Tensor, side_BS: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.group = sizes, group
        row_bytes = rows_BF.shape[1] * rows_BF.element_size()
        slot = max(sizes)
        block = side_BS.new_zeros(slot, row_bytes + side_BS.shape[1])
        block[: len(rows_BF), :row_bytes] = _bytes(rows_BF)
        block[: len(rows_BF), row_bytes:] = side_BS
        received = block.new_empty(len(sizes) * slot, block.shape[1])
        _all_gather_flat(received, block, group=group)
        all_GR = torch.cat([received[r * slot : r * slot + size] for r, size in enumerate(sizes)])
        side_GS = all_GR[:, row_bytes:].contiguous()
        ctx.mark_non_differentiable(side_GS)
        return all_GR[:, :row_bytes].contiguous().view(rows_BF.dtype), side_GS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(gradients[0].contiguous(), ctx.sizes, ctx.group), None, None, None


def _reduce_scatter(rows_GF: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """(B, F): the sum over ranks of their values of this rank's rows."""
    rank, width = dist.get_rank(group), rows_GF.shape[1]
    if dist.get_backend(group) in EXCHANGED:
        # gloo's reduce_scatter is an allreduce inside: measured, twice the bytes and 5 to 7 times the time of an
        # exchange of the parts, which also needs no padding and adds them up in rank order.
        parts = rows_GF.new_empty(len(sizes) * sizes[rank], width)
        dist.all_to_all_single(parts, rows_GF, [sizes[rank]] * len(sizes), list(sizes), group=group)
        return parts.view(len(sizes), sizes[rank], width).sum(dim=0)
    slot = max(sizes)
    padded = rows_GF.new_zeros(len(sizes) * slot, width)
    for r, part in enumerate(torch.split(rows_GF, list(sizes))):
        padded[r * slot : r * slot + len(part)] = part
    summed = rows_GF.new_empty(slot, width)
    _reduce_scatter_flat(summed, padded, op=dist.ReduceOp.SUM, group=group)
    return summed[: sizes[rank]]


class AllGather:
    """The gather over a process group (default: all ranks), gloo or NCCL.

    Args:
        group: a torch.distributed process group that this rank belongs to; None is the world.
        sizes: scans of each rank, where they are the same at every step and known; None exchanges them at each step
            (8 bytes a rank), so that the ranks may hold any number of scans.

    Every rank of the group must call it, and run backward, in the same order, a rank without scans included.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, sizes: Sequence[int] | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.sizes = None if sizes is None else [int(size) for size in sizes]
        if self.sizes is not None and len(self.sizes) != self.world_size:
            raise UserError(f"sizes has {len(self.sizes)} values for {self.world_size} ranks; give one per rank")

    def __call__(self, z_2BD: Tensor, sides: Sequence[Tensor]) -> Columns:
        scans, depth = z_2BD.shape[1:]
        sizes = self._sizes(scans, z_2BD.device)
        side_BS = (
            torch.cat([_bytes(side.detach()) for side in sides], dim=1)
            if sides
            else z_2BD.new_empty(scans, 0, dtype=torch.uint8)
        )
        rows_BF = z_2BD.transpose(0, 1).reshape(scans, 2 * depth)
        rows_GF, side_GS = _GatherRows.apply(rows_BF, side_BS, sizes, self.group)  # type: ignore[no-untyped-call]
        z_2GD = rows_GF.view(-1, 2, depth).transpose(0, 1)
        return Columns(z_2GD, _unpack(side_GS, sides), sum(sizes[: self.rank]), self.world_size)

    def _sizes(self, scans: int, device: torch.device) -> list[int]:
        if self.sizes is not None:
            if self.sizes[self.rank] != scans:
                raise UserError(
                    f"rank {self.rank} holds {scans} scans, but sizes says {self.sizes[self.rank]}; "
                    "leave sizes out where the batch of a rank varies"
                )
            return self.sizes
        own = torch.tensor([scans], dtype=torch.int64, device=device)
        everyone = own.new_empty(self.world_size)
        _all_gather_flat(everyone, own, group=self.group)
        return [int(size) for size in everyone.tolist()]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over the ranks, the same on each, on the tensor's device."""
        total = value.detach().clone()
        if dist.get_backend(self.group) == "nccl":
            total = total.cuda()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total.to(value.device)


def _unpack(side_GS: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The side columns again, (G, ...) each, from their bytes."""
    columns, first = [], 0
    for side in like:
        last = first + _width(side) * side.element_size()
        # A copy even where the slice is contiguous: its start must suit the type.
        copied = side_GS[:, first:last].clone(memory_format=torch.contiguous_format)
        columns.append(copied.view(side.dtype).view(-1, *side.shape[1:]))
        first = last
    return tuple(columns)
