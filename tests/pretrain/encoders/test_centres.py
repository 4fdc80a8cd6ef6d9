"""Centres of receptive fields: those of every encoder and block are where the gradient of an averaging copy has its centre."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infra.errors import UserError
from pretrain.encoders import build_encoder
from pretrain.encoders.centres import MapAxis, map_axes
from pretrain.losses.dense import sample_cells
from pretrain.weights.layers import main_blocks

CONVOLUTIONAL = ("densenet121", "resnet18", "resnet50", "unet", "resenc-l")
REMOVED = (nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm3d, nn.LayerNorm, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout3d)
LONG = 512  # voxels of the axis on which the centre is measured: more than the receptive fields


class Average(nn.Module):
    """The mean of a kernel's window over its voxels inside the map, one axis after another, and over channels."""

    def __init__(self, kernel):
        super().__init__()
        options = (kernel.kernel_size, kernel.stride, kernel.padding)
        self.windows = list(
            zip(*((option,) * 3 if isinstance(option, int) else option for option in options), strict=True)
        )

    def forward(self, features):
        features = features.mean(1, keepdim=True)
        for axis, (size, stride, padding) in enumerate(self.windows, start=2):
            side = features.shape[axis]
            mean = torch.zeros((side + 2 * padding - size) // stride + 1, side, dtype=features.dtype)
            for place, row in enumerate(mean):
                row[max(0, place * stride - padding) : place * stride - padding + size] = 1.0
            mean /= mean.sum(dim=1, keepdim=True)
            features = (features.movedim(axis, -1) @ mean.T).movedim(-1, axis)
        return features


class Unchanged(nn.Module):
    """In place of a transformer's block."""

    def forward(self, features, mask=None):
        return features


def averaging(module):
    """Replace convolutions and max-pooling inside a module by averages, and leave out norms and activations."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d | nn.MaxPool3d):
            setattr(module, name, Average(child))
        elif isinstance(child, REMOVED):
            setattr(module, name, nn.Identity())
        else:
            averaging(child)
    return module


def centre_of_mass(output, volumes, axis):
    """Index of the central position of a map (1, C, d, h, w) along an axis, and the centre of its gradient in voxels."""
    place = [side // 2 for side in output.shape[2:]]
    vector = output[0, :, place[0], place[1], place[2]]
    # Unequal weights: the sum of a vector after a layer norm is constant.
    gradient = torch.autograd.grad((vector * torch.arange(1.0, len(vector) + 1)).sum(), volumes, retain_graph=True)[0]
    mass = gradient[0, 0].abs().sum(dim=[other for other in range(3) if other != axis])
    voxels = torch.arange(len(mass), dtype=mass.dtype) + 0.5
    return place[axis], float((mass * voxels).sum() / mass.sum())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_positions_of_a_convolutional_encoder_lie_where_an_average_over_its_kernels_has_its_centre(name):
    encoder = build_encoder(name, {})
    layers, axis = main_blocks(encoder)[1::2], CONVOLUTIONAL.index(name) % 3
    sides = [32, 36, 40]
    sides[axis] = LONG
    expected = {layer: encoder.map_axes(sides, layer)[axis] for layer in (*layers, None)}
    volumes = torch.zeros(1, 1, *sides, dtype=torch.float64, requires_grad=True)
    last, *kept = averaging(encoder.trunk).eval()(volumes, tuple(layers))
    for layer, output in (*zip(layers, kept, strict=True), (None, last)):
        place, centre = centre_of_mass(output, volumes, axis)
        first, step = expected[layer]
        assert centre == pytest.approx(first + place * step, abs=1e-3 * step), layer
        assert output.shape[2 + axis] == pytest.approx(sides[axis] / step, abs=1)


@pytest.mark.parametrize("name", ["vit-small", "swin-unetr"])
def test_positions_of_a_transformer_lie_in_the_middle_of_their_patches(name):
    """Its blocks are taken out, since attention mixes all places; the kernels are equal over voxels."""
    torch.manual_seed(0)
    encoder = build_encoder(name, {"grid": [90, 64, 75]}).double()
    for kind, module in ((type(module).__name__, module) for module in list(encoder.modules())):
        if hasattr(module, "blocks"):
            module.blocks = nn.ModuleList(Unchanged() for _ in module.blocks)
        elif kind.startswith("PatchMerging"):
            module.norm = nn.Identity()
            weight = module.reduction.weight.data
            weight.copy_(torch.rand(len(weight), weight.shape[1] // 8).repeat(1, 8))
        elif isinstance(module, nn.Conv3d):
            module.weight.data.copy_(torch.rand(len(module.weight), 1, 1, 1, 1).expand_as(module.weight))
    layers = ["blocks.3"] if name == "vit-small" else main_blocks(encoder)
    sides = (90, 64, 75)  # padded by 3 + 3, 0, and 10 + 11 or 2 + 3 voxels
    volumes = torch.zeros(1, 1, *sides, dtype=torch.float64, requires_grad=True)
    maps, _ = encoder.eval().maps_and_features(volumes, [*layers, None])
    for layer, output in zip([*layers, None], maps, strict=True):
        for axis, (first, step) in enumerate(encoder.map_axes(sides, layer)):
            place, centre = centre_of_mass(output, volumes, axis)
            assert centre == pytest.approx(first + place * step, abs=1e-6), (layer, axis)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_cell_seen_through_a_strided_network_is_where_it_is_in_the_scan_also_if_mirrored(mirrored):
    """The averaging ResNet18 sees the place itself as the volume's intensity, and so each cell must have its own place."""
    encoder = build_encoder("resnet18", {})
    sides = (256, 34, 34)
    axes = encoder.map_axes(sides, "layer2")
    places = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    scan = places[:, None, None].expand(sides)
    placement = torch.eye(3, 4, dtype=torch.float64)[None]
    if mirrored:
        scan, placement[0, 0] = scan.flip(0), torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    network = averaging(encoder.trunk).eval()
    # Each residual block doubles its input.
    seen = network(scan[None, None], ("layer2",))[1] / network(torch.ones_like(scan)[None, None], ("layer2",))[1]
    nothing = torch.zeros(1, 2, 3), torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    cells, shown = sample_cells(seen, placement, *nothing, grid=6, axes=axes, sides=sides)
    found = cells.view(6, 6, 6)[1:5, 3, 3]  # the outer cells have kernels that reach beyond the volume
    torch.testing.assert_close(found, (torch.arange(1, 5, dtype=torch.float64) + 0.5) / 6, rtol=0, atol=1e-6)
    assert shown.all()


def test_paths_that_change_the_shape_in_an_unknown_way_are_refused_in_one_line():
    class Cut(nn.Sequential):
        def forward(self, volumes):
            return super().forward(volumes)[..., 1:, 1:, 1:]

    with pytest.raises(UserError, match=r"^cut: the receptive fields of the last map cannot be followed") as caught:
        map_axes(Cut(nn.Conv3d(1, 2, 3, padding=1)), None, multiple=1, name="cut")
    assert "\n" not in str(caught.value)


def test_the_centres_of_kernels_are_those_of_the_arithmetic():
    strided = nn.Sequential(
        nn.Conv3d(1, 1, (3, 2, 5), stride=(2, 2, 1), padding=(1, 0, 0), dilation=(1, 1, 2)), nn.ReLU()
    )
    assert map_axes(strided, None, multiple=1, name="strided") == (
        MapAxis(0.5, 2.0),
        MapAxis(1.0, 2.0),
        MapAxis(4.5, 1.0),
    )
