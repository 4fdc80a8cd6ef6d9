"""Sampling at other points, against loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.prepare.pose import angle_of, find_pose, stretches_of
from data_pipeline.prepare.resampling import displaced, isotropic, jacobian, resample, spread
from data_pipeline.prepare.template import load_template
from data_pipeline.volume.grid import Grid
from tests.data_pipeline.prepare.phantoms import turned

GRID = Grid.of((12, 14, 10), np.array([[4.0, 0, 0, -22], [0, 4, 0, -26], [0, 0, 4, -18], [0, 0, 0, 1]]))
SOURCE = np.array([[0.0, -3.0, 0, 30], [2.0, 0, 0, -40], [0, 0, 2.5, -30], [0, 0, 0, 1]])
SLOPES = np.array([0.5, -0.25, 2.0])


def ramp(shape, affine):
    """A volume whose value is a linear function of the place in mm."""
    index = np.indices(shape).reshape(3, -1)
    millimetres = affine[:3, :3] @ index + affine[:3, 3:]
    return (SLOPES @ millimetres).reshape(shape).astype(np.float32)


def test_a_linear_volume_is_sampled_at_the_place_that_the_map_names():
    to_source = turned((10.0, -5.0, 20.0), (3.0, -2.0, 1.0))
    source = np.diag([2.0, 2.0, 2.0, 1.0]) @ np.eye(4)
    source[:3, 3] = -60
    sampled = resample(ramp((64, 64, 64), source), source, GRID, to_source)
    for index in ((0, 0, 0), (5, 6, 4), (11, 13, 9)):
        place = to_source @ np.array(GRID.affine) @ [*index, 1.0]
        assert sampled[index] == pytest.approx(SLOPES @ place[:3], abs=1e-2)


def test_displacements_are_in_mm_of_the_world():
    displacement = np.zeros((*GRID.shape, 3), np.float32)
    displacement[...] = (1.5, -2.0, 0.5)
    source = np.diag([2.0, -2.0, 2.0, 1.0])
    source[:3, 3] = (-60, 60, -60)
    sampled = displaced(ramp((64, 64, 64), source), source, GRID, displacement, smooth=False)
    still = displaced(ramp((64, 64, 64), source), source, GRID, 0 * displacement, smooth=False)
    np.testing.assert_allclose(sampled - still, SLOPES @ [1.5, -2.0, 0.5], atol=1e-3)


def test_the_jacobian_of_a_linear_map_is_its_determinant():
    matrix = np.array([[0.1, 0.05, 0.0], [0.0, -0.2, 0.1], [0.03, 0.0, 0.15]])
    index = np.indices(GRID.shape).reshape(3, -1)
    millimetres = np.array(GRID.affine)[:3, :3] @ index + np.array(GRID.affine)[:3, 3:]
    displacement = (matrix @ millimetres).T.reshape(*GRID.shape, 3).astype(np.float32)
    np.testing.assert_allclose(jacobian(displacement, 4.0), np.linalg.det(np.eye(3) + matrix), rtol=1e-4)


def test_isotropic_voxels_lie_where_the_others_did():
    values = ramp((20, 16, 12), SOURCE)
    coarse, affine = isotropic(values, SOURCE, 5.0)
    assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx([5.0, 5.0, 5.0])
    inner = (2, 2, 2)
    assert coarse[inner] == pytest.approx(SLOPES @ (affine @ [*inner, 1.0])[:3], abs=0.5)
    assert abs(np.array(coarse.shape) * 5 - np.array([40, 48, 30])).max() < 5


def test_a_smooth_field_is_spread_to_finer_voxels():
    coarse, affine = isotropic(ramp((20, 16, 12), SOURCE), SOURCE, 4.0)
    fine = spread(coarse, affine, (20, 16, 12), SOURCE)
    np.testing.assert_allclose(fine[4:-4, 4:-4, 4:-4], ramp((20, 16, 12), SOURCE)[4:-4, 4:-4, 4:-4], atol=0.5)


@pytest.mark.parametrize("rotation", [(0.0, 0.0, 0.0), (30.0, 0.0, 0.0), (-20.0, 15.0, 25.0)])
def test_the_pose_of_a_turned_and_shifted_brain_is_found(rotation):
    template = load_template(Grid.vbm(4.0))
    to_source = turned(rotation, (40.0, -25.0, 20.0), scale=0.92)
    box = Grid.centred((75, 75, 75), 4.0)
    brain = resample(template.t1, template.affine, box, np.linalg.inv(to_source))
    found = find_pose(brain, np.array(box.affine), (-30.0, 0.0, 30.0), rigid=False)
    corners = np.array([[x, y, z, 1.0] for x in (-60, 60) for y in (-90, 60) for z in (-50, 70)]).T
    assert np.linalg.norm(((found - to_source) @ corners)[:3], axis=0).max() < 5.0
    assert angle_of(found) == pytest.approx(angle_of(to_source), abs=2.0)
    assert stretches_of(found) == pytest.approx([0.92] * 3, abs=0.02)


def test_the_templates_tissues_share_its_brain():
    template = load_template(Grid.vbm(3.0))
    total = template.grey + template.white + template.fluid
    assert total.max() < 1.1
    assert 1.7 < np.count_nonzero(template.brain) * 0.027 / 1000 < 2.0  # litres
    white, grey = template.t1[template.white > 0.9].mean(), template.t1[template.grey > 0.9].mean()
    assert white > 1.1 * grey
