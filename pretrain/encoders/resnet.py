"""MONAI's 3D ResNets as encoders (He et al. 2016, arXiv:1512.03385): one network with seven numbers of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from infra.internals import internal, set_internal
from infra.lean_imports import import_apart
from pretrain.encoders.layers import PooledEncoder, Trunk, replace_norms

# MONAI's layers of a ResNet, in order.
LAYERS = ("conv1", "bn1", "act", "maxpool", "layer1", "layer2", "layer3", "layer4")
SMALLEST = (1, 33)  # smallest side of a volume, also with instance normalisation, which needs two voxels at the end

monai_internal = partial(internal, "monai")


def import_monai() -> None:
    """Import MONAI in a thread of its own: it imports optuna, which keeps a traceback of that import; see `import_apart`."""
    import_apart("monai.networks.nets")


def resnet10(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet10, one block a stage as in MedicalNet; ``512 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet10", 512, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet18(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet18 (He et al. 2016); ``512 * width`` features.

    ``width`` scales the channels of every layer. ``max_pool=False`` leaves out the max-pooling after the first layer and so
    keeps twice the resolution, for coarse grids. ``first_stride`` is that of the first layer, 1 or 2. ``dilated`` replaces the
    strides of the last two stages by dilations of 2 and 4, as MedicalNet does (Chen et al. 2019, arXiv:1904.00625). Where the
    channels grow, ``shortcut`` brings the input of a block to them by a ``projection`` or by ``padding`` with zeros (options B
    and A of He et al.).
    """
    return _resnet(
        "resnet18", 512, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet34(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet34 (He et al. 2016); ``512 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet34", 512, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet50(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet50 (He et al. 2016); ``2048 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet50", 2048, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet101(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet101 (He et al. 2016); ``2048 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet101", 2048, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet152(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet152 (He et al. 2016); ``2048 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet152", 2048, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet200(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, width: float = 1.0,
    max_pool: bool = True, first_stride: int = 2, dilated: bool = False, shortcut: str = "projection",
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's 3D ResNet200 (He et al. 2016, arXiv:1603.05027); ``2048 * width`` features. Options as in `resnet18`."""
    return _resnet(
        "resnet200", 2048, norm=norm, pooling=pooling, grid=grid, width=width, max_pool=max_pool, first_stride=first_stride,
        dilated=dilated, shortcut=shortcut, checkpointing=checkpointing, channels_last=channels_last, compile=compile,
    )  # fmt: skip


RESNETS: dict[str, Callable[..., nn.Module]] = {
    "resnet10": resnet10, "resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101,
    "resnet152": resnet152, "resnet200": resnet200,
}  # fmt: skip


def _resnet(
    name: str, channels: int, *, norm: str, pooling: str, grid: Sequence[int] | None, width: float, max_pool: bool,
    first_stride: int, dilated: bool, shortcut: str, checkpointing: bool, channels_last: bool, compile: bool,
) -> nn.Module:  # fmt: skip
    import_monai()
    from monai.networks import nets

    network = getattr(nets, name)(
        spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=first_stride, widen_factor=width,
        shortcut_type="B",
    )  # fmt: skip
    # It passes its own ``norm`` to its first layer only.
    replace_norms(network, norm)
    blocks = {layer: monai_internal(network, layer) for layer in LAYERS if max_pool or layer != "maxpool"}
    if dilated:
        for layer, dilation in (("layer3", 2), ("layer4", 4)):
            _dilate(blocks[layer], dilation)
    if shortcut == "padding":
        _pad_shortcuts([block for layer in LAYERS[-4:] for block in blocks[layer].children()])
    recompute = [block for block in blocks if block.startswith("layer")] if checkpointing else []
    smallest = SMALLEST[norm == "instance"]
    return PooledEncoder(
        Trunk(blocks, recompute, channels_last), int(512 * width) * (channels // 512), name=name, norm=norm, pooling=pooling,
        grid=grid, smallest=smallest if max_pool else (smallest + 1) // 2, channels_last=channels_last, compile=compile,
    )  # fmt: skip


def _dilate(stage: nn.Module, dilation: int) -> None:
    """Replace the stride of a stage by a dilation of its 3 x 3 x 3 convolutions; weights keep their shapes."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv3d):
            conv.stride = (1, 1, 1)
            if conv.kernel_size == (3, 3, 3):
                conv.dilation = conv.padding = (dilation,) * 3


def _pad_shortcuts(blocks: Sequence[nn.Module]) -> None:
    """Replace the projections of blocks by padding with zeros, with the same stride."""
    for block in blocks:
        projection = monai_internal(block, "downsample")
        if projection is not None:
            conv = projection[0]
            set_internal("monai", block, "downsample", PaddedShortcut(conv.out_channels, int(conv.stride[0])))


class PaddedShortcut(nn.Module):
    """(N, C, d, h, w) -> (N, ``channels``, d/stride, h/stride, w/stride): every ``stride``-th voxel, then channels of zeros."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, features_NCdhw: torch.Tensor) -> torch.Tensor:
        """Return the shortcut of a block's input (N, C, d, h, w)."""
        step = self.stride
        kept = features_NCdhw[:, :, ::step, ::step, ::step]
        return nn.functional.pad(kept, (0, 0, 0, 0, 0, 0, 0, self.channels - kept.shape[1]))
