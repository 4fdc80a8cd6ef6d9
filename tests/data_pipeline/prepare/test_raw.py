"""What is no whole head is refused with its reason, before any library starts."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from scipy.io import savemat

from data_pipeline.prepare.raw import read_raw
from data_pipeline.volume.errors import BadScan
from tests.data_pipeline.prepare import heads
from tests.data_pipeline.volume.phantoms import ORIENTATIONS, reoriented


def smooth(shape=(60, 60, 60)) -> np.ndarray:
    """A smooth bright ball whose values are not whole."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (100 * np.exp(-2 * sum(axis**2 for axis in axes)) + 0.3).astype(np.float32)


def written(tmp_path, image):
    nibabel.save(image, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def refusal(path) -> BadScan:
    with pytest.raises(BadScan) as caught:
        read_raw(path)
    return caught.value


@pytest.mark.parametrize(
    ("image", "rule", "reason"),
    [
        (heads.four_dimensional, "shape", "(64, 64, 40, 3) is not one 3D volume"),
        (heads.empty, "constant", "every voxel is 0"),
        (heads.localiser, "voxel", "slices are 8 mm apart: a 2D series"),
        (
            lambda: nibabel.Nifti1Image(smooth((60, 60, 1)), np.diag([3, 3, 3, 1.0])),
            "extent",
            "covers 180 x 180 x 3 mm",
        ),
        (lambda: nibabel.Nifti1Image(smooth((40, 40, 40)), np.diag([2, 2, 2, 1.0])), "extent", "not a whole head"),
        (
            lambda: nibabel.Nifti1Image(np.round(smooth() / 20), np.diag([3, 3, 3, 1.0])),
            "labels",
            "label map or a mask",
        ),
        (
            lambda: nibabel.Nifti1Image(np.full((60, 60, 60), np.nan, np.float32), np.diag([3, 3, 3, 1.0])),
            "nonfinite",
            "NaN",
        ),
    ],
)
def test_other_files_are_refused_with_their_reason(tmp_path, image, rule, reason):
    error = refusal(written(tmp_path, image()))
    assert error.rule == rule
    assert reason in str(error)


@heads.needs_mricron
def test_an_atlas_and_a_macaque_are_refused():
    assert refusal(heads.LABELS).rule == "labels"
    assert refusal(heads.MACAQUE).rule == "extent"


@heads.needs_mricron
def test_a_real_head_of_whole_numbers_is_read():
    raw = read_raw(heads.CH2)
    assert raw.voxels.shape == (181, 217, 181)
    assert raw.nonfinite == 0


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_becomes_ras(tmp_path, orientation):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    voxels = smooth()
    voxels[:10] += 5  # left
    raw = read_raw(written(tmp_path, reoriented(voxels, affine, *orientation)))
    np.testing.assert_allclose(raw.voxels, voxels, atol=1e-4)
    np.testing.assert_allclose(raw.affine, affine)


def test_a_few_nonfinite_voxels_become_zero_and_are_counted(tmp_path):
    voxels = smooth()
    voxels[0, 0, :3] = np.nan
    raw = read_raw(written(tmp_path, nibabel.Nifti1Image(voxels, np.diag([3, 3, 3, 1.0]))))
    assert raw.nonfinite == 3
    assert (raw.voxels[0, 0, :3] == 0).all()


def test_two_headers_that_disagree_about_left_and_right_are_refused(tmp_path):
    image = nibabel.Nifti1Image(smooth(), np.diag([3.0, 3, 3, 1]))
    image.set_qform(np.diag([3.0, 3, 3, 1]), 1)
    assert read_raw(written(tmp_path, image)).nonfinite == 0
    image.set_sform(np.diag([-3.0, 3, 3, 1]), 1)
    error = refusal(written(tmp_path, image))
    assert error.rule == "left-right"
    assert "sform says LAS, qform RAS" in str(error)


def test_a_header_without_any_orientation_is_refused(tmp_path):
    image = nibabel.Nifti1Image(smooth(), np.diag([3.0, 3, 3, 1]))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    error = refusal(written(tmp_path, image))
    assert (error.rule, "left and right are unknown" in str(error)) == ("header", True)


LEFT_BRIGHT = np.diag([-3.0, 3, 3, 1])  # the first axis goes to the left


def pair(tmp_path, kind):
    """The paths of scan.img, its header and its .mat file, written by a class of nibabel; the left is the brighter side."""
    voxels = smooth()
    voxels[-10:] += 5
    nibabel.save(kind(voxels, LEFT_BRIGHT), tmp_path / "scan.img")
    return [tmp_path / f"scan.{suffix}" for suffix in ("img", "hdr", "mat")]


def is_bright_on_the_left(path) -> bool:
    raw = read_raw(path)
    assert raw.affine[0, 0] > 0
    return bool(raw.voxels[:10].mean() > raw.voxels[-10:].mean() + 4)


@pytest.mark.parametrize("kind", [nibabel.AnalyzeImage, nibabel.Spm99AnalyzeImage, nibabel.Spm2AnalyzeImage])
@pytest.mark.parametrize("matrix", ["none", "empty", "only M"])
def test_analyze_files_without_orientation_are_refused(tmp_path, kind, matrix):
    image, header, mat = pair(tmp_path, kind)
    mat.unlink(missing_ok=True)
    if matrix == "empty":
        mat.touch()
    elif matrix == "only M":  # as SPM99 writes it: whether it flips is a setting of SPM
        savemat(mat, {"M": LEFT_BRIGHT}, format="4")
    for path in (image, header):
        error = refusal(path)
        assert error.rule == "header"
        assert str(error).startswith(
            "its Analyze header states no orientation, so that left and right are unknown; NIfTI"
        )


@pytest.mark.parametrize(
    "kind", [nibabel.Spm99AnalyzeImage, nibabel.Spm2AnalyzeImage, nibabel.Nifti1Pair, nibabel.Nifti2Pair]
)
def test_pairs_that_state_their_orientation_are_read(tmp_path, kind):
    image, header, _ = pair(tmp_path, kind)
    assert is_bright_on_the_left(image)
    assert is_bright_on_the_left(header)


@pytest.mark.parametrize(("kind", "name"), [(nibabel.MGHImage, "scan.mgz"), (nibabel.Nifti2Image, "scan.nii")])
def test_mgh_and_nifti2_files_are_read(tmp_path, kind, name):
    voxels = smooth()
    voxels[-10:] += 5
    nibabel.save(kind(voxels, LEFT_BRIGHT), tmp_path / name)
    assert is_bright_on_the_left(tmp_path / name)


@pytest.mark.parametrize("kept", [30, 20_000])  # the stream ends in the header, or in the voxels
def test_the_reason_of_a_truncated_file_does_not_repeat_the_rule(tmp_path, kept):
    path = written(tmp_path, nibabel.Nifti1Image(smooth(), np.diag([3.0, 3, 3, 1])))
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(path)
    assert error.rule == "unreadable"
    assert "Error: " in str(error)
    assert "unreadable" not in str(error)
