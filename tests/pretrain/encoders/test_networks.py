"""Encoders: sizes, published parameter counts, gradients, and the changes made to MONAI's networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.encoders import ENCODERS, build_encoder, check_encoder
from pretrain.encoders.layers import pad_to
from pretrain.encoders.networks import SMALLEST
from pretrain.encoders.pooling import as_map
from pretrain.model import ContrastiveModel, Projector
from pretrain.weights.layers import main_blocks
from tests.pretrain.encoders.names import DEEPER_RESNETS, EACH_ENCODER

VBM = (121, 145, 121)
TRANSFORMERS = ("vit-small", "vit-base", "vit-large", "swin-unetr")
# They are others with more of the same blocks; initialising their weights takes long.
DEEPER = ("vit-large", *DEEPER_RESNETS)
FORWARD = [pytest.param(name, marks=pytest.mark.slow) if name in DEEPER else name for name in ENCODERS]


def options_of(name: str) -> dict[str, object]:
    """Options without batch statistics."""
    return {} if name in TRANSFORMERS else {"norm": "group"}


def vit_parameters(width: int, tokens: int, blocks: int = 12) -> int:
    block = 12 * width**2 + 13 * width  # qkv, projection, two layers of four times the width, two norms; with biases
    return blocks * block + (16**3 + 1) * width + tokens * width + width + 2 * width


def resnet_parameters(blocks: tuple[int, ...], expansion: int) -> int:
    """Convolutions without bias but those of the projections, and a norm behind each."""
    total, inputs = 64 * 7**3 + 2 * 64, 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = expansion * width
        for number in range(count):
            if expansion == 1:
                total += 27 * width * (inputs + width) + 4 * width
            else:
                total += width * (inputs + 27 * width + out) + 4 * width + 2 * out
            if number == 0 and (stage or inputs != out):
                total += out * (inputs + 1) + 2 * out
            inputs = out
    return total


# Encoder -> number of parameters, number of features, shape of the deepest map of a 121 x 145 x 121 volume.
KNOWN = {
    "densenet121": (11_831_040 - (1024 + 1) * 512 - (512 + 1) * 128, 1024, (3, 4, 3)),
    "resnet10": (resnet_parameters((1, 1, 1, 1), 1), 512, (4, 5, 4)),
    "resnet18": (33_160_896, 512, (4, 5, 4)),
    "resnet34": (resnet_parameters((3, 4, 6, 3), 1), 512, (4, 5, 4)),
    "resnet50": (46_158_912, 2048, (4, 5, 4)),
    "resnet101": (resnet_parameters((3, 4, 23, 3), 4), 2048, (4, 5, 4)),
    "resnet152": (resnet_parameters((3, 8, 36, 3), 4), 2048, (4, 5, 4)),
    "resnet200": (resnet_parameters((3, 24, 36, 3), 4), 2048, (4, 5, 4)),
    "unet": (14_134_944, 512, (7, 9, 7)),
    "resenc-l": (90_296_576, 320, (4, 5, 4)),
    "vit-small": (vit_parameters(384, 8 * 10 * 8), 384, (8 * 10 * 8 + 1,)),
    "vit-base": (vit_parameters(768, 8 * 10 * 8), 768, (8 * 10 * 8 + 1,)),
    "vit-large": (vit_parameters(1024, 8 * 10 * 8, blocks=24), 1024, (8 * 10 * 8 + 1,)),
    "swin-unetr": (8_062_002, 768, (4, 5, 4)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_features_and_deepest_map_at_the_vbm_grid(name):
    # The meta device computes shapes only. Swin reads its drop-path rates from a tensor, so it is built on the CPU.
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, {})
    encoder.to("meta")
    parameters, features, deepest = KNOWN[name]
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.feature_size == features
    volumes = torch.empty(2, 1, *VBM, device="meta")
    assert encoder(volumes).shape == (2, features)
    assert encoder.trunk(pad_to(volumes, encoder.multiple)).shape[2:] == deepest


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_the_last_map_comes_with_the_features_also_of_transformers(name):
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        encoder = build_encoder(name, {})
    (last_map,), features = encoder.to("meta").maps_and_features(torch.empty(2, 1, *VBM, device="meta"))
    deepest = (8, 10, 8) if name.startswith("vit") else KNOWN[name][2]
    assert last_map.shape == (2, encoder.channels, *deepest)
    assert features.shape == (2, encoder.feature_size)


@pytest.mark.parametrize(
    "name",
    ["densenet121", "resnet18", "unet", "resenc-l", "vit-small", pytest.param("swin-unetr", marks=pytest.mark.jobs)],
)
def test_maps_of_blocks_are_their_outputs_with_the_shapes_that_are_told_also_if_recomputed(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, {**options_of(name), "checkpointing": True}).train()
    volumes, seen = torch.randn(2, 1, 34, 30, 29), {}
    layers = main_blocks(encoder)[-3:]

    def note(layer, output):
        tokens = output.ndim == 3  # (N, T, C), class token first
        seen.setdefault(layer, as_map(output.transpose(1, 2), encoder.patches((34, 30, 29))) if tokens else output)

    for layer in layers:
        encoder.trunk.get_submodule(layer).register_forward_hook(
            lambda _, inputs, output, layer=layer: note(layer, output)
        )
    maps, features = encoder.maps_and_features(volumes, [*layers, None, layers[0]])
    for layer, block_map in zip(layers, maps[:3], strict=True):
        assert torch.equal(block_map, seen[layer])
        assert tuple(block_map.shape[1:]) == encoder.map_of((34, 30, 29), layer)
    assert torch.equal(maps[4], maps[0])
    assert torch.equal(features, encoder(volumes))
    maps[0].square().mean().backward()
    blocks = [encoder.trunk.get_submodule(layer) for layer in layers]
    assert any(p.grad is not None and p.grad.any() for p in blocks[0].parameters())
    assert all(p.grad is None for block in blocks[1:] for p in block.parameters())


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_the_tokens_of_a_vit_are_put_on_the_grid_of_its_patches(pooling):
    torch.manual_seed(0)
    encoder = build_encoder("vit-small", {"grid": [48, 32, 64], "pooling": pooling}).eval()
    # Without blocks each token knows its own patch only.
    encoder.trunk.blocks, encoder.trunk.norm = nn.ModuleList(), nn.Identity()
    volumes = torch.randn(2, 1, 41, 32, 64)
    with torch.no_grad():
        (last_map,), features = encoder.maps_and_features(volumes)
        position = encoder.trunk.position.transpose(1, 2).reshape(1, 384, 3, 2, 4)
        assert torch.equal(last_map, encoder.trunk.patches(pad_to(volumes, 16)) + position)
        assert torch.equal(features, encoder(volumes))


@pytest.mark.parametrize("name", FORWARD)
def test_every_parameter_gets_a_gradient_on_the_coarse_grid(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, options_of(name)).train()
    features = encoder(torch.randn(2, 1, 30, 36, 30))
    assert features.shape == (2, encoder.feature_size)
    assert features.isfinite().all()
    features.square().sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (n, norm)
        for n in ENCODERS
        if n not in DEEPER
        for norm in (("layer",) if n in TRANSFORMERS else ("group", "instance"))
    ],
)
def test_features_of_a_scan_do_not_depend_on_the_batch_without_batch_statistics(name, norm):
    torch.manual_seed(0)
    encoder = build_encoder(name, {"norm": norm}).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    side = SMALLEST.get(name, (1, 1))[1] if norm == "instance" else 32
    volumes = torch.randn(2, 1, side, side, side)
    volumes[1] = 100 * volumes[1] + 10
    with torch.no_grad():
        together, alone = encoder(volumes)[:1], encoder(volumes[:1])
    # Convolutions may sum in another order for another batch size; batch statistics would change the features far more.
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(alone.std()))


@pytest.mark.parametrize("name", [name for name in SMALLEST if name not in DEEPER_RESNETS])
@pytest.mark.parametrize("instance", [False, True])
def test_the_smallest_grid_works_and_a_smaller_one_is_refused(name, instance):
    norm, side = "instance" if instance else "batch", SMALLEST[name][instance]
    encoder = build_encoder(name, {"norm": norm}).to("meta").train()
    encoder(torch.empty(2, 1, side, side, side, device="meta"))
    deepest = encoder.trunk(torch.empty(2, 1, side, side, side, device="meta")).shape[2:]
    assert min(deepest) >= (2 if instance else 1)
    if side == 1:
        return
    below = torch.empty(2, 1, side, side + 9, side - 1, device="meta")
    text = f"scans of {side}x{side + 9}x{side - 1} voxels are too small for {name} .* smallest grid is {side}x{side}x{side}"
    with pytest.raises(UserError, match=text):
        encoder(below)
    with pytest.raises(UserError, match=text):
        check_encoder(name, {"norm": norm}, grid=below.shape[2:])
    if instance:
        assert min(encoder.trunk(below).shape[2:]) < 2
    else:
        with pytest.raises(RuntimeError):
            encoder.trunk(below)


def test_densenet121_has_the_published_number_of_parameters():
    encoder = build_encoder("densenet121", {})
    model = ContrastiveModel(encoder, Projector(1024, 512, 128))
    assert sum(p.numel() for p in model.parameters()) == 11_831_040
    assert not any("norm5" in name for name in model.state_dict())


@pytest.mark.parametrize(("pooling", "dropout"), [("mean", 0.0), ("class", 0.1)])
def test_vit_gives_the_features_of_monais_vit(pooling, dropout):
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    encoder = build_encoder("vit-small", {"grid": [30, 36, 30], "pooling": pooling, "dropout": dropout}).eval()
    monai_vit = ViT(
        1, (32, 48, 32), 16, hidden_size=384, mlp_dim=1536, num_heads=6, classification=pooling == "class",
        num_classes=3, qkv_bias=True,
    ).eval()  # fmt: skip
    names = {
        "patches.": "patch_embedding.patch_embeddings.",
        "position": "patch_embedding.position_embeddings",
        "class_token": "cls_token",
    }
    state = {}
    for key, value in encoder.trunk.state_dict().items():
        for ours, monais in names.items():
            key = key.replace(ours, monais) if key.startswith(ours) else key
        state[key] = torch.randn_like(value) * 0.05 if key == "cls_token" else value
    if pooling == "class":
        encoder.trunk.class_token.data.copy_(state["cls_token"])
    missing, unexpected = monai_vit.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("cross_attn" in key or "classification_head" in key for key in missing)
    volumes = torch.randn(2, 1, 30, 36, 30)
    with torch.no_grad():
        hidden = monai_vit(pad_to(volumes, 16))[1][-1]
        tokens = monai_vit.norm(hidden)
        expected = tokens[:, 0] if pooling == "class" else tokens.mean(dim=1)
        torch.testing.assert_close(encoder(volumes), expected, rtol=1e-4, atol=1e-5)


def test_vit_positions_are_interpolated_between_the_centres_of_patches():
    encoder = build_encoder("vit-small", {"grid": [64, 32, 16], "pooling": "mean"})
    centres = torch.arange(4.0) + 0.5
    encoder.trunk.position.data.copy_(centres[:, None, None].expand(4, 2, 384).reshape(1, 8, 384))
    finer = encoder.trunk._position((8, 2, 1)).unflatten(1, (8, 2, 1))
    expected = ((torch.arange(8.0) + 0.5) / 2).clamp(0.5, 3.5)
    torch.testing.assert_close(finer[0, :, 1, 0, 7], expected)
    assert encoder.trunk._position((4, 2, 1)) is encoder.trunk.position


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit-small", {"dropout": 0.5}),
        ("vit-small", {"drop_path": 0.9}),
        ("swin-unetr", {"drop_path": 0.9}),
        ("unet", {"dropout": 0.5}),
    ],
)
def test_dropout_acts_in_training_and_never_in_evaluation(name, options):
    torch.manual_seed(0)
    plain, dropping = build_encoder(name, options_of(name)), build_encoder(name, options_of(name) | options)
    dropping.load_state_dict(plain.state_dict())
    volumes = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(dropping.eval()(volumes), plain.eval()(volumes), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(dropping.train()(volumes), plain(volumes), rtol=1e-2)


@pytest.mark.parametrize(("name", "dilated"), [("resnet10", False), ("resnet18", True)])
def test_a_padded_shortcut_is_a_projection_that_copies_channels(name, dilated):
    """With these weights of the projection, zero running means and variances of 1 both networks compute the same."""
    torch.manual_seed(0)
    options = {"width": 0.25, "dilated": dilated}
    projected, padded = (build_encoder(name, {**options, "shortcut": s}).eval() for s in ("projection", "padding"))
    missing, unexpected = padded.load_state_dict(projected.state_dict(), strict=False)
    assert missing == []
    assert unexpected
    assert all(".downsample." in key for key in unexpected)
    for key, value in projected.state_dict().items():
        if key.endswith("downsample.0.weight"):
            out, inputs = value.shape[:2]
            value.copy_(torch.eye(out)[:, :inputs].reshape(value.shape))
        elif key.endswith("downsample.0.bias"):
            value.zero_()
        elif key.endswith("downsample.1.running_var"):
            value.fill_(1 - 1e-5)
    volumes = torch.randn(2, 1, 37, 40, 33)
    with torch.no_grad():
        expected, found = projected(volumes), padded(volumes)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_first_token_of_a_vit_is_that_of_the_corner():
    torch.manual_seed(0)
    encoder = build_encoder("vit-small", {"grid": [32, 48, 32], "pooling": "first"}).eval()
    with torch.no_grad():
        (last_map,), features = encoder.maps_and_features(torch.randn(2, 1, 32, 48, 32))
    assert torch.equal(features, last_map[:, :, 0, 0, 0])


def test_width_scales_the_features():
    assert build_encoder("resnet18", {"width": 0.25}).feature_size == 128
    assert build_encoder("resnet50", {"width": 0.25, "norm": "group"}).feature_size == 512
