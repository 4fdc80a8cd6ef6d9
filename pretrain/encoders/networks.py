"""MONAI's networks as encoders. The only module that imports MONAI.

What MONAI 1.6 does that an encoder must not, and what is done about it here:
- ResNet gives ``norm`` to its first layer alone: every norm is put in by ``renorm``
- ``instance`` norms have no weights: ``NORMS`` has ones that do
- the ViT's blocks hold a norm for cross-attention that is never used, so its weights never get a gradient: taken out
- the ViT's fast attention applies its dropout in evaluation too: used only where there is no dropout
- the ViT takes one size of volume alone: positions are interpolated to any other
- SwinTransformer normalises and keeps the features of all five scales: only the deepest are
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pretrain.encoders.layers import PooledEncoder, Trunk, renorm, run_block
from pretrain.encoders.residual import FEATURES, resenc_trunk

VBM = (121, 145, 121)
PATCH = 16
# name -> (smallest side of a volume, the same with instance normalisation, which wants two voxels a side at the end)
SMALLEST = {"densenet121": (29, 61), "resnet18": (1, 33), "resnet50": (1, 33), "unet": (16, 32), "resenc-l": (17, 33)}


def smallest_side(name: str, norm: str, max_pool: bool = True) -> int:
    """The fewest voxels that a side of a volume may have."""
    plain, instance = SMALLEST.get(name, (1, 1))
    side = instance if norm == "instance" else plain
    return side if max_pool else (side + 1) // 2


def densenet121(
    *, norm: str = "batch", pooling: str = "mean", dropout: float = 0.0, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """DenseNet121 in 3D as in Dufumier et al. 2021: growth 32, blocks 6/12/24/16, no final norm5; 1024 features.

    Built from MONAI's DenseNet121, whose layers are the paper's but for ``norm5``, left out here. ``dropout`` drops whole
    channels of what each dense layer adds.
    """
    from monai.networks.nets import DenseNet121

    features = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1, dropout_prob=dropout).features
    renorm(features, norm)
    blocks = dict(features.named_children())
    del blocks["norm5"]
    blocks["relu5"] = nn.ReLU()
    recompute = [block for block in blocks if block.startswith("denseblock")] if checkpointing else []
    return PooledEncoder(
        Trunk(blocks, recompute, channels_last), 1024, name="densenet121", norm=norm, pooling=pooling,
        smallest=smallest_side("densenet121", norm), channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resnet18(
    *, norm: str = "batch", pooling: str = "mean", width: float = 1.0, max_pool: bool = True, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """ResNet18 in 3D (He et al. 2016), MONAI's; ``512 * width`` features.

    ``width`` scales every layer's channels; ``max_pool=False`` keeps twice the resolution, for coarse grids.
    """
    return _resnet("resnet18", 512, norm, pooling, width, max_pool, checkpointing, channels_last, compile)


def resnet50(
    *, norm: str = "batch", pooling: str = "mean", width: float = 1.0, max_pool: bool = True, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """ResNet50 in 3D (He et al. 2016), MONAI's; ``2048 * width`` features. Options as of ``resnet18``."""
    return _resnet("resnet50", 2048, norm, pooling, width, max_pool, checkpointing, channels_last, compile)


def _resnet(
    name: str, channels: int, norm: str, pooling: str, width: float, max_pool: bool, checkpointing: bool,
    channels_last: bool, compile: bool,
) -> nn.Module:  # fmt: skip
    from monai.networks import nets

    network = getattr(nets, name)(
        spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=2, widen_factor=width, shortcut_type="B"
    )
    renorm(network, norm)
    wanted = ["conv1", "bn1", "act", *["maxpool"] * max_pool, "layer1", "layer2", "layer3", "layer4"]
    blocks = {block: getattr(network, block) for block in wanted}
    recompute = [block for block in blocks if block.startswith("layer")] if checkpointing else []
    return PooledEncoder(
        Trunk(blocks, recompute, channels_last), int(512 * width) * (channels // 512), name=name, norm=norm, pooling=pooling,
        smallest=smallest_side(name, norm, max_pool), channels_last=channels_last, compile=compile,
    )  # fmt: skip


def unet(
    *, norm: str = "batch", pooling: str = "mean", dropout: float = 0.0, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """The contracting half of a 3D U-Net (Cicek et al. 2016), of MONAI's blocks; 512 features.

    Two convolutions at each of five scales with 32, 64, 128, 256, 512 channels and max-pooling between them.
    """
    from monai.networks.nets.basic_unet import Down, TwoConv

    widths, common = (32, 64, 128, 256, 512), (("LeakyReLU", {"negative_slope": 0.1, "inplace": True}), "batch", True)
    blocks: dict[str, nn.Module] = {"conv_0": TwoConv(3, 1, widths[0], *common, dropout)}
    for level in range(1, 5):
        blocks[f"down_{level}"] = Down(3, widths[level - 1], widths[level], *common, dropout)
    renorm(nn.ModuleDict(blocks), norm)
    trunk = Trunk(blocks, tuple(blocks) if checkpointing else (), channels_last)
    return PooledEncoder(
        trunk, widths[-1], name="unet", norm=norm, pooling=pooling, smallest=smallest_side("unet", norm),
        channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resenc_l(
    *, norm: str = "instance", pooling: str = "mean", checkpointing: bool = False, channels_last: bool = False,
    compile: bool = False,
) -> nn.Module:  # fmt: skip
    """A residual encoder of the class of nnU-Net's ResEnc-L (Isensee et al. 2024): 6 stages, 320 features."""
    return PooledEncoder(
        resenc_trunk(norm, checkpointing, channels_last), FEATURES[-1], name="resenc-l", norm=norm, pooling=pooling,
        smallest=smallest_side("resenc-l", norm), channels_last=channels_last, compile=compile,
    )  # fmt: skip


def vit_small(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """ViT-S (12 blocks of 384 channels, 6 heads) on patches of 16 x 16 x 16 voxels; 384 features.

    ``pooling: class`` takes the class token; the others the tokens of the patches, and there is no class token then.
    ``grid``: the volumes that positions are learned for; on other ones they are interpolated.
    """
    trunk = _ViT(384, 6, grid, pooling == "class", dropout, drop_path, checkpointing)
    return PooledEncoder(
        trunk, 384, name="vit-small", norm=norm, pooling=pooling, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def vit_base(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """ViT-B (12 blocks of 768 channels, 12 heads) on patches of 16 x 16 x 16 voxels; 768 features. Options as ViT-S."""
    trunk = _ViT(768, 12, grid, pooling == "class", dropout, drop_path, checkpointing)
    return PooledEncoder(
        trunk, 768, name="vit-base", norm=norm, pooling=pooling, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def vit_large(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """ViT-L (24 blocks of 1024 channels, 16 heads) on patches of 16 x 16 x 16 voxels; 1024 features. Options as ViT-S."""
    trunk = _ViT(1024, 16, grid, pooling == "class", dropout, drop_path, checkpointing, blocks=24)
    return PooledEncoder(
        trunk, 1024, name="vit-large", norm=norm, pooling=pooling, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def swin_unetr(
    *, norm: str = "layer", pooling: str = "mean", dropout: float = 0.0, drop_path: float = 0.0, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """The encoder of SwinUNETR (Hatamizadeh et al. 2022), MONAI's, 48 channels at first; 768 features."""
    return PooledEncoder(
        _Swin(48, dropout, drop_path, checkpointing), 768, name="swin-unetr", norm=norm, pooling=pooling, multiple=32,
        channels_last=channels_last, compile=compile,
    )  # fmt: skip


class _ViT(nn.Module):
    """(N, 1, D, H, W), sides multiples of 16, -> tokens (N, C, T), the class token first where there is one."""

    def __init__(
        self, width: int, heads: int, grid: Sequence[int], class_token: bool, dropout: float, drop_path: float,
        checkpointing: bool, blocks: int = 12,
    ) -> None:  # fmt: skip
        from monai.networks.layers import DropPath
        from monai.networks.nets import ViT

        super().__init__()
        self.patches_a_side = tuple(-(-side // PATCH) for side in grid)
        network = ViT(
            in_channels=1, img_size=[n * PATCH for n in self.patches_a_side], patch_size=PATCH, hidden_size=width,
            mlp_dim=4 * width, num_layers=blocks, num_heads=heads, dropout_rate=dropout, qkv_bias=True,
        )  # fmt: skip
        self.patches = network.patch_embedding.patch_embeddings
        self.position: nn.Parameter = network.patch_embedding.position_embeddings
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = network.blocks
        self.norm = network.norm
        self.checkpointing = checkpointing
        for number, block in enumerate(self.blocks):
            block.norm_cross_attn = nn.Identity()
            block.attn.use_flash_attention = dropout == 0
            rate = drop_path * number / (len(self.blocks) - 1)
            if rate > 0:
                block.attn.drop_output = nn.Sequential(block.attn.drop_output, DropPath(rate))
                block.mlp.drop2 = nn.Sequential(block.mlp.drop2, DropPath(rate))
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        patches_NCdhw = self.patches(volumes)
        tokens_NTC = patches_NCdhw.flatten(2).transpose(1, 2) + self._position(tuple(patches_NCdhw.shape[2:]))
        if self.class_token is not None:
            tokens_NTC = torch.cat([self.class_token.expand(len(tokens_NTC), -1, -1), tokens_NTC], dim=1)
        tokens_NTC = self.dropout(tokens_NTC)
        for block in self.blocks:
            tokens_NTC = run_block(block, tokens_NTC, self.checkpointing)
        normed: torch.Tensor = self.norm(tokens_NTC)
        return normed.transpose(1, 2)

    def _position(self, patches_a_side: tuple[int, ...]) -> torch.Tensor:
        if patches_a_side == self.patches_a_side:
            return self.position
        learned_1Cdhw = self.position.transpose(1, 2).reshape(1, -1, *self.patches_a_side)
        return (
            nn.functional.interpolate(learned_1Cdhw, size=patches_a_side, mode="trilinear").flatten(2).transpose(1, 2)
        )


class _Swin(nn.Module):
    """(N, 1, D, H, W), sides multiples of 32, -> the deepest features (N, 16 width, D/32, H/32, W/32), layer-normed."""

    def __init__(self, width: int, dropout: float, drop_path: float, checkpointing: bool) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        self.transformer = SwinTransformer(
            in_chans=1, embed_dim=width, window_size=(7, 7, 7), patch_size=(2, 2, 2), depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24), drop_rate=dropout, drop_path_rate=drop_path, use_checkpoint=checkpointing,
            spatial_dims=3,
        )  # fmt: skip

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        deepest_NCdhw: torch.Tensor = self.transformer(volumes, normalize=False)[-1]
        tokens_NTC = deepest_NCdhw.flatten(2).transpose(1, 2)
        normed: torch.Tensor = nn.functional.layer_norm(tokens_NTC, tokens_NTC.shape[-1:])
        return normed.transpose(1, 2).reshape(deepest_NCdhw.shape)
