"""The parts that all encoders share: normalisation, recomputation, padding, pooling. N = scans, C = channels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from infra.errors import UserError
from infra.internals import library_changed
from pretrain.encoders.centres import Axes, MapAxis, map_axes
from pretrain.encoders.pooling import (
    GRIDS,
    MOST_FEATURES,
    NONE_NEEDS_GRID,
    POOLINGS,
    SPATIAL,
    as_map,
    check_cells,
    feature_count,
    map_shapes,
)

# Number of channels -> layer. By default torch's InstanceNorm3d, and so MONAI's "instance", has no weights.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm3d,
    "sync-batch": nn.SyncBatchNorm,
    "group": lambda channels: _group_norm(channels),
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
}


def _group_norm(channels: int, groups: int = 8) -> nn.Module:
    if channels % groups:
        raise UserError(
            f"encoder.options.norm='group' makes {groups} groups of channels, and a layer has {channels}; "
            "choose a width that gives multiples of 8"
        )
    return nn.GroupNorm(groups, channels)


def replace_norms(network: nn.Module, norm: str) -> None:
    """Replace every batch normalisation of one of MONAI's networks by ``norm``, a key of `NORMS`.

    Raises:
        LibraryChanged: if the network has no batch normalisation.
    """
    norms = [
        (module, name, child)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.BatchNorm3d)
    ]
    if not norms:
        raise library_changed("monai", f"{type(network).__name__} has no batch normalisation")
    if norm != "batch":
        for module, name, child in norms:
            setattr(module, name, NORMS[norm](child.num_features))


def run_block(block: nn.Module, features: torch.Tensor, recompute: bool, statistics: bool = False) -> torch.Tensor:
    """Return ``block(features)``, with or without keeping the inner activations.

    Args:
        block: any module.
        features: its input.
        recompute: do not keep the inner activations; compute them again in the backward pass.
        statistics: whether the block has running statistics (batch normalisation). They are then updated in the first pass
            only; torch by itself updates them twice. torch.compile cannot trace this, so it is done only if needed.
    """
    result: torch.Tensor
    if not (recompute and torch.is_grad_enabled()):
        result = block(features)
    elif statistics:
        contexts = lambda: (nullcontext(), _frozen_statistics(block))  # noqa: E731
        result = checkpoint(block, features, use_reentrant=False, context_fn=contexts)
    else:
        result = checkpoint(block, features, use_reentrant=False)
    return result


def has_statistics(block: nn.Module) -> bool:
    """Whether the block contains a batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in block.modules())


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics unchanged in a forward pass that saves the same tensors as any other pass."""
    before = [(m, m.momentum, m.num_batches_tracked.clone()) for m in block.modules() if isinstance(m, _BatchNorm)]  # type: ignore[union-attr]
    for module, _, _ in before:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, batches in before:
            module.momentum = momentum
            module.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


class Trunk(nn.Sequential):
    """Convolutional blocks in sequence: (N, 1, D, H, W) -> (N, C, d, h, w).

    ``recompute`` names the blocks whose activations are recomputed in the backward pass, see `run_block`.
    """

    def __init__(
        self, blocks: dict[str, nn.Module], recompute: Collection[str] = (), channels_last: bool = False
    ) -> None:
        super().__init__(OrderedDict(blocks))
        self.recompute = {name: has_statistics(blocks[name]) for name in recompute}
        self.channels_last = channels_last

    def forward(
        self, features: torch.Tensor, keep: Sequence[str] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
        """Return the last feature map (N, C, d, h, w) of volumes (N, 1, D, H, W).

        With ``keep``, names of blocks, return a tuple of it and the output of each of these blocks.
        """
        kept: dict[str, torch.Tensor] = {}
        for name, block in self.named_children():
            features = run_block(block, features, name in self.recompute, self.recompute.get(name, False))
            # Copies only if the block lost the layout, as average pooling and instance norm do on a CPU.
            if self.channels_last:
                features = features.contiguous(memory_format=torch.channels_last_3d)
            if name in keep:
                kept[name] = features
        return (features, *(kept[name] for name in keep)) if keep else features


class PooledEncoder(nn.Module):
    """A trunk followed by pooling of its last feature map: (N, 1, D, H, W) float -> (N, feature_size).

    Volumes whose sides are not multiples of ``multiple`` are padded as evenly as possible on both sides with copies of
    their outermost voxels (background in a brain scan).

    Args:
        trunk: (N, 1, D, H, W) -> (N, channels, ...); with ``keep``, names of its main blocks
            (`pretrain.weights.layers.main_blocks`), a tuple of that and of their outputs (N, C, ...).
        channels: channels of the trunk's output.
        name: the encoder's name, for messages.
        norm: a key of `NORMS`, or "layer".
        pooling: a key of `POOLINGS`.
        grid: sides of the volumes; needed for the pooling "none", whose number of features depends on it.
        smallest: smallest side of a volume, in voxels.
        multiple: sides are padded to a multiple of it.
        channels_last: use torch's channels-last memory layout.
        compile: compile the trunk with torch.compile.

    Raises:
        UserError: if the pooling is "none" without ``grid``, or gives more than 2^20 features; in the forward pass, if the
            map does not fit the pooling, if a side is below ``smallest``, or if a SyncBatchNorm is trained on a CPU, for which
            torch has no implementation.
    """

    def __init__(
        self, trunk: nn.Module, channels: int, *, name: str, norm: str, pooling: str,
        grid: Sequence[int] | None = None, smallest: int = 1, multiple: int = 1, channels_last: bool = False,
        compile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.trunk = trunk
        self.channels, self.name, self.norm = channels, name, norm
        self.smallest, self.multiple, self.channels_last = smallest, multiple, channels_last
        self._axes: dict[str | None, Axes] = {}
        self.use_pooling(pooling, grid if pooling == "none" else None)
        if channels_last:
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if compile:
            trunk.compile()  # in place, which keeps the names of the weights

    def use_pooling(self, pooling: str, sides: Sequence[int] | None) -> None:
        """Pool by ``pooling`` from now on. The weights stay as they are.

        Args:
            pooling: a key of `POOLINGS`.
            sides: of the volumes in voxels; None if unknown, which "none" does not allow. A grid is checked against it.

        Raises:
            UserError: if the pooling does not fit the map, or gives too many features.
        """
        shape = None
        if pooling in SPATIAL and sides is not None:
            shape = self.map_of(sides)[1:]
        if pooling == "none" and shape is None:
            raise UserError(NONE_NEEDS_GRID)
        if pooling in GRIDS and shape is not None:
            check_cells(GRIDS[pooling], shape)
        size = feature_count(pooling, self.channels, shape)
        if size > MOST_FEATURES:
            raise UserError(
                f"pooling {pooling} gives {size} features; at most {MOST_FEATURES} are possible; choose a grid"
            )
        self.pooling, self.feature_size = pooling, size

    def map_of(self, sides: Sequence[int], layer: str | None = None) -> tuple[int, ...]:
        """Return the shape (C, d, h, w) of a block's map of volumes of some sides in voxels, without the class token.

        ``layer`` names the block; None is the last map. Raises UserError if a side is too small.
        """
        check_sides(self.name, self.norm, self.smallest, tuple(sides))
        shape = map_shapes(self.trunk, [layer or ""], [side + -side % self.multiple for side in sides])[0]
        # Tokens are (C, T) at the end, and (T, C) of a block.
        return shape if len(shape) == 4 else (shape[0 if layer is None else 1], *self.patches(sides))

    def map_axes(self, sides: Sequence[int], layer: str | None = None) -> Axes:
        """Return where the positions of a block's map lie in volumes of some sides, in voxels (`pretrain.encoders.centres`).

        ``layer`` names the block; None is the last map. It is found once: later, ZeRO may hold the weights in parts.
        """
        if layer not in self._axes:
            self._axes[layer] = map_axes(self.trunk, layer, multiple=self.multiple, name=self.name)
        d, h, w = (
            MapAxis(axis.first - before, axis.step)
            for axis, (before, _) in zip(self._axes[layer], padding_of(sides, self.multiple), strict=True)
        )
        return d, h, w

    def patches(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the number of patches of a transformer along each side of volumes of some sides in voxels."""
        return tuple(-(-side // self.multiple) for side in sides)

    def forward(self, volumes_N1DHW: torch.Tensor) -> torch.Tensor:
        """Return the features (N, feature_size) of volumes (N, 1, D, H, W)."""
        return self._pooled(self._trunk_outputs(volumes_N1DHW)[0], volumes_N1DHW.shape[2:])

    def maps_and_features(
        self, volumes_N1DHW: torch.Tensor, layers: Sequence[str | None] = (None,)
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the maps (N, C, d, h, w) of some blocks, and the features (N, feature_size), of volumes (N, 1, D, H, W).

        ``layers`` are names of main blocks (`pretrain.weights.layers.main_blocks`); None is the last map. `map_axes` says where
        their positions lie. A transformer's tokens are put on their grid, without the class token.
        """
        keep = tuple(sorted({layer for layer in layers if layer is not None}))
        outputs = self._trunk_outputs(volumes_N1DHW, keep)
        sides, by_layer = volumes_N1DHW.shape[2:], dict(zip((None, *keep), outputs, strict=True))
        maps = [as_map(by_layer[layer], self.patches(sides)) for layer in layers]
        return maps, self._pooled(outputs[0], sides)

    def _pooled(self, output: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
        """Return the features (N, feature_size) of the trunk's output for volumes of some sides in voxels."""
        features = POOLINGS[self.pooling](as_map(output, self.patches(sides)) if self.pooling in SPATIAL else output)
        if features.shape[1] != self.feature_size:
            found = "x".join(map(str, sides))
            raise UserError(
                f"this {self.name} without pooling has {self.feature_size} features, and scans of {found} voxels give it "
                f"{features.shape[1]}; it can be used only on scans of the grid in encoder.options.grid"
            )
        return features

    def _trunk_outputs(self, volumes_N1DHW: torch.Tensor, keep: tuple[str, ...] = ()) -> tuple[torch.Tensor, ...]:
        """Return the trunk's output, and those of the blocks ``keep``."""
        check_sides(self.name, self.norm, self.smallest, tuple(volumes_N1DHW.shape[2:]))
        if self.norm == "sync-batch" and self.training and not volumes_N1DHW.is_cuda:
            raise UserError(NO_SYNC_ON_CPU)
        volumes = pad_to(volumes_N1DHW, self.multiple)
        if self.channels_last:
            # With one channel both layouts have the same order in memory, so that .contiguous() would change nothing.
            volumes = torch.empty_like(volumes, memory_format=torch.channels_last_3d).copy_(volumes)
        outputs: tuple[torch.Tensor, ...] = self.trunk(volumes, keep) if keep else (self.trunk(volumes),)
        return outputs


NO_SYNC_ON_CPU = (
    "encoder.options.norm='sync-batch' trains on CUDA only (torch has no SyncBatchNorm for the CPU); choose group, "
    "instance, or batch"
)


def check_sides(name: str, norm: str, smallest: int, sides: tuple[int, ...]) -> None:
    """Raise UserError, naming the smallest grid, if a side of the volumes (in voxels) is below ``smallest``."""
    if min(sides) < smallest:
        shape, least = "x".join(map(str, sides)), "x".join([str(smallest)] * 3)
        # An instance norm over one voxel is undefined; over a few voxels it keeps little more than their signs.
        hint = "a norm that works on smaller ones (group), " if norm == "instance" else ""
        raise UserError(
            f"scans of {shape} voxels are too small for {name} with norm {norm}, whose smallest grid is {least}; "
            f"choose {hint}shards of a finer spacing, or another encoder"
        )


def pad_to(volumes: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad every side of volumes (N, 1, D, H, W) to the next multiple by repeating the outermost voxels.

    The minimum would not do as padding: in a view with noise it is an outlier, and it differs between the two views.
    """
    padding = [voxels for axis in reversed(padding_of(volumes.shape[2:], multiple)) for voxels in axis]
    return nn.functional.pad(volumes, padding, mode="replicate") if any(padding) else volumes


def padding_of(sides: Sequence[int], multiple: int) -> list[tuple[int, int]]:
    """Return how many voxels `pad_to` adds before and after each side."""
    lacking = [-side % multiple for side in sides]
    return [(voxels // 2, voxels - voxels // 2) for voxels in lacking]
