"""A residual encoder like nnU-Net's ResEnc-L (Isensee et al. 2024, arXiv:2404.09556)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from pretrain.encoders.layers import NORMS, Trunk

FEATURES = (32, 64, 128, 256, 320, 320)
BLOCKS = (1, 3, 4, 6, 6, 6)


class ResidualBlock(nn.Module):
    """Residual block (N, C, d, h, w) -> (N, C', d/stride, h/stride, w/stride).

    It computes conv, norm, LeakyReLU, conv, norm, adds the input, and applies LeakyReLU. With stride 2, the input is first
    averaged over 2 x 2 x 2 voxels; if C' differs from C, a 1 x 1 x 1 convolution and a norm bring it to C' channels
    (ResNet-D). Odd sides are rounded up, as in the strided convolution.
    """

    def __init__(self, channels: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, out, 3, stride=stride, padding=1)
        self.norm1 = NORMS[norm](out)
        self.conv2 = nn.Conv3d(out, out, 3, padding=1)
        self.norm2 = NORMS[norm](out)
        skip: dict[str, nn.Module] = {}
        if stride > 1:
            skip["pool"] = nn.AvgPool3d(stride, ceil_mode=True)
        if channels != out:
            skip |= {"conv": nn.Conv3d(channels, out, 1, bias=False), "norm": NORMS[norm](out)}
        self.skip = nn.Sequential(OrderedDict(skip))
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the block's output for features (N, C, d, h, w)."""
        out = self.act(self.norm1(self.conv1(features)))
        out = self.norm2(self.conv2(out)) + self.skip(features)
        activated: torch.Tensor = self.act(out)
        return activated


def resenc_trunk(norm: str, checkpointing: bool, channels_last: bool) -> Trunk:
    """Build six stages of residual blocks; each after the first halves the resolution."""
    trunk: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            OrderedDict(
                conv=nn.Conv3d(1, FEATURES[0], 3, padding=1),
                norm=NORMS[norm](FEATURES[0]),
                act=nn.LeakyReLU(0.01, inplace=True),
            )
        )
    }
    channels = FEATURES[0]
    for stage, (out, blocks) in enumerate(zip(FEATURES, BLOCKS, strict=True), start=1):
        stride = 1 if stage == 1 else 2
        sizes = [(channels, stride), *[(out, 1)] * (blocks - 1)]
        trunk[f"stage{stage}"] = nn.Sequential(*[ResidualBlock(before, out, by, norm) for before, by in sizes])
        channels = out
    for module in trunk.values():
        for layer in module.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, a=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return Trunk(trunk, tuple(trunk) if checkpointing else (), channels_last)
