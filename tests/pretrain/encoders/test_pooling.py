"""Poolings that keep places: order of the features, all encoders, blocks inside them, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.encoders import ENCODERS, build_encoder, check_encoder
from pretrain.encoders.pooling import POOLINGS, as_map, grid_mean, map_shapes
from pretrain.weights.layers import block_names, features_of_blocks, intermediate_features, main_blocks

SMALL = {"norm": "group", "width": 0.125}
TRANSFORMERS = ("vit-small", "vit-base", "vit-large", "swin-unetr")
# Real forward passes; the other encoders are larger ones of the same code.
COMPUTED = {
    "densenet121": {"norm": "group"}, "resnet18": SMALL, "resnet50": SMALL, "unet": {"norm": "group"},
    "vit-small": {"grid": [64, 64, 64], "pooling": "mean"}, "swin-unetr": {},
}  # fmt: skip
FAST = [name for name in COMPUTED if name != "swin-unetr"]
SIDES = (64, 64, 64)


def naive_grid(values, cells):
    """Means over cells by loops: (N, C, d, h, w) -> (N, C cells³), in the documented order."""
    scans, channels, *sides = values.shape
    result = np.empty((scans, channels * cells**3))

    def span(cell, side):
        return slice(math.floor(cell * side / cells), math.ceil((cell + 1) * side / cells))

    for c in range(channels):
        for i in range(cells):
            for j in range(cells):
                for k in range(cells):
                    cell = values[:, c, span(i, sides[0]), span(j, sides[1]), span(k, sides[2])]
                    result[:, c * cells**3 + i * cells**2 + j * cells + k] = cell.reshape(scans, -1).mean(1)
    return result


@pytest.mark.parametrize(("sides", "cells"), [((5, 7, 4), 2), ((5, 7, 4), 3), ((3, 3, 3), 3), ((9, 4, 6), 4)])
def test_a_grid_is_the_mean_of_each_cell_in_the_documented_order(sides, cells):
    torch.manual_seed(0)
    values = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    pooled = POOLINGS[f"grid{cells}"](values)
    np.testing.assert_allclose(pooled.detach().numpy(), naive_grid(values.detach().numpy(), cells), atol=1e-12)
    torch.testing.assert_close(pooled, nn.AdaptiveAvgPool3d(cells)(values).flatten(1))
    direction = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * direction).sum(), values)
    (expected,) = torch.autograd.grad((nn.AdaptiveAvgPool3d(cells)(values).flatten(1) * direction).sum(), values)
    torch.testing.assert_close(gradient, expected)


def test_without_pooling_a_channel_has_its_positions_in_the_order_of_the_volume():
    values = torch.arange(2 * 3 * 2 * 4 * 5.0).view(2, 3, 2, 4, 5)
    features = POOLINGS["none"](values)
    assert float(features[1, 2 * 40 + 1 * 20 + 3 * 5 + 4]) == float(values[1, 2, 1, 3, 4])


def test_a_grid_in_bfloat16_on_a_cpu():
    values = torch.randn(2, 3, 5, 7, 4).bfloat16()
    pooled = grid_mean(values, 3)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), grid_mean(values.float(), 3), rtol=0.02, atol=0.01)


def test_a_map_with_fewer_positions_than_cells_is_refused():
    with pytest.raises(
        UserError, match=r"pooling grid3 needs a map of 3 or more .* the map is 3x2x3; choose fewer cells"
    ):
        grid_mean(torch.zeros(1, 1, 3, 2, 3), 3)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_knows_the_size_of_its_map(name):
    options = {"grid": [*SIDES]} if name.startswith("vit") else {}
    with torch.device("cpu" if name == "swin-unetr" else "meta"):
        cells = build_encoder(name, {**options, "pooling": "grid2"})
        every = build_encoder(name, {**options, "pooling": "none", "grid": [*SIDES]})
    volumes = torch.empty(2, 1, *SIDES, device="meta")
    channels, *shape = every.map_of(SIDES)
    assert cells.to("meta")(volumes).shape == (2, cells.feature_size) == (2, 8 * channels)
    assert every.to("meta")(volumes).shape == (2, every.feature_size) == (2, channels * math.prod(shape))
    assert min(shape) >= 2


@pytest.mark.parametrize("name", COMPUTED)
def test_places_of_every_kind_of_encoder_are_those_of_its_last_map(name):
    torch.manual_seed(0)
    options = COMPUTED[name]
    mean = build_encoder(name, options).eval()
    cells = build_encoder(name, {**options, "pooling": "grid2"}).eval()
    every = build_encoder(name, {**options, "pooling": "none", "grid": [*SIDES]}).eval()
    cells.load_state_dict(mean.state_dict())
    every.load_state_dict(mean.state_dict())
    volumes = torch.randn(1, 1, *SIDES)
    with torch.no_grad():
        whole = every(volumes)
        last = whole.view(1, *every.map_of(SIDES))
        torch.testing.assert_close(last.mean(dim=(2, 3, 4)), mean(volumes))
        np.testing.assert_allclose(cells(volumes).numpy(), naive_grid(last.numpy(), 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(intermediate_features(mean, None, ["grid2"])(volumes), cells(volumes))
        torch.testing.assert_close(intermediate_features(mean, None, ["none"])(volumes), whole)


def test_tokens_are_put_on_their_grid_without_the_class_token():
    torch.manual_seed(0)
    encoder = build_encoder("vit-small", {"grid": [32, 48, 64]}).eval()  # pooling class
    volumes, seen = torch.randn(2, 1, 32, 40, 64), []
    encoder.trunk.blocks[3].register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        features = intermediate_features(encoder, "blocks.3", ["none"])(volumes)
    tokens_NTC = seen[0]
    assert tokens_NTC.shape == (2, 1 + 2 * 3 * 4, 384)
    place = (1 * 3 + 2) * 4 + 3  # (1, 2, 3) of 2 x 3 x 4 patches
    assert torch.equal(features.view(2, 384, 2, 3, 4)[:, :, 1, 2, 3], tokens_NTC[:, 1 + place])
    assert torch.equal(as_map(tokens_NTC.transpose(1, 2), (2, 3, 4)).flatten(1), features)
    with pytest.raises(UserError, match="this block's output has the shape 2x384x25"):
        as_map(tokens_NTC.transpose(1, 2), (2, 3, 5))
    encoder.use_pooling("grid2", (32, 40, 64))
    with torch.no_grad():
        assert encoder(volumes).shape == (2, encoder.feature_size) == (2, 384 * 8)


@pytest.mark.parametrize("name", [*FAST, pytest.param("swin-unetr", marks=pytest.mark.jobs)])
def test_several_blocks_are_read_in_one_pass_as_one_by_one(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, COMPUTED[name]).eval()
    names = main_blocks(encoder)
    assert set(names) <= set(block_names(encoder))
    blocks = [(None, ("mean",)), (None, ("grid2",)), *((name, ("mean", "none")) for name in names[-3:])]
    volumes, passes = torch.randn(1, 1, *SIDES), []
    encoder.trunk.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        together = features_of_blocks(encoder, blocks)(volumes)
        assert passes == [1]
        for block, features in zip(blocks, together, strict=True):
            assert torch.equal(intermediate_features(encoder, *block)(volumes), features)
    shapes = map_shapes(encoder.trunk, names[-3:], SIDES)
    sizes = [shape[-1] if len(shape) == 2 else shape[0] for shape in shapes]  # tokens have their channels last
    whole = [size + math.prod(shape) for size, shape in zip(sizes, shapes, strict=True)]
    assert [features.shape[1] for features in together[2:]] == whole
    assert not [hook for module in encoder.trunk.children() for hook in module._forward_hooks]


def test_a_block_is_read_before_the_next_layer_changes_it_in_place():
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", SMALL).eval()
    volumes = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        expected = encoder.trunk.bn1(encoder.trunk.conv1(volumes)).flatten(1)
        assert torch.equal(intermediate_features(encoder, "bn1", ["none"])(volumes), expected)
    assert float(expected.min()) < 0


def test_the_blocks_of_transformers_are_named():
    with torch.device("meta"):
        vit = build_encoder("vit-small", {})
    assert main_blocks(vit) == [f"blocks.{number}" for number in range(12)]
    assert main_blocks(build_encoder("swin-unetr", {}))[-4:] == [f"transformer.layers{n}.0" for n in (1, 2, 3, 4)]
    with pytest.raises(UserError, match="layer='blocks' is not a block of this encoder"):
        intermediate_features(vit, "blocks")


def test_none_needs_a_grid_and_scans_of_that_grid():
    with pytest.raises(UserError, match=r"pooling='none' needs encoder.options.grid, .* as \[121, 145, 121\]"):
        check_encoder("resnet18", {"pooling": "none"})
    encoder = build_encoder("resnet18", {**SMALL, "pooling": "none", "grid": [32, 40, 32]}).eval()
    assert encoder.feature_size == 64 * 1 * 2 * 1
    with pytest.raises(UserError, match="has 128 features, and scans of 64x40x32 voxels give it 256; .* only on scans"):
        encoder(torch.zeros(1, 1, 64, 40, 32))
    with pytest.raises(UserError, match=r"encoder.options.grid=\[1, 2\] is not possible; allowed: three sides"):
        check_encoder("resnet18", {"grid": [1, 2]})
    with pytest.raises(UserError, match="pooling none gives 1310720 features; at most 1048576"):
        build_encoder("resnet18", {"max_pool": False, "width": 1, "pooling": "none", "grid": [128, 160, 128]}) \
            .use_pooling("none", (256, 160, 256))  # fmt: skip


def test_the_weights_do_not_depend_on_the_pooling():
    torch.manual_seed(0)
    plain = build_encoder("resnet18", SMALL)
    torch.manual_seed(0)
    spatial = build_encoder("resnet18", {**SMALL, "pooling": "none", "grid": [64, 64, 64]})
    for name, value in plain.state_dict().items():
        assert torch.equal(spatial.state_dict()[name], value), name
    assert spatial.training
