"""The names inside MONAI's networks that the encoders use: a missing or renamed one raises, and is not passed over."""

from __future__ import annotations

import pytest
from monai.networks import nets
from torch import nn

from infra.internals import LibraryChanged
from pretrain.encoders import build_encoder

# Encoder, options, MONAI's network, submodule, and the name in it that is removed.
NAMES = [
    *[("resnet18", {}, "resnet18", "", name) for name in ("conv1", "bn1", "act", "maxpool", "layer1", "layer4")],
    ("vit-small", {}, "ViT", "", "patch_embedding"),
    ("vit-small", {}, "ViT", "", "blocks"),
    ("vit-small", {}, "ViT", "", "norm"),
    ("vit-small", {}, "ViT", "patch_embedding", "patch_embeddings"),
    ("vit-small", {}, "ViT", "patch_embedding", "position_embeddings"),
    *[("vit-small", {}, "ViT", "blocks.3", name) for name in ("attn", "mlp", "norm_cross_attn")],
    ("vit-small", {}, "ViT", "blocks.3.attn", "use_flash_attention"),
    ("vit-small", {"drop_path": 0.1}, "ViT", "blocks.3.attn", "drop_output"),
    ("vit-small", {"drop_path": 0.1}, "ViT", "blocks.3.mlp", "drop2"),
]


def changed(monkeypatch, network, change):
    """Let MONAI's constructor return a network that ``change`` was applied to."""
    build = getattr(nets, network)

    def build_and_change(*arguments, **options):
        built = build(*arguments, **options)
        change(built)
        return built

    monkeypatch.setattr(nets, network, build_and_change)


@pytest.mark.parametrize(("name", "options", "network", "submodule", "attribute"), NAMES)
def test_a_missing_name_raises(monkeypatch, name, options, network, submodule, attribute):
    build_encoder(name, options)
    changed(monkeypatch, network, lambda built: delattr(built.get_submodule(submodule), attribute))
    with pytest.raises(LibraryChanged, match=f"monai 1.*has no attribute '{attribute}'"):
        build_encoder(name, options)


def test_a_renamed_layer_of_densenet_raises(monkeypatch):
    def rename(network):
        features = nn.Sequential()
        for name, layer in network.features.named_children():
            features.add_module(name.replace("denseblock", "block"), layer)
        network.features = features

    changed(monkeypatch, "DenseNet121", rename)
    with pytest.raises(LibraryChanged, match="DenseNet121 has the layers conv0, .*, block1, .*; expected conv0"):
        build_encoder("densenet121", {})


@pytest.mark.parametrize(("name", "network"), [("resnet18", "resnet18"), ("densenet121", "DenseNet121")])
def test_a_network_without_batch_normalisation_raises(monkeypatch, name, network):
    def without_norms(built):
        for module in list(built.modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, nn.BatchNorm3d):
                    setattr(module, child, nn.Identity())

    changed(monkeypatch, network, without_norms)
    with pytest.raises(LibraryChanged, match="has no batch normalisation"):
        build_encoder(name, {"norm": "group"})
