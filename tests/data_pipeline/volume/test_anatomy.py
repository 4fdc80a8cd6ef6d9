"""Real brains keep their known anatomy: left and right, front and back, above and below."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import load_volume
from tests.data_pipeline.volume.phantoms import ORIENTATIONS, reoriented

NILEARN = Path(str(resources.files("nilearn"))) / "datasets" / "data"
MRICRON = Path("/usr/share/mricron/templates")
needs_mricron = pytest.mark.skipif(not MRICRON.is_dir(), reason="needs Debian's mricron-data (make test-packages)")


def voxel_at(volume: np.ndarray, grid: Grid, *millimetres: float) -> float:
    """The voxel nearest to a position in MNI space."""
    index = np.linalg.inv(np.array(grid.affine)) @ [*millimetres, 1]
    return float(volume[tuple(np.round(index[:3]).astype(int))])


@pytest.mark.parametrize("number", [0, 13, 38])
def test_mni_tissue_maps_keep_their_anatomy(tmp_path, number):
    grid = Grid.vbm(3.0)
    maps = {}
    for tissue in ("gm", "wm"):
        image = nibabel.load(NILEARN / f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz")
        nibabel.save(
            reoriented(np.asarray(image.dataobj), image.affine, *ORIENTATIONS[number]), tmp_path / f"{tissue}.nii"
        )
        maps[tissue] = load_volume(tmp_path / f"{tissue}.nii", grid).astype(np.float32)
        maps[tissue] /= maps[tissue].max()
    for side in (-1, 1):
        assert voxel_at(maps["gm"], grid, side * 30, -66, -48) > 0.5  # cerebellar cortex: behind and below
        assert voxel_at(maps["gm"], grid, side * 30, 60, -48) < 0.05  # nothing in front of it
        assert voxel_at(maps["gm"], grid, side * 12, 12, 6) > 0.5  # caudate head
        assert voxel_at(maps["wm"], grid, side * 27, -15, 27) > 0.8  # corona radiata
    assert voxel_at(maps["wm"], grid, 0, 27, 3) + voxel_at(maps["wm"], grid, 0, -36, 15) > 0.8  # genu and splenium
    assert voxel_at(maps["gm"], grid, 0, 0, 105) == 0  # air above the vertex


@needs_mricron
def test_the_aal_atlas_keeps_left_and_right_and_the_place_of_the_cerebellum():
    grid = Grid.centred((181, 217, 181), 1.0)
    labels = load_volume(MRICRON / "aal.nii.gz", grid)
    x, y, z = (np.indices(grid.shape)[a] + grid.affine[a][3] for a in range(3))
    left = (labels > 0) & (labels <= 108) & (labels % 2 == 1)
    right = (labels > 0) & (labels <= 108) & (labels % 2 == 0)
    assert left.sum() > 500_000
    assert (x[left] <= 2).mean() > 0.995
    assert (x[right] >= -2).mean() > 0.995
    cerebellum = labels >= 91
    assert -75 < y[cerebellum].mean() < -50
    assert -45 < z[cerebellum].mean() < -20


@needs_mricron
def test_an_atlas_stored_from_right_to_left_keeps_left_and_right():
    path = MRICRON / "HarvardOxford-cort-maxprob-thr0-1mm.nii.gz"
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "A", "S")
    grid = Grid.centred((181, 217, 181), 1.0)
    labels = load_volume(path, grid)
    x, y = (np.indices(grid.shape)[axis] + grid.affine[axis][3] for axis in (0, 1))
    # The planum temporale is larger on the left (Geschwind and Levitsky, Science 1968).
    left, right = (np.count_nonzero((labels == 46) & (side * x > 0)) for side in (-1, 1))
    assert left > 1.15 * right > 4000
    assert y[labels == 48].mean() < -80 < 40 < y[labels == 1].mean()  # occipital pole behind, frontal pole in front


@needs_mricron
def test_the_brain_crop_of_a_t1_image_does_not_depend_on_position_and_orientation(tmp_path):
    image = nibabel.load(MRICRON / "ch2bet.nii.gz")
    grid = Grid.centred((60, 72, 60), 3.0)
    expected = load_volume(MRICRON / "ch2bet.nii.gz", grid, crop="brain", intensity="robust")
    moved = image.affine.copy()
    moved[:3, 3] += [40, -25, 60]
    nibabel.save(reoriented(np.asarray(image.dataobj), moved, (2, 0, 1), (False, True, True)), tmp_path / "scan.nii")
    volume = load_volume(tmp_path / "scan.nii", grid, crop="brain", intensity="robust")
    np.testing.assert_array_equal(volume, expected)
    assert (volume.min(), volume.max()) == (0, 1)
    # The brain is inside the box, without tissue on any face, and the cerebellum is below and behind, not in front.
    assert not any(np.take(volume, end, axis=axis).any() for axis in range(3) for end in (0, -1))
    low = volume[:, :, 8:16].astype(np.float32)
    assert low[:, :36].mean() > 3 * low[:, 36:].mean()
