"""Shares of tissue from intensities: mixtures of known proportions are found, and nothing is found where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, stats

from data_pipeline.prepare.settings import Tissues
from data_pipeline.prepare.steps import antspy
from data_pipeline.prepare.steps.partial_volume import PURE, STEPS, _expected, tissue_shares
from data_pipeline.prepare.template import load_template
from data_pipeline.simulation.one_brain import one_person
from data_pipeline.simulation.volumes import anatomy_at
from data_pipeline.volume.grid import Grid

MEANS = (0.25, 0.62, 1.0)  # fluid, grey matter, white matter
EDGE = 32


def layered(cortex: float, noise: float = 0.0, seed: int = 0):
    """A ball of white matter, ``cortex`` voxels of grey matter around it, and fluid: shares (3, D, H, W), voxels, mask.

    Shares are exact to a 216th: each voxel is the mean of 6 x 6 x 6 points.
    """
    fine = 6
    axis = (np.arange(EDGE * fine) + 0.5) / fine - EDGE / 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    inside = [radius < 8, (radius >= 8) & (radius < 8 + cortex), radius >= 8 + cortex]
    blocks = (EDGE, fine, EDGE, fine, EDGE, fine)
    white, grey, fluid = (part.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32) for part in inside)
    shares = np.stack([fluid, grey, white])
    voxels = np.tensordot(np.float32(MEANS), shares, axes=1)
    voxels = voxels + noise * np.random.default_rng(seed).standard_normal(voxels.shape)
    mask = np.ones(voxels.shape, bool)
    mask[:, :, 0] = False
    return shares, voxels.astype(np.float32), mask


def hard(voxels, mask):
    """A segmentation that gives each voxel to the nearest tissue."""
    nearest = np.abs(voxels[None] - np.array(MEANS)[:, None, None, None]).argmin(axis=0)
    return [((nearest == tissue) & mask).astype(np.float32) for tissue in range(3)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("cortex", [2.5, 3.0, 3.7])
def test_the_shares_of_mixed_voxels_are_found(cortex, noise):
    truth, voxels, mask = layered(cortex, noise)
    segmented = hard(voxels, mask)
    found = tissue_shares(voxels, mask, segmented)
    inside = np.broadcast_to(mask, truth.shape)
    error, hard_error = (np.abs(np.stack(shares) - truth)[inside].mean() for shares in (found, segmented))
    assert error < (0.4 if noise < 0.05 else 0.75) * hard_error
    assert np.stack(found).sum(axis=0)[mask] == pytest.approx(1.0, abs=1e-5)
    assert not np.stack(found)[:, ~mask].any()
    # A voxel that touches white matter and fluid looks like grey matter; few do.
    assert found[1].sum() == pytest.approx(truth[1][mask].sum(), rel=0.04)


def test_the_volume_follows_a_cortex_that_gets_thinner_by_less_than_a_voxel():
    amounts = [tissue_shares(voxels, mask, hard(voxels, mask))[1].sum() / truth[1][mask].sum()
               for truth, voxels, mask in (layered(cortex, 0.02) for cortex in (2.4, 2.6, 2.8, 3.0, 3.2))]  # fmt: skip
    assert max(amounts) - min(amounts) < 0.03


def test_a_bright_voxel_in_fluid_is_not_white_matter():
    truth, voxels, mask = layered(3.0)
    segmented = hard(voxels, mask)
    vessel = (2, 16, 16)
    voxels[vessel] = 1.0
    assert truth[0][vessel] == 1
    found = tissue_shares(voxels, mask, segmented)
    assert [tissue[vessel] for tissue in found] == [1, 0, 0]


def test_the_expected_share_is_the_mean_over_all_mixtures():
    """Against the sum over mixtures, one voxel at a time."""
    noise, values = 0.04, np.linspace(0.1, 1.15, 60)
    found = _expected(values, np.array(MEANS), noise)
    positions = np.linspace(0, 2, 2 * STEPS + 1)
    pure = np.isin(np.arange(len(positions)), (0, STEPS, 2 * STEPS))
    for number, value in enumerate(values):
        odds, sums = 0.0, np.zeros(3)
        for position, alone in zip(positions, pure, strict=True):
            shares = np.array([max(1 - abs(position - tissue), 0) for tissue in range(3)])
            weight = PURE / 3 if alone else (1 - PURE) / (len(positions) - 3)
            weight *= stats.norm.pdf(value, shares @ MEANS, noise)
            odds, sums = odds + weight, sums + weight * shares
        np.testing.assert_allclose(found[:, number], sums / odds, atol=2e-3)


@pytest.mark.parametrize("wrong", ["order", "empty"])
def test_without_three_tissues_in_order_the_segmentation_stays(wrong):
    _, voxels, mask = layered(3.0)
    segmented = hard(voxels, mask)
    if wrong == "order":
        voxels = 1.2 - voxels  # as in T2-weighted images
    else:
        segmented = [np.full_like(tissue, 1 / 3) for tissue in segmented]
    found = tissue_shares(voxels, mask, segmented)
    for share, probability in zip(found, segmented, strict=True):
        np.testing.assert_array_equal(share, probability)


def test_smoothed_probabilities_do_as_well_as_hard_ones():
    truth, voxels, mask = layered(3.0, 0.02)
    soft = [np.clip(ndimage.gaussian_filter(tissue, 0.4), 0, 1) for tissue in hard(voxels, mask)]
    found = tissue_shares(voxels, mask, soft)
    assert found[1].sum() == pytest.approx(truth[1][mask].sum(), rel=0.04)


@pytest.mark.jobs  # ten CPU seconds
def test_grey_matter_follows_a_cortex_that_has_lost_a_third():
    """Brains with 1.05, 0.8 and 0.65 times the template's grey matter, by the default recipe but for the voxel size."""
    spacing, recipe = 2.0, Tissues()
    grid = Grid.vbm(spacing)
    template, maps = load_template(grid), anatomy_at(spacing).template
    mask = template.brain & (maps.gm + maps.wm + maps.csf > 0.5)
    priors = [tissue + np.float32(0.01) for tissue in (template.fluid, template.grey, template.white)]
    true, found = [], []
    for number, factor in enumerate((1.05, 0.8, 0.65)):
        grey, white, fluid = one_person(maps.gm, maps.wm, maps.csf, np.float32(factor) * maps.gm, spacing)
        noise = 0.02 * np.random.default_rng(number).standard_normal(grey.shape)
        voxels = np.float32(700) * (0.25 * fluid + 0.62 * grey + white + noise).astype(np.float32)
        segmented = antspy.segment(
            voxels, template.affine, mask, [prior / sum(priors) for prior in priors], iterations=recipe.iterations,
            prior_weight=recipe.prior_weight, smoothness=recipe.smoothness,
        )  # fmt: skip
        true.append(grey[mask].sum() / mask.sum())
        found.append(tissue_shares(voxels, mask, segmented)[1].sum() / mask.sum())
    assert true[0] - true[2] > 0.15
    assert np.diff(found) == pytest.approx(np.diff(true), rel=0.35)
    assert np.array(found) == pytest.approx(np.array(true), abs=0.05)
