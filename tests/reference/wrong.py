"""Wrong forms of the gathered loss. Each has been published or shipped somewhere.

The tests use them in place of the right form and show that they detect each one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.losses.gather import AllGather, Columns


class DetachedGather(AllGather):
    """The columns are detached: the loss is right, the gradient is wrong."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        columns = super().__call__(z_2BD.detach(), metadata)
        return replace(columns, z_2GD=columns.z_2GD.detach())


class OwnSlotGather(AllGather):
    """Gather without gradient, then put the rank's own embeddings back into their slot, without a compensating factor."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        columns = super().__call__(z_2BD.detach(), metadata)
        z, last = columns.z_2GD.detach(), columns.start + z_2BD.shape[1]
        return replace(columns, z_2GD=torch.cat([z[:, : columns.start], z_2BD, z[:, last:]], dim=1))


class NoOffsetGather(AllGather):
    """Every rank takes the first columns for its own scans, which is right on rank 0 only."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        return replace(super().__call__(z_2BD, metadata), start=0)


class NoFactorGather(AllGather):
    """The sum over anchors is divided by 2G without the factor W, although data parallelism divides by W again."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        return replace(super().__call__(z_2BD, metadata), world_size=1)


class TwiceFactorGather(AllGather):
    """The factor W is applied twice, as needed by forms whose gradient does not reach other ranks."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        return replace(super().__call__(z_2BD, metadata), world_size=self.world_size**2)


class LocalMeanGather(AllGather):
    """The mean over this rank's anchors, which is right for equal batches only."""

    def __call__(self, z_2BD: Tensor, metadata: Sequence[Tensor]) -> Columns:
        columns = super().__call__(z_2BD, metadata)
        # anchor_factor = world_size / 2G becomes 1 / 2B.
        return replace(columns, world_size=columns.z_2GD.shape[1] / z_2BD.shape[1])


WRONG_GATHERS = {
    "detached": DetachedGather,
    "own-slot": OwnSlotGather,
    "no-offset": NoOffsetGather,
    "no-factor": NoFactorGather,
    "factor-twice": TwiceFactorGather,
    "local-mean": LocalMeanGather,
}
