"""What all encoders share: normalisation, recomputation, padding, pooling. Legend: N scans, C channels, F features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from infra.errors import UserError

# channels -> layer. torch's InstanceNorm3d (and so MONAI's "instance") has no weights unless asked.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm3d,
    "sync-batch": nn.SyncBatchNorm,
    "group": lambda channels: _group_norm(channels),
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
}
# (N, C, ...) -> (N, C), or (N, 2C) for "mean+max". mean(), not AdaptiveAvgPool3d: it has a CPU kernel in bfloat16.
POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda features: features.flatten(2).mean(dim=2),
    "max": lambda features: features.flatten(2).amax(dim=2),
    "mean+max": lambda features: torch.cat([POOLINGS["mean"](features), POOLINGS["max"](features)], dim=1),
    "class": lambda features: features[:, :, 0],
}


def _group_norm(channels: int, groups: int = 8) -> nn.Module:
    if channels % groups:
        raise UserError(
            f"encoder.options.norm='group' makes {groups} groups of channels, and a layer has {channels}; "
            "choose a width that gives multiples of 8"
        )
    return nn.GroupNorm(groups, channels)


def renorm(network: nn.Module, norm: str) -> None:
    """Put ``norm`` in the place of every batch normalisation of a network that was built with it.

    MONAI 1.6's ResNet gives its own ``norm`` argument to the first layer alone.
    """
    if norm == "batch":
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm3d):
                setattr(module, name, NORMS[norm](child.num_features))


def run_block(block: nn.Module, features: torch.Tensor, recompute: bool, statistics: bool = False) -> torch.Tensor:
    """``block(features)``; with ``recompute`` its inner activations are not kept but made again in the backward pass.

    ``statistics``: the block has running ones (batch normalisation). They move in the first pass alone; by itself torch
    would move them twice. torch.compile cannot trace this, so it is done only where it is needed.
    """
    result: torch.Tensor
    if not (recompute and torch.is_grad_enabled()):
        result = block(features)
    elif statistics:
        held = lambda: (nullcontext(), _held_statistics(block))  # noqa: E731
        result = checkpoint(block, features, use_reentrant=False, context_fn=held)
    else:
        result = checkpoint(block, features, use_reentrant=False)
    return result


def has_statistics(block: nn.Module) -> bool:
    """Whether a batch normalisation is among the block's layers."""
    return any(isinstance(module, _BatchNorm) for module in block.modules())


@contextmanager
def _held_statistics(block: nn.Module) -> Iterator[None]:
    """A forward pass that leaves running statistics where they are and yet saves what any other pass saves."""
    held = [(m, m.momentum, m.num_batches_tracked.clone()) for m in block.modules() if isinstance(m, _BatchNorm)]  # type: ignore[union-attr]
    for module, _, _ in held:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, batches in held:
            module.momentum = momentum
            module.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


class Trunk(nn.Sequential):
    """Convolutional blocks in order: (N, 1, D, H, W) -> (N, C, d, h, w). ``recompute`` names blocks, see ``run_block``."""

    def __init__(
        self, blocks: dict[str, nn.Module], recompute: Collection[str] = (), channels_last: bool = False
    ) -> None:
        super().__init__(OrderedDict(blocks))
        self.recompute = {name: has_statistics(blocks[name]) for name in recompute}
        self.channels_last = channels_last

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for name, block in self.named_children():
            features = run_block(block, features, name in self.recompute, self.recompute.get(name, False))
            if self.channels_last:  # free where the block kept the layout; on CPU pooling and instance norm lose it
                features = features.contiguous(memory_format=torch.channels_last_3d)
        return features


class PooledEncoder(nn.Module):
    """A trunk and the pooling of its last feature map: (N, 1, D, H, W) float -> (N, feature_size).

    Volumes whose sides are no multiples of ``multiple`` are padded on both sides with copies of their outermost voxels
    (background in a brain scan), as evenly as can be. UserError where a side is below ``smallest``, and for SyncBatchNorm
    trained on the CPU, which torch does not have.
    """

    def __init__(
        self, trunk: nn.Module, channels: int, *, name: str, norm: str, pooling: str, smallest: int = 1,
        multiple: int = 1, channels_last: bool = False, compile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.trunk = trunk
        self.feature_size = channels * (2 if pooling == "mean+max" else 1)
        self.name, self.norm, self.pooling = name, norm, pooling
        self.smallest, self.multiple, self.channels_last = smallest, multiple, channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if compile:
            trunk.compile()  # in place: the names of the weights stay as they are

    def forward(self, volumes_N1DHW: torch.Tensor) -> torch.Tensor:
        check_sides(self.name, self.norm, self.smallest, tuple(volumes_N1DHW.shape[2:]))
        if self.norm == "sync-batch" and self.training and not volumes_N1DHW.is_cuda:
            raise UserError(NO_SYNC_ON_CPU)
        volumes = pad_to(volumes_N1DHW, self.multiple)
        if self.channels_last:
            # With one channel .contiguous() would change nothing: both layouts have the same voxels in the same order.
            volumes = torch.empty_like(volumes, memory_format=torch.channels_last_3d).copy_(volumes)
        return POOLINGS[self.pooling](self.trunk(volumes))


NO_SYNC_ON_CPU = (
    "encoder.options.norm='sync-batch' trains on CUDA only (torch has no SyncBatchNorm for the CPU); choose group, "
    "instance, or batch"
)


def check_sides(name: str, norm: str, smallest: int, sides: tuple[int, ...]) -> None:
    """UserError naming the smallest grid where a side of the volumes is below ``smallest``."""
    if min(sides) < smallest:
        found, least = "x".join(map(str, sides)), "x".join([str(smallest)] * 3)
        # Over one voxel an instance norm is undefined, over a few it leaves little but signs.
        hint = "a norm that works on smaller ones (group), " if norm == "instance" else ""
        raise UserError(
            f"scans of {found} voxels are too small for {name} with norm {norm}, whose smallest grid is {least}; "
            f"choose {hint}shards of a finer spacing, or another encoder"
        )


def pad_to(volumes: torch.Tensor, multiple: int) -> torch.Tensor:
    """Volumes (N, 1, D, H, W) with every side brought to the next multiple; the outermost voxels are repeated.

    Not padded with the minimum: in a view with noise that is an outlier, and another one in the other view.
    """
    padding: list[int] = []
    for side in reversed(volumes.shape[2:]):
        lacking = -side % multiple
        padding += [lacking // 2, lacking - lacking // 2]
    return nn.functional.pad(volumes, padding, mode="replicate") if any(padding) else volumes
