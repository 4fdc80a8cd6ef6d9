"""MONAI's networks as encoders. Only this module and `resnet` import MONAI.

MONAI 1.6 differs from what an encoder needs in these points, which are corrected here:

- Its networks are built with batch normalisation, and `replace_norms` replaces every layer.
- Its instance norms have no weights. `NORMS` has instance norms with weights.
- A ViT block has a norm for cross-attention that is never used, so its weights never get a gradient. It is removed.
- The ViT's fast attention applies dropout in evaluation too. It is used only without dropout.
- The ViT accepts one size of volume only. The positions are interpolated to any other size.
- SwinTransformer normalises and returns the features of all five scales. Only the deepest are normalised here.
- SwinTransformer merges patches otherwise than its published weights were trained to. `merging` chooses.

The names of MONAI's layers are internal to it: a missing name raises LibraryChanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from infra.internals import library_changed, set_internal
from pretrain.encoders import resnet
from pretrain.encoders.layers import PooledEncoder, Trunk, replace_norms, run_block
from pretrain.encoders.merging import use_published_merging
from pretrain.encoders.residual import FEATURES, resenc_trunk
from pretrain.encoders.resnet import import_monai, monai_internal

VBM = (121, 145, 121)
PATCH = 16
# Encoder -> (smallest side of a volume, smallest side with instance normalisation, which needs two voxels at the end).
SMALLEST = {
    "densenet121": (29, 61), **dict.fromkeys(resnet.RESNETS, resnet.SMALLEST), "unet": (16, 32), "resenc-l": (17, 33),
}  # fmt: skip
# MONAI's layers of DenseNet121, in order.
DENSENET_LAYERS = (
    "conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3",
    "transition3", "denseblock4", "norm5",
)  # fmt: skip
# Blocks of SwinTransformer whose outputs it returns, in order.
SWIN_BLOCKS = ("transformer.patch_embed", *(f"transformer.layers{scale}.0" for scale in (1, 2, 3, 4)))


def smallest_side(name: str, norm: str, max_pool: bool = True) -> int:
    """Return the smallest number of voxels that a side of a volume may have."""
    side = SMALLEST.get(name, (1, 1))[norm == "instance"]
    return side if max_pool else (side + 1) // 2


def densenet121(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, dropout: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build the 3D DenseNet121 of Dufumier et al. 2021: growth 32, blocks 6/12/24/16, no final norm5; 1024 features.

    It is MONAI's DenseNet121 without its last norm, ``norm5``, which the paper's encoder does not have. ``dropout`` drops
    whole channels of the output of each dense layer. Raises LibraryChanged if MONAI's network has other layers.
    """
    import_monai()
    from monai.networks.nets import DenseNet121

    features = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1, dropout_prob=dropout).features
    replace_norms(features, norm)
    blocks = dict(features.named_children())
    if tuple(blocks) != DENSENET_LAYERS:
        raise library_changed(
            "monai", f"DenseNet121 has the layers {', '.join(blocks)}; expected {', '.join(DENSENET_LAYERS)}"
        )
    del blocks["norm5"]
    blocks["relu5"] = nn.ReLU()
    recompute = [block for block in blocks if block.startswith("denseblock")] if checkpointing else []
    return PooledEncoder(
        Trunk(blocks, recompute, channels_last), 1024, name="densenet121", norm=norm, pooling=pooling, grid=grid,
        smallest=smallest_side("densenet121", norm), channels_last=channels_last, compile=compile,
    )  # fmt: skip


def unet(
    *, norm: str = "batch", pooling: str = "mean", grid: Sequence[int] | None = None, dropout: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build the contracting half of a 3D U-Net (Cicek et al. 2016) from MONAI's blocks; 512 features.

    It has two convolutions at each of five scales, with 32, 64, 128, 256 and 512 channels, and max-pooling between the scales.
    """
    import_monai()
    from monai.networks.nets.basic_unet import Down, TwoConv

    widths, common = (32, 64, 128, 256, 512), (("LeakyReLU", {"negative_slope": 0.1, "inplace": True}), "batch", True)
    blocks: dict[str, nn.Module] = {"conv_0": TwoConv(3, 1, widths[0], *common, dropout)}
    for level in range(1, 5):
        blocks[f"down_{level}"] = Down(3, widths[level - 1], widths[level], *common, dropout)
    replace_norms(nn.ModuleDict(blocks), norm)
    trunk = Trunk(blocks, tuple(blocks) if checkpointing else (), channels_last)
    return PooledEncoder(
        trunk, widths[-1], name="unet", norm=norm, pooling=pooling, grid=grid, smallest=smallest_side("unet", norm),
        channels_last=channels_last, compile=compile,
    )  # fmt: skip


def resenc_l(
    *, norm: str = "instance", pooling: str = "mean", grid: Sequence[int] | None = None, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a residual encoder like nnU-Net's ResEnc-L (Isensee et al. 2024): 6 stages, 320 features."""
    return PooledEncoder(
        resenc_trunk(norm, checkpointing, channels_last), FEATURES[-1], name="resenc-l", norm=norm, pooling=pooling, grid=grid,
        smallest=smallest_side("resenc-l", norm), channels_last=channels_last, compile=compile,
    )  # fmt: skip


def vit_small(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a ViT-S (12 blocks of 384 channels, 6 heads) on patches of 16 x 16 x 16 voxels; 384 features.

    Args:
        norm: only "layer".
        pooling: "class" returns the class token. The other poolings use the patches' tokens; the network then has no class
            token. "first" returns the token of the first patch, as BrainIAC does.
        grid: shape of the volumes for which positions are learned; they are interpolated for volumes of other shapes.
        dropout: rate of dropout in attention, MLP and embedding.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        checkpointing: recompute activations in the backward pass.
        channels_last: use torch's channels-last memory layout.
        compile: compile the trunk with torch.compile.
    """
    trunk = _ViT(
        384, 6, grid, class_token=pooling == "class", dropout=dropout, drop_path=drop_path, checkpointing=checkpointing
    )
    return PooledEncoder(
        trunk, 384, name="vit-small", norm=norm, pooling=pooling, grid=grid, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def vit_base(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a ViT-B (12 blocks of 768 channels, 12 heads); 768 features. Options and patches as in `vit_small`."""
    trunk = _ViT(
        768, 12, grid, class_token=pooling == "class", dropout=dropout, drop_path=drop_path, checkpointing=checkpointing
    )
    return PooledEncoder(
        trunk, 768, name="vit-base", norm=norm, pooling=pooling, grid=grid, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def vit_large(
    *, norm: str = "layer", pooling: str = "class", grid: Sequence[int] = VBM, dropout: float = 0.0, drop_path: float = 0.0,
    checkpointing: bool = False, channels_last: bool = False, compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a ViT-L (24 blocks of 1024 channels, 16 heads); 1024 features. Options and patches as in `vit_small`."""
    trunk = _ViT(
        1024, 16, grid, class_token=pooling == "class", dropout=dropout, drop_path=drop_path, checkpointing=checkpointing,
        blocks=24,
    )  # fmt: skip
    return PooledEncoder(
        trunk, 1024, name="vit-large", norm=norm, pooling=pooling, grid=grid, multiple=PATCH, channels_last=channels_last,
        compile=compile,
    )  # fmt: skip


def swin_unetr(
    *, norm: str = "layer", pooling: str = "mean", grid: Sequence[int] | None = None, dropout: float = 0.0,
    drop_path: float = 0.0, merging: str = "each", checkpointing: bool = False, channels_last: bool = False,
    compile: bool = False,
) -> nn.Module:  # fmt: skip
    """Build MONAI's encoder of SwinUNETR (Hatamizadeh et al. 2022) with 48 channels at the first scale; 768 features.

    ``merging``: each scale merges ``each`` of eight neighbours, or those of MONAI's ``published`` weights (`merging`).
    """
    return PooledEncoder(
        _Swin(48, dropout, drop_path, checkpointing, merging=merging), 768, name="swin-unetr", norm=norm, pooling=pooling,
        grid=grid, multiple=32, channels_last=channels_last, compile=compile,
    )  # fmt: skip


class _ViT(nn.Module):
    """(N, 1, D, H, W), sides multiples of 16, -> map (N, C, d, h, w), or tokens (N, C, T) with the class token first."""

    def __init__(
        self, width: int, heads: int, grid: Sequence[int], *, class_token: bool, dropout: float, drop_path: float,
        checkpointing: bool, blocks: int = 12,
    ) -> None:  # fmt: skip
        import_monai()
        from monai.networks.layers import DropPath
        from monai.networks.nets import ViT

        super().__init__()
        self.patches_per_side = tuple(-(-side // PATCH) for side in grid)
        network = ViT(
            in_channels=1, img_size=[n * PATCH for n in self.patches_per_side], patch_size=PATCH, hidden_size=width,
            mlp_dim=4 * width, num_layers=blocks, num_heads=heads, dropout_rate=dropout, qkv_bias=True,
        )  # fmt: skip
        embedding = monai_internal(network, "patch_embedding")
        self.patches = monai_internal(embedding, "patch_embeddings")
        self.position: nn.Parameter = monai_internal(embedding, "position_embeddings")
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = monai_internal(network, "blocks")
        self.norm = monai_internal(network, "norm")
        self.checkpointing = checkpointing
        for index, block in enumerate(self.blocks):
            attention, mlp = monai_internal(block, "attn"), monai_internal(block, "mlp")
            set_internal("monai", block, "norm_cross_attn", nn.Identity())
            set_internal("monai", attention, "use_flash_attention", dropout == 0)
            rate = drop_path * index / (len(self.blocks) - 1)
            if rate > 0:
                for part, last in ((attention, "drop_output"), (mlp, "drop2")):
                    setattr(part, last, nn.Sequential(monai_internal(part, last), DropPath(rate)))
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self, volumes: torch.Tensor, keep: Sequence[str] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
        """Return the map (N, C, d, h, w) of volumes (N, 1, D, H, W); with a class token the tokens (N, C, T), it first.

        With ``keep``, names of blocks (blocks.0, ...), return a tuple of it and the tokens (N, C, T) of each of these blocks.
        """
        patches_NCdhw = self.patches(volumes)
        tokens_NTC = patches_NCdhw.flatten(2).transpose(1, 2) + self._position(tuple(patches_NCdhw.shape[2:]))
        if self.class_token is not None:
            tokens_NTC = torch.cat([self.class_token.expand(len(tokens_NTC), -1, -1), tokens_NTC], dim=1)
        tokens_NTC, kept = self.dropout(tokens_NTC), dict[str, torch.Tensor]()
        for number, block in enumerate(self.blocks):
            tokens_NTC = run_block(block, tokens_NTC, self.checkpointing)
            if f"blocks.{number}" in keep:
                kept[f"blocks.{number}"] = tokens_NTC.transpose(1, 2)
        normed: torch.Tensor = self.norm(tokens_NTC)
        tokens_NCT = normed.transpose(1, 2)
        output = tokens_NCT if self.class_token is not None else tokens_NCT.reshape(patches_NCdhw.shape)
        return (output, *(kept[name] for name in keep)) if keep else output

    def _position(self, patches_per_side: tuple[int, ...]) -> torch.Tensor:
        """Return the positions (1, T, C) for a volume of so many patches, interpolated if its shape is not ``grid``."""
        if patches_per_side == self.patches_per_side:
            return self.position
        learned_1Cdhw = self.position.transpose(1, 2).reshape(1, -1, *self.patches_per_side)
        return (
            nn.functional.interpolate(learned_1Cdhw, size=patches_per_side, mode="trilinear").flatten(2).transpose(1, 2)
        )


class _Swin(nn.Module):
    """(N, 1, D, H, W), sides multiples of 32, -> the layer-normed deepest features (N, 16 width, D/32, H/32, W/32)."""

    def __init__(self, width: int, dropout: float, drop_path: float, checkpointing: bool, *, merging: str) -> None:
        import_monai()
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        self.transformer = SwinTransformer(
            in_chans=1, embed_dim=width, window_size=(7, 7, 7), patch_size=(2, 2, 2), depths=(2, 2, 2, 2),
            num_heads=(3, 6, 12, 24), drop_rate=dropout, drop_path_rate=drop_path, use_checkpoint=checkpointing,
            spatial_dims=3,
        )  # fmt: skip
        if merging == "published":
            use_published_merging(self.transformer)

    def forward(
        self, volumes: torch.Tensor, keep: Sequence[str] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
        """Return the deepest features of volumes (N, 1, D, H, W).

        With ``keep``, names of blocks of `SWIN_BLOCKS`, return a tuple of them and the output (N, C, d, h, w) of each of these.
        """
        scales = self.transformer(volumes, normalize=False)
        deepest_NCdhw: torch.Tensor = scales[-1]
        tokens_NTC = deepest_NCdhw.flatten(2).transpose(1, 2)
        normed: torch.Tensor = nn.functional.layer_norm(tokens_NTC, tokens_NTC.shape[-1:])
        output = normed.transpose(1, 2).reshape(deepest_NCdhw.shape)
        return (output, *(scales[SWIN_BLOCKS.index(name)] for name in keep)) if keep else output
