"""Gather embeddings and metadata from all ranks, in one flat collective in each direction, with exact gradients.

    rank r holds     embeddings (2, B_r, D) and metadata (B_r, ...): proxies, subjects
    forward          all_gather of one record per scan: its 2 D floats and its metadata, as bytes
    every rank has   embeddings (2, G, D) and metadata (G, ...), G = sum of B_r, in the order of the ranks
    backward         reduce_scatter (sum) of the gradient (G, 2 D): every rank gets the gradient of the losses of all
                     ranks with respect to its own scans

The ranks may hold different numbers of scans; all_gather pads their blocks to the largest, S = max B_r. With W ranks,
e bytes per float and s bytes of metadata per scan (4 P for float32 proxies, 8 more for subjects), a rank sends

    forward    (W - 1) (S (2 D e + s) + 8)      bytes; without the 8 bytes for its size if the sizes are known
    backward   (G - B_r) 2 D e                  bytes; (W - 1) B 2 D e if all ranks hold B (NCCL: padded to S)

That is O(G D), independent of the (2B, 2G) pairs that the loss forms. The benchmark measures these numbers.

B = scans of this rank, G = scans of all ranks, D = embedding size, P = proxies, W = ranks.
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
from infra.internals import library_changed


def first_available(*names: str) -> Any:
    """Return the first function of torch.distributed among ``names``; raises LibraryChanged if it has none of them."""
    for name in names:
        if hasattr(dist, name):
            return getattr(dist, name)
    raise library_changed("torch", f"torch.distributed has none of {', '.join(names)}")


# torch 2.13 renamed these two and warns about the old names; 2.11 has only the old names.
_all_gather_flat = first_available("all_gather_single", "all_gather_into_tensor")
_reduce_scatter_flat = first_available("reduce_scatter_single", "reduce_scatter_tensor")
# Backends that sum by all_to_all instead of reduce_scatter, see `_reduce_scatter`.
ALL_TO_ALL_BACKENDS = ("gloo",)


@dataclass(frozen=True)
class Columns:
    """The scans of all ranks: the columns with which this rank's rows are compared.

    Attributes:
        z_2GD: (2, G, D) embeddings of both views.
        metadata: tensors (G, ...), in the order in which they were given.
        start: index of this rank's first scan among the columns; row b and column start + b are the same scan.
        world_size: number of ranks.
    """

    z_2GD: Tensor
    metadata: tuple[Tensor, ...]
    start: int
    world_size: int


class Gather(Protocol):
    """How a loss reaches the other ranks."""

    @property
    def rank(self) -> int:
        """Index of this rank."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns: ...

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, detached."""
        ...


class SingleProcess:
    """The gather of a single process: its columns are its rows."""

    rank = 0
    world_size = 1

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        return Columns(z_2BD, tuple(metadata), start=0, world_size=1)

    def sum(self, value: Tensor) -> Tensor:
        """Return the tensor, detached."""
        return value.detach()

    def of_sizes(self, sizes: Sequence[int]) -> SingleProcess:
        """Return this gather."""
        return self


def _bytes(rows: Tensor) -> Tensor:
    """View rows (B, ...) of any type as (B, bytes per row) uint8."""
    return rows.reshape(len(rows), _width(rows)).contiguous().view(torch.uint8)


def _width(rows: Tensor) -> int:
    """Return the number of values in a row of (B, ...); B may be 0."""
    return math.prod(rows.shape[1:])


class _GatherRows(torch.autograd.Function):
    """Gather (B, F) floats and (B, S) bytes of every rank into (G, F) and (G, S). The floats' gradient is exact."""

    @staticmethod
    def forward(
        ctx: Any, rows_BF: Tensor, bytes_BS: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """Gather the rows of all ranks."""
        ctx.sizes, ctx.group = sizes, group
        row_bytes = rows_BF.shape[1] * rows_BF.element_size()
        slot = max(sizes)
        block = bytes_BS.new_zeros(slot, row_bytes + bytes_BS.shape[1])
        block[: len(rows_BF), :row_bytes] = _bytes(rows_BF)
        block[: len(rows_BF), row_bytes:] = bytes_BS
        received = block.new_empty(len(sizes) * slot, block.shape[1])
        _all_gather_flat(received, block, group=group)
        all_GR = torch.cat([received[r * slot : r * slot + size] for r, size in enumerate(sizes)])
        bytes_GS = all_GR[:, row_bytes:].contiguous()
        ctx.mark_non_differentiable(bytes_GS)
        return all_GR[:, :row_bytes].contiguous().view(rows_BF.dtype), bytes_GS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Sum over the ranks the gradients of this rank's rows."""
        return _reduce_scatter(gradients[0].contiguous(), ctx.sizes, ctx.group), None, None, None


def _reduce_scatter(rows_GF: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sum the values (G, F) over the ranks; return the rows (B, F) of this rank."""
    rank, width = dist.get_rank(group), rows_GF.shape[1]
    if dist.get_backend(group) in ALL_TO_ALL_BACKENDS:
        # gloo implements reduce_scatter by an allreduce: measured, it sends twice the bytes and takes 5 to 7 times as
        # long as all_to_all, which also needs no padding and lets us sum in the order of the ranks.
        parts = rows_GF.new_empty(len(sizes) * sizes[rank], width)
        dist.all_to_all_single(parts, rows_GF, [sizes[rank]] * len(sizes), list(sizes), group=group)
        return parts.view(len(sizes), sizes[rank], width).sum(dim=0)
    slot = max(sizes)
    padded = rows_GF.new_zeros(len(sizes) * slot, width)
    for r, rows_of_rank in enumerate(torch.split(rows_GF, list(sizes))):
        padded[r * slot : r * slot + len(rows_of_rank)] = rows_of_rank
    summed = rows_GF.new_empty(slot, width)
    _reduce_scatter_flat(summed, padded, op=dist.ReduceOp.SUM, group=group)
    return summed[: sizes[rank]]


class AllGather:
    """The gather over a process group, gloo or NCCL.

    Every rank of the group, also one without scans, must call it and run its backward pass in the same order.

    Args:
        group: a torch.distributed process group that contains this rank; None is all ranks.
        sizes: scans of each rank, if they are known and the same in every step. None exchanges them in every step
            (8 bytes per rank), so that the ranks may hold any number of scans.

    Raises:
        UserError: if ``sizes`` does not have one value per rank, or, when called, if this rank holds another number.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, sizes: Sequence[int] | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.sizes = None if sizes is None else [int(size) for size in sizes]
        if self.sizes is not None and len(self.sizes) != self.world_size:
            raise UserError(f"sizes has {len(self.sizes)} values for {self.world_size} ranks; give one per rank")

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        scans, depth = z_2BD.shape[1:]
        sizes = self._sizes(scans, z_2BD.device)
        bytes_BS = (
            torch.cat([_bytes(tensor.detach()) for tensor in metadata], dim=1)
            if metadata
            else z_2BD.new_empty(scans, 0, dtype=torch.uint8)
        )
        rows_BF = z_2BD.transpose(0, 1).reshape(scans, 2 * depth)
        rows_GF, bytes_GS = _GatherRows.apply(rows_BF, bytes_BS, sizes, self.group)  # type: ignore[no-untyped-call]
        z_2GD = rows_GF.view(-1, 2, depth).transpose(0, 1)
        return Columns(z_2GD, _unpack(bytes_GS, metadata), sum(sizes[: self.rank]), self.world_size)

    def of_sizes(self, sizes: Sequence[int]) -> AllGather:
        """Return a gather over the same ranks for a known number of scans of each rank."""
        return type(self)(self.group, sizes)

    def _sizes(self, scans: int, device: torch.device) -> list[int]:
        if self.sizes is not None:
            if self.sizes[self.rank] != scans:
                raise UserError(
                    f"rank {self.rank} holds {scans} scans, but sizes has {self.sizes[self.rank]}; "
                    "leave sizes out if the batch of a rank varies"
                )
            return self.sizes
        size = torch.tensor([scans], dtype=torch.int64, device=device)
        sizes = size.new_empty(self.world_size)
        _all_gather_flat(sizes, size, group=self.group)
        return [int(size) for size in sizes.tolist()]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, detached, on the tensor's device, equal on all ranks. Collective."""
        total = value.detach().clone()
        if dist.get_backend(self.group) == "nccl":
            total = total.cuda()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total.to(value.device)


def _unpack(bytes_GS: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Restore the metadata tensors, (G, ...) each, from their bytes; ``like`` gives their types and shapes."""
    tensors, first = [], 0
    for tensor in like:
        last = first + _width(tensor) * tensor.element_size()
        # Always a copy: the start of a slice may not be aligned for the type.
        copied = bytes_GS[:, first:last].clone(memory_format=torch.contiguous_format)
        tensors.append(copied.view(tensor.dtype).view(-1, *tensor.shape[1:]))
        first = last
    return tuple(tensors)
