"""3D encoders: (N, 1, D, H, W) -> (N, feature_size), behind one dictionary. The only module that imports MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from infra.errors import UserError, nearest


class PooledEncoder(nn.Module):
    """A convolutional trunk, ReLU, and the global average: (N, 1, D, H, W) float -> (N, feature_size)."""

    def __init__(self, trunk: nn.Module, feature_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.feature_size = feature_size

    def forward(self, volumes_N1DHW: torch.Tensor) -> torch.Tensor:
        # mean(), not AdaptiveAvgPool3d: it has a CPU kernel in bfloat16 and costs the same.
        return torch.relu(self.trunk(volumes_N1DHW)).mean(dim=(2, 3, 4))


def densenet121(*, norm: str = "batch", dropout: float = 0.0, checkpointing: bool = False) -> nn.Module:
    """DenseNet121 in 3D as in Dufumier et al. 2021: growth 32, blocks 6/12/24/16, no final norm5; 1024 features.

    ``norm``: ``batch`` (the paper) or ``group`` (groups of eight channels, for a few scans a rank).
    Built from MONAI's DenseNet121, whose layers are the paper's but for ``norm5``, left out here.
    """
    from monai.networks.nets import DenseNet121

    network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1, norm=_norm(norm), dropout_prob=dropout)
    trunk = network.features
    trunk.norm5 = nn.Identity()
    return PooledEncoder(_checkpointed(trunk) if checkpointing else trunk, 1024)


def resnet18(*, norm: str = "batch", width: float = 1.0, max_pool: bool = True) -> nn.Module:
    """ResNet18 in 3D (He et al. 2016), MONAI's; ``512 * width`` features.

    ``width`` scales every layer's channels; ``max_pool=False`` keeps twice the resolution, for coarse grids.
    """
    from monai.networks.nets import resnet18 as monai_resnet18

    network = monai_resnet18(
        spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=2, widen_factor=width,
        no_max_pool=not max_pool, shortcut_type="B",
    )  # fmt: skip
    if norm != "batch":
        _renorm(network, _norm(norm))
    return _ResNet(network, int(512 * width))


class _ResNet(nn.Module):
    """MONAI's ResNet without its head already pools; this only carries the feature size."""

    def __init__(self, network: nn.Module, feature_size: int) -> None:
        super().__init__()
        self.network = network
        self.feature_size = feature_size

    def forward(self, volumes_N1DHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(volumes_N1DHW)
        return features


def _renorm(network: nn.Module, norm: Any) -> None:
    """Put another normalisation in every place. MONAI 1.6's ResNet would give its ``norm`` to the first layer alone."""
    from monai.networks.layers.utils import get_norm_layer

    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm3d):
                setattr(module, name, get_norm_layer(name=norm, spatial_dims=3, channels=child.num_features))


def _norm(name: str) -> Any:
    norms: dict[str, Any] = {"batch": "batch", "group": ("group", {"num_groups": 8}), "instance": "instance"}
    if name not in norms:
        raise UserError(
            f"encoder.options.norm={name!r} is not known{nearest(name, norms)}; allowed: {', '.join(norms)}"
        )
    return norms[name]


def _checkpointed(trunk: nn.Sequential) -> nn.Module:
    """Recompute each dense block in the backward pass: about a third more time for a fraction of the memory."""
    from torch.utils.checkpoint import checkpoint

    for name, block in list(trunk.named_children()):
        if name.startswith("denseblock"):
            plain = block.forward
            block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    return trunk


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": densenet121,
    "resnet18": resnet18,
}


def check_encoder(name: str, options: dict[str, Any]) -> None:
    """UserError naming the nearest where an encoder or an option is unknown; quick, MONAI is not imported."""
    if name not in ENCODERS:
        raise UserError(f"encoder.name={name!r} is not known{nearest(name, ENCODERS)}; allowed: {', '.join(ENCODERS)}")
    allowed = list(ENCODERS[name].__kwdefaults__ or {})
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed)
            raise UserError(f"encoder.options.{option} is no option of {name}{hint}; allowed: {', '.join(allowed)}")


def build_encoder(name: str, options: dict[str, Any]) -> nn.Module:
    """The encoder ``name`` with ``options``; UserError as ``check_encoder``."""
    check_encoder(name, options)
    return ENCODERS[name](**options)
