"""Reconstruction: hidden voxels and their error against loops, the decoder's interpolation, and its size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrain.encoders.centres import MapAxis
from pretrain.losses.reconstruction import Decoder, doublings_for, hidden_voxels, reconstruction_error, squared_errors
from tests.reference import terms

SIDES = (7, 9, 5)


def details(scans=2, patches=3):
    source = torch.Generator().manual_seed(0)
    masked = torch.rand(2, scans, patches, patches, patches, generator=source) < 0.3
    low = 0.5 * torch.rand(2, scans, 3, generator=source)
    cutout = torch.stack([low, low + 0.4], dim=2)
    cutout[0, 1] = 0.0  # no box
    return masked, cutout


def test_hidden_voxels_are_those_of_masked_patches_and_of_the_box():
    masked, cutout = details()
    hidden = hidden_voxels(masked, cutout, SIDES)
    assert hidden.shape == (2, 2, 1, *SIDES)
    for view in range(2):
        for scan in range(2):
            expected = terms.hidden_voxels(masked[view, scan], cutout[view, scan], SIDES)
            assert torch.equal(hidden[view, scan, 0], expected)
    assert not hidden_voxels(torch.zeros_like(masked), torch.zeros_like(cutout), SIDES).any()


def test_the_error_is_the_mean_over_all_hidden_voxels_and_the_others_have_no_gradient():
    source = torch.Generator().manual_seed(1)
    views, rebuilt = torch.randn(2, 2, 2, 1, *SIDES, generator=source, dtype=torch.float64)
    rebuilt.requires_grad_()
    hidden = hidden_voxels(*details(), SIDES)
    found = reconstruction_error(squared_errors(rebuilt, views, hidden))
    expected = terms.reconstruction(rebuilt, views, hidden)
    (gradient,), (naive_gradient,) = (torch.autograd.grad(value, rebuilt) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, naive_gradient, rtol=1e-12, atol=1e-15)
    assert (gradient[~hidden] == 0).all()
    nothing = reconstruction_error(squared_errors(rebuilt, views, torch.zeros_like(hidden)))
    assert nothing.item() == 0.0


@pytest.mark.parametrize(("channels", "parameters"), [(1024, 87_169), (512, 54_401)])
def test_the_size_of_the_decoder_is_the_documented_one(channels, parameters):
    assert sum(p.numel() for p in Decoder(channels).parameters()) == parameters


def test_the_decoders_output_is_interpolated_to_the_volume_without_its_padding():
    decoder = Decoder(4).double()
    last_map = torch.randn(3, 4, 2, 1, 3, dtype=torch.float64)
    # The positions divide the sides with 1 + 2, 0 + 0 and 2 + 2 voxels of padding.
    found = decoder.rebuild(last_map, (13, 9, 20), (MapAxis(3.0, 8.0), MapAxis(4.5, 9.0), MapAxis(2.0, 8.0)))
    padded = functional.interpolate(decoder(last_map), size=(16, 9, 24), mode="trilinear", align_corners=False)
    torch.testing.assert_close(found, padded[:, :, 1:14, :, 2:22], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("step", "doublings"), [(32.0, 3), (8.0, 3), (4.0, 2), (2.0, 1), (1.0, 0)])
def test_the_output_is_not_finer_than_the_volume(step, doublings):
    assert doublings_for(step) == doublings
    decoder = Decoder(4, "layer", doublings).double()
    values = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    parts = 2**doublings
    decoded, sides = decoder(values), (2 * int(step),) * 3
    assert decoded.shape[2:] == (2 * parts,) * 3
    if step > parts:
        return
    # The parts of a position's cell are voxels; a centre that lies a voxel lower moves all of them.
    even, lower = (decoder.rebuild(values, sides, (MapAxis(first, step),) * 3) for first in (step / 2, step / 2 - 1))
    torch.testing.assert_close(even, decoded)
    torch.testing.assert_close(lower[..., :-1, :-1, :-1], decoded[..., 1:, 1:, 1:])
