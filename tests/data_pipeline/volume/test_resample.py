"""Scans in any orientation are brought to one grid: phantoms in real files against an independent implementation."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import load_volume
from data_pipeline.volume.resample import centre_of_mass
from tests.data_pipeline.volume.phantoms import ORIENTATIONS, UPRIGHT, phantom, reoriented

SPACINGS = np.array([[1.2, 0, 0, -8.3], [0, 1.1, 0, -9.7], [0, 0, 1.3, -7.9], [0, 0, 0, 1]])


def oblique() -> np.ndarray:
    """An affine rotated by 20 degrees about x and 10 about z, with spacings that float32 does not represent exactly."""
    a, b = np.deg2rad([20.0, 10.0])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = SPACINGS.copy()
    affine[:3, :3] = about_z @ about_x @ SPACINGS[:3, :3]
    return affine


def by_world(voxels: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """The reference: look up the world position of every voxel of the grid in the scan."""
    indices = np.indices(grid.shape).reshape(3, -1)
    world = np.array(grid.affine) @ np.vstack([indices, np.ones(indices.shape[1])])
    positions = (np.linalg.inv(affine) @ world)[:3]
    return ndimage.map_coordinates(voxels.astype(np.float64), positions, order=1).reshape(grid.shape)


@pytest.mark.parametrize(
    ("affine", "grid", "crop"),
    [
        (UPRIGHT, Grid.of((15, 18, 13), UPRIGHT), "world"),
        (
            UPRIGHT,
            Grid.of((20, 14, 13), UPRIGHT + np.array([[0, 0, 0, -6], [0, 0, 0, 4], [0, 0, 0, 2], [0] * 4])),
            "world",
        ),
        (UPRIGHT, Grid.centred((12, 12, 12), 3.0), "world"),
        (UPRIGHT, Grid.centred((12, 14, 10), 2.0), "brain"),
        (SPACINGS, Grid.centred((16, 16, 16), 1.0), "world"),
        (oblique(), Grid.centred((16, 16, 16), 1.5), "world"),
        (oblique(), Grid.centred((12, 12, 12), 1.5), "brain"),
    ],
    ids=["own grid", "cropped and padded", "resampled", "brain crop", "odd spacings", "oblique", "oblique brain crop"],
)
def test_all_48_orientations_of_a_phantom_give_the_same_voxels(tmp_path, affine, grid, crop):
    voxels = phantom()
    volumes = []
    for number, (axes, flips) in enumerate(ORIENTATIONS):
        path = tmp_path / f"{number}.nii"
        nibabel.save(reoriented(voxels, affine, axes, flips), path)
        volumes.append(load_volume(path, grid, crop=crop))
    assert len(volumes) == 48
    if crop == "world":
        np.testing.assert_allclose(volumes[0].astype(np.float64), by_world(voxels, affine, grid), rtol=2e-3, atol=0.05)
    assert len(np.unique(volumes[0])) > 100
    for volume in volumes:
        np.testing.assert_array_equal(volume, volumes[0])


def test_coinciding_voxels_are_cropped_and_padded_without_interpolation(tmp_path):
    path = tmp_path / "scan.nii.gz"
    voxels = phantom()
    nibabel.save(nibabel.Nifti1Image(voxels, UPRIGHT), path)
    moved = UPRIGHT.copy()
    moved[:3, 3] += [2 * 3, 2 * -2, 0]
    volume = load_volume(path, Grid.of((15, 18, 13), moved))
    expected = np.zeros_like(voxels)
    expected[:12, 2:] = voxels[3:, :16]
    np.testing.assert_array_equal(volume, expected.astype(np.float16))


def test_a_grid_that_misses_the_brain_is_refused_with_the_fix(tmp_path):
    path = tmp_path / "scan.nii"
    far = UPRIGHT.copy()
    far[:3, 3] += 500
    nibabel.save(nibabel.Nifti1Image(phantom(), far), path)
    with pytest.raises(BadScan, match="on the grid every voxel is 0, because the scan is elsewhere; try --crop brain"):
        load_volume(path, Grid.centred((12, 12, 12), 2.0))
    assert load_volume(path, Grid.centred((12, 12, 12), 2.0), crop="brain").max() > 500


def test_the_brain_crop_does_not_depend_on_the_position_of_the_head(tmp_path):
    grid = Grid.centred((13, 15, 11), 2.0)
    volumes = []
    for number, shift in enumerate(([0, 0, 0], [31.7, -12.3, 5.1])):
        affine = UPRIGHT.copy()
        affine[:3, 3] += shift
        nibabel.save(nibabel.Nifti1Image(phantom(), affine), tmp_path / f"{number}.nii")
        volumes.append(load_volume(tmp_path / f"{number}.nii", grid, crop="brain"))
    np.testing.assert_array_equal(*volumes)
    middle = (np.array(grid.shape) - 1) / 2
    assert np.abs(centre_of_mass(volumes[0].astype(np.float32)) - middle).max() < 1.0
