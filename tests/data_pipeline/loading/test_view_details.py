"""The details of a batch's views say what DALI did to them, whichever ranks, workers and readers made the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from data_pipeline.loading.augment import PRESETS, load_augmentation
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.loading.view_details import PATCHES, ViewDetails, masked_patches
from data_pipeline.volume.intensity import zscore

SHAPE = (14, 16, 12)
MOVED = {
    "preset": "none",
    "flip": {"p": 0.5},
    "affine": {"p": 0.5, "degrees": 20.0, "zoom": 0.2, "shift": 0.1},
    "crop": {"p": 0.5, "side": 0.7},
    "cutout": {"p": 0.6, "side": 0.4},
}


def batches(manifest, count, settings, **options):
    augmentation = load_augmentation(settings)
    details = ViewDetails(augmentation, SHAPE, seed=0, masked=0.25)
    arguments = {"rows": manifest.rows(), "global_batch": 6, "augmentation": augmentation, "details": details}
    with TwoViewLoader(manifest, **{**arguments, **options}) as loader:
        return [next(loader) for _ in range(count)]


@pytest.fixture(scope="module")
def whole(manifest):
    """Ten batches of one rank: 48 scans, so they run into the second epoch."""
    return batches(manifest, 10, MOVED)


def inside(cutout, places, grow):
    """Return whether places (3, D, H, W), shares of the sides, are in the box (2, 3), larger by ``grow`` voxels all around."""
    margin = grow * (cutout[1] > cutout[0]).any() / np.array(SHAPE)
    low, high = cutout[0] - margin, cutout[1] + margin
    return ((places >= low[:, None, None, None]) & (places < high[:, None, None, None])).all(axis=0)


def test_the_placement_and_the_box_reproduce_each_view_from_its_scan(manifest, whole):
    """Each voxel of a view is the scan at the place that the placement sends there, or 0 in the cutout."""
    sides = np.array(SHAPE)[:, None, None, None]
    places = (np.indices(SHAPE) + 0.5) / sides
    hidden = 0
    for batch in (whole[0], whole[9]):
        for position, row in enumerate(batch["scan"].tolist()):
            scan = zscore(manifest.read_volume(row)).astype(np.float64)
            for number in range(2):
                matrix = batch["placement"][number, position].double().numpy()
                shifted = places - matrix[:, 3][:, None, None, None]
                in_scan = np.einsum("ij,jdhw->idhw", np.linalg.inv(matrix[:, :3]), shifted)
                expected = map_coordinates(scan, in_scan * sides - 0.5, order=1, mode="nearest")
                box = batch["cutout"][number, position].double().numpy()
                found = batch["views"][number, position, 0].numpy()
                # DALI rounds the faces of the box to whole voxels.
                outside, deep = ~inside(box, places, grow=1), inside(box, places, grow=-1)
                np.testing.assert_allclose(found[outside], expected[outside], atol=0.01)
                assert not found[deep].any()
                hidden += int(deep.any())
    assert 0 < hidden < 24


def test_ranks_workers_and_readers_do_not_change_the_details(manifest, whole):
    ranks = [batches(manifest, 10, MOVED, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    names = ("scan", "placement", "cutout", "masked")
    for step, batch in enumerate(whole):
        for name in names:
            parts = [ranks[rank][step][name] for rank in range(2)]
            assert torch.equal(batch[name], torch.cat(parts, dim=0 if name == "scan" else 1)), (step, name)
    (resumed,) = batches(manifest, 1, MOVED, start_step=9, workers=2)
    assert all(torch.equal(resumed[name], whole[9][name]) for name in names)
    by_scan = {scan: batch["placement"][:, i] for batch in whole[:8] for i, scan in enumerate(batch["scan"].tolist())}
    (streamed,) = batches(manifest, 1, MOVED, reader="stream", workers=1)
    for position, scan in enumerate(streamed["scan"].tolist()):
        assert torch.equal(streamed["placement"][:, position], by_scan[scan])


def test_masks_differ_between_scans_epochs_and_views_and_have_the_share_that_is_set():
    details = ViewDetails(PRESETS["none"], SHAPE, seed=3, masked=0.3)
    drawn = details(np.array([4, 5, 4]), np.array([0, 0, 1]))["masked"]
    assert drawn.shape == (2, 3, PATCHES, PATCHES, PATCHES)
    assert (drawn.sum(axis=(2, 3, 4)) == masked_patches(0.3)).all()
    assert len(np.unique(drawn.reshape(6, -1), axis=0)) == 6
    assert np.array_equal(drawn[:, 1], details(np.array([5]), np.array([0]))["masked"][:, 0])
    assert masked_patches(0.3) == round(0.3 * PATCHES**3)
    assert not ViewDetails(PRESETS["none"], SHAPE, seed=3)(np.array([4]), np.array([0]))["masked"].any()


def test_a_batch_without_details_holds_what_it_held_before(manifest):
    with TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6) as loader:
        assert set(next(loader)) == {"views", "proxies", "scan"}


def test_an_augmentation_without_an_operator_draws_the_others_as_before():
    plain = PRESETS["default"].without("cutout")
    assert set(plain.operators) == set(PRESETS["default"].operators) - {"cutout"}
    arguments = (np.arange(20), np.zeros(20, np.int64))
    with_box = ViewDetails(PRESETS["default"], SHAPE, seed=0)(*arguments)
    without = ViewDetails(plain, SHAPE, seed=0)(*arguments)
    assert np.array_equal(with_box["placement"], without["placement"])
    assert with_box["cutout"].any()
    assert not without["cutout"].any()
