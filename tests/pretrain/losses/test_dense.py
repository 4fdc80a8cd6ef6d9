"""The dense loss: cells are found, sampled and compared as in loops; a mirrored view gives the same cells."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.view_details import ViewDetails
from pretrain.encoders.centres import MapAxis
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from pretrain.losses.dense import dense_loss, sample_cells, visible_positions
from tests.reference import naive, terms

SIDES = (14, 16, 12)
AXES = (MapAxis(1.5, 4.5), MapAxis(4.0, 8.0), MapAxis(-0.5, 4.0))  # of a map of 3 x 2 x 4 positions
MOVED = {
    "preset": "none",
    "flip": {"p": 0.5},
    "affine": {"p": 0.7, "degrees": 25.0, "zoom": 0.2, "shift": 0.15},
    "crop": {"p": 0.5, "side": 0.8},
    "cutout": {"p": 0.5, "side": 0.4},
}


def moved(scans=6, masked=0.0):
    """Placement (2, B, 3, 4), cutout (2, B, 2, 3), float64, and masked (2, B, 8, 8, 8) of real draws."""
    details = ViewDetails(load_augmentation(MOVED), SIDES, seed=1, masked=masked)
    arrays = details(np.arange(scans), np.zeros(scans, np.int64))
    placement, cutout, masks = (torch.from_numpy(arrays[name]) for name in ("placement", "cutout", "masked"))
    return placement.double(), cutout.double(), masks


@pytest.mark.parametrize(("grid", "masked"), [(2, 0.0), (3, 0.0), (2, 0.3), (3, 0.4)])
def test_cells_are_sampled_where_the_transform_puts_them_from_what_is_not_hidden(grid, masked):
    details = [tensor.flatten(0, 1) for tensor in moved(masked=masked)]
    values = torch.randn(12, 4, 3, 2, 4, dtype=torch.float64)
    found, shown = sample_cells(values, *details, grid=grid, axes=AXES, sides=SIDES)
    visible = visible_positions(*details[1:], AXES, SIDES, (3, 2, 4))
    assert 0.05 < shown.double().mean() < 0.95
    for view in range(12):
        placement, cutout, mask = (tensor[view] for tensor in details)
        for number, cell in enumerate(itertools.product(range(grid), repeat=3)):
            places = terms.shown_places(placement, cutout, mask, cell, grid)
            expected, weight = terms.sampled(values[view], places, visible[view], AXES, SIDES)
            torch.testing.assert_close(found[view, number], expected, rtol=1e-10, atol=1e-12)
            assert bool(shown[view, number]) == (weight >= 4 - 0.01)


@pytest.mark.parametrize("masked", [0.0, 0.3, 0.6])
def test_positions_are_left_out_of_whose_cell_more_than_half_is_hidden(masked):
    _, cutout, masks = (tensor.flatten(0, 1) for tensor in moved(2, masked))
    visible = visible_positions(cutout, masks, AXES, SIDES, (3, 2, 4))
    assert visible.double().mean() < 1
    for view, *position in itertools.product(range(4), range(3), range(2), range(4)):
        expected = terms.is_visible(position, cutout[view], masks[view], AXES, SIDES)
        assert expected is None or bool(visible[(view, *position)]) == expected


def test_half_of_a_cell_is_enough_to_be_visible_and_a_position_of_a_hidden_cell_does_not_count():
    masked = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    masked[0, :4, :, :3], masked[0, 4:, :, :4] = True, True  # three quarters of the cells of index 0, and all
    axes, nothing = (MapAxis(4.0, 8.0),) * 3, torch.zeros(1, 2, 3)
    visible = visible_positions(nothing, masked, axes, (16, 16, 16), (2, 2, 2))
    assert not visible[:, :, :, 0].any()
    assert visible[:, :, :, 1].all()
    half = masked.clone()
    half[:, :, :, 2:] = False
    assert visible_positions(nothing, half, axes, (16, 16, 16), (2, 2, 2)).all()
    values = torch.zeros(1, 1, 2, 2, 2, dtype=torch.float64)
    values[..., 0], values[..., 1] = 1e6, 5.0
    cells, shown = sample_cells(
        values, torch.eye(3, 4, dtype=torch.float64)[None], nothing, masked, grid=2, axes=axes, sides=(16, 16, 16)
    )  # fmt: skip
    assert shown.view(2, 2, 2).tolist() == [[[False, True]] * 2] * 2
    assert cells[shown].tolist() == [[5.0]] * 4


def test_the_map_of_a_mirrored_view_gives_the_same_cells_only_with_the_centres_of_that_view():
    identity = torch.eye(3, 4, dtype=torch.float64)[None]
    mirror = identity.clone()
    mirror[0, 0] = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    values = torch.randn(1, 5, 4, 3, 2, dtype=torch.float64)
    nothing = {"cutout_N23": torch.zeros(1, 2, 3), "masked_Nnnn": torch.zeros(1, 2, 2, 2, dtype=torch.bool)}
    plain = partial(sample_cells, grid=3, sides=(8, 6, 4), **nothing)
    even = (MapAxis(1.0, 2.0),) * 3
    low, high = ((MapAxis(first, 2.0), *even[1:]) for first in (0.5, 1.5))  # a voxel's half lower, and its mirror image
    for here, there in ((even, even), (low, high)):
        torch.testing.assert_close(plain(values.flip(2), mirror, axes=here)[0], plain(values, identity, axes=there)[0])
    assert not torch.allclose(plain(values.flip(2), mirror, axes=low)[0], plain(values, identity, axes=low)[0])


def batch():
    """Cells (2, 6, K, P), which are shown, three proxies (age, sex, head size) with missing values, and subjects."""
    source = torch.Generator().manual_seed(3)
    cells = torch.randn(2, 6, 27, 5, generator=source, dtype=torch.float64, requires_grad=True)
    proxies = torch.tensor(
        [[20.0, 0], [24, 1], [31, 0], [60, math.nan], [math.nan, 1], [63, 0]], dtype=torch.float64
    )  # fmt: skip
    values = torch.zeros(12, 1, 3, 2, 4)
    _, shown = sample_cells(values, *(tensor.flatten(0, 1) for tensor in moved()), grid=3, axes=AXES, sides=SIDES)
    return cells, shown.view(2, 6, 27).all(dim=0), proxies, torch.tensor([0, 1, 2, 0, 4, 5])


@pytest.mark.parametrize("subjects", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_cell_by_cell_equals_the_naive_loops(name, subjects):
    cells, shown, proxies, people = batch()
    shown[1:3], shown[:, 4] = True, False
    shown[1:, 7] = False  # one scan alone is left out
    kernel, weight = KERNELS["gaussian"](bandwidth=8.0), naive.pair_weight("gaussian", 8.0)

    def of_cell(views, its_proxies, gather, its_subjects):
        return LOSSES[name](views, its_proxies, kernel=kernel, gather=gather, subjects=its_subjects)

    found = dense_loss(cells, shown, proxies, loss=of_cell, subjects=people if subjects else None)
    twin = terms.dense(
        cells, shown.tolist(), proxies, naive.TWINS[name], weight, people.tolist() if subjects else None
    )  # fmt: skip
    (gradient,), (expected,) = torch.autograd.grad(found, cells), torch.autograd.grad(twin, cells)
    assert found.item() == pytest.approx(twin.item(), rel=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-10 * expected.abs().max().item())
    assert (gradient[:, ~shown] == 0).all()


def test_cells_that_no_two_scans_show_give_zero():
    cells, shown, proxies, _ = batch()
    value = dense_loss(cells, torch.zeros_like(shown), proxies, loss=lambda *arguments: 1 / 0)
    assert value.item() == 0.0
    assert (torch.autograd.grad(value, cells)[0] == 0).all()
