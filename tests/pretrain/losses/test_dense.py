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
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from pretrain.losses.dense import SHOWN_POINTS, cells_shown, dense_loss, sample_cells
from tests.reference import naive, terms

SIDES, PADDING = (14, 16, 12), [(1, 1), (0, 0), (2, 2)]
MOVED = {
    "preset": "none",
    "flip": {"p": 0.5},
    "affine": {"p": 0.7, "degrees": 25.0, "zoom": 0.2, "shift": 0.15},
    "crop": {"p": 0.5, "side": 0.8},
    "cutout": {"p": 0.5, "side": 0.4},
}


def moved(scans=6):
    """Placement (2, B, 3, 4) and cutout (2, B, 2, 3) of real draws, float64."""
    arrays = ViewDetails(load_augmentation(MOVED), SIDES, seed=1)(np.arange(scans), np.zeros(scans, np.int64))
    return tuple(torch.from_numpy(arrays[name]).double() for name in ("placement", "cutout"))


@pytest.mark.parametrize("grid", [2, 3])
def test_cells_are_sampled_where_the_transform_puts_them(grid):
    placement, cutout = moved()
    last_map = torch.randn(2, 6, 4, 3, 2, 4, dtype=torch.float64)
    flat = [tensor.flatten(0, 1) for tensor in (last_map, placement, cutout)]
    found = sample_cells(*flat, grid=grid, sides=SIDES, padding=PADDING).view(2, 6, grid**3, 4)
    shown = cells_shown(placement, cutout, grid)
    assert 0.2 < shown.double().mean() < 0.95
    for scan in range(6):
        for number, cell in enumerate(itertools.product(range(grid), repeat=3)):
            in_both = []
            for view in range(2):
                places = terms.shown_places(placement[view, scan], cutout[view, scan], cell, grid)
                in_both.append(len(places) >= SHOWN_POINTS)
                values = [terms.interpolated(last_map[view, scan], place, SIDES, PADDING) for place in places]
                expected = torch.stack(values).mean(dim=0) if values else torch.zeros(4, dtype=torch.float64)
                torch.testing.assert_close(found[view, scan, number], expected, rtol=1e-10, atol=1e-12)
            assert bool(shown[scan, number]) == all(in_both)


def test_the_map_of_a_mirrored_view_gives_the_same_cells():
    identity = torch.eye(3, 4, dtype=torch.float64)[None]
    mirror = identity.clone()
    mirror[0, 0] = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    last_map = torch.randn(1, 5, 4, 3, 2, dtype=torch.float64)
    plain = partial(sample_cells, cutout_N23=torch.zeros(1, 2, 3), grid=3, sides=(8, 6, 4), padding=[(0, 0)] * 3)
    torch.testing.assert_close(plain(last_map.flip(2), mirror), plain(last_map, identity))
    assert not torch.allclose(plain(last_map.flip(2), identity), plain(last_map, identity))


def batch():
    """Cells (2, 6, K, P), which are shown, three proxies (age, sex, head size) with missing values, and subjects."""
    source = torch.Generator().manual_seed(3)
    cells = torch.randn(2, 6, 27, 5, generator=source, dtype=torch.float64, requires_grad=True)
    proxies = torch.tensor(
        [[20.0, 0], [24, 1], [31, 0], [60, math.nan], [math.nan, 1], [63, 0]], dtype=torch.float64
    )  # fmt: skip
    return cells, cells_shown(*moved(), 3), proxies, torch.tensor([0, 1, 2, 0, 4, 5])


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
