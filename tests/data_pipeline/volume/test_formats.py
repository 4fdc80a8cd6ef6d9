"""File formats: every readable format and data type gives the same voxels; other files are refused with a reason."""

from __future__ import annotations

import pickle

import nibabel
import numpy as np
import pytest

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.load import load_volume, open_image
from tests.data_pipeline.volume.phantoms import NIBABEL, UPRIGHT, phantom, reoriented

FORMATS = {
    "nifti1": (nibabel.Nifti1Image, "scan.nii"),
    "nifti1.gz": (nibabel.Nifti1Image, "scan.nii.gz"),
    "nifti2": (nibabel.Nifti2Image, "scan.nii"),
    "nifti2.gz": (nibabel.Nifti2Image, "scan.nii.gz"),
    "nifti pair": (nibabel.Nifti1Pair, "scan.img"),
    "analyze with .mat": (nibabel.Spm99AnalyzeImage, "scan.img"),
    "mgh": (nibabel.MGHImage, "scan.mgh"),
    "mgz": (nibabel.MGHImage, "scan.mgz"),
}


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_data_type_gives_the_same_voxels(tmp_path, name, kind):
    cls, file = FORMATS[name]
    if cls is nibabel.MGHImage and kind == "float64":
        pytest.skip("MGH has no float64")
    if cls is nibabel.Spm99AnalyzeImage and kind == "float64":
        kind = ">f8"  # Analyze is written in either byte order
    voxels = np.minimum(phantom(), 250).astype(kind)
    image = reoriented(voxels, UPRIGHT, (1, 2, 0), (True, False, True))
    nibabel.save(cls(np.asarray(image.dataobj), image.affine), tmp_path / file)
    volume = load_volume(tmp_path / file, Grid.of((15, 18, 13), UPRIGHT))
    np.testing.assert_array_equal(volume, voxels.astype(np.float16))
    if file.endswith(".img"):
        np.testing.assert_array_equal(load_volume(tmp_path / "scan.hdr", Grid.of((15, 18, 13), UPRIGHT)), volume)


def test_analyze_without_a_matrix_is_read_from_right_to_left_as_by_nibabel(tmp_path):
    image = nibabel.AnalyzeImage(phantom(), None)
    image.header.set_zooms((2, 2, 2))
    nibabel.save(image, tmp_path / "scan.img")
    read = open_image(tmp_path / "scan.img")
    assert nibabel.aff2axcodes(read.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(np.asarray(read.dataobj), phantom()[::-1])


def test_slope_and_intercept_apply_and_integers_are_interpolated_as_floats(tmp_path):
    stored = np.zeros((9, 9, 9), dtype=np.int16)
    stored[::2] = 10
    image = nibabel.Nifti1Image(stored, np.diag([2.0, 2, 2, 1]))
    image.header.set_slope_inter(0.5, -3.0)
    nibabel.save(image, tmp_path / "scaled.nii")
    assert nibabel.load(tmp_path / "scaled.nii").dataobj.slope == 0.5
    volume = load_volume(tmp_path / "scaled.nii", Grid.of((9, 9, 9), np.diag([2.0, 2, 2, 1])))
    np.testing.assert_array_equal(volume, (stored * 0.5 - 3).astype(np.float16))
    plain = nibabel.Nifti1Image((stored // 10).astype(np.uint8), np.diag([2.0, 2, 2, 1]))
    nibabel.save(plain, tmp_path / "labels.nii")
    fine = load_volume(tmp_path / "labels.nii", Grid.of((17, 9, 9), np.diag([1.0, 2, 2, 1])))
    assert set(np.unique(fine)) == {0.0, 0.5, 1.0}  # 0.5 is not a uint8


def test_a_4d_file_of_one_volume_is_read_and_a_series_is_refused_with_its_shape(tmp_path):
    nibabel.save(nibabel.Nifti1Image(phantom()[..., None], UPRIGHT), tmp_path / "one.nii.gz")
    volume = load_volume(tmp_path / "one.nii.gz", Grid.of((15, 18, 13), UPRIGHT))
    np.testing.assert_array_equal(volume, phantom().astype(np.float16))
    for path, shape in (
        (NIBABEL / "functional.nii", "(17, 21, 3, 20)"),
        (NIBABEL / "example4d.nii.gz", "(128, 96, 24, 2)"),
        (NIBABEL / "example_nifti2.nii.gz", "(32, 20, 12, 2)"),
        (NIBABEL / "test.mgz", "(3, 4, 5, 2)"),
    ):
        with pytest.raises(BadScan) as error:
            open_image(path)
        assert str(error.value) == f"shape {shape} is not one 3D volume"


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda p: p.write_bytes(b"no image"), "unreadable: ImageFileError"),
        (lambda p: nibabel.save(nibabel.Nifti1Image(phantom().astype(np.complex64), UPRIGHT), p), "of type complex64"),
        (lambda p: nibabel.save(nibabel.Nifti1Image(phantom()[..., 0], UPRIGHT), p), "shape (15, 18) is not one 3D"),
        (lambda p: nibabel.save(flat_affine(), p), "affine is not invertible"),
        (lambda p: None, "unreadable: FileNotFoundError"),
    ],
    ids=["text", "complex", "flat", "affine", "absent"],
)
def test_a_file_that_is_not_a_volume_is_refused_without_showing_its_path(tmp_path, write, text):
    path = tmp_path / "doe-john.nii"
    write(path)
    with pytest.raises(BadScan) as error:
        load_volume(path, Grid.centred((8, 8, 8), 2.0))
    assert text in str(error.value)
    assert "doe" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def flat_affine() -> nibabel.Nifti1Image:
    """An image whose affine is not invertible."""
    image = nibabel.Nifti1Image(phantom(), None)
    image.header.set_sform(np.diag([2.0, 2, 0, 1]), code=1)
    return image


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    ("shape", "axes", "origin", "flip"),
    [((121, 145, 121), "", (-90, -126, -72), False), ((182, 218, 182), "", (-91, -126, -72), True),
     ((182, 218, 182), "RAS", (-91, -126, -72), False)],
    ids=["vbm", "quasi-raw", "quasi-raw declared RAS"],
)  # fmt: skip
def test_an_array_of_a_known_shape_has_the_grid_of_that_shape(tmp_path, lead, shape, axes, origin, flip):
    voxels = np.zeros(shape, dtype=np.float16)
    voxels[10, 20, 30] = 1.0
    np.save(tmp_path / "scan.npy", voxels.reshape(lead + shape))
    image = open_image(tmp_path / "scan.npy", axes)
    (stored,) = np.argwhere(np.asarray(image.dataobj) == 1)
    spacing = 1.5 if shape[0] == 121 else 1.0
    index = [shape[0] - 1 - 10 if flip else 10, 20, 30]
    assert (image.affine @ [*stored, 1])[:3].tolist() == [o + spacing * i for o, i in zip(origin, index, strict=True)]


class Evil:
    """Records when it is unpickled."""

    unpickled: list[int] = []  # noqa: RUF012

    def __setstate__(self, state: object) -> None:
        self.unpickled.append(1)

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


def test_an_array_of_an_unknown_shape_and_a_pickle_are_refused(tmp_path):
    np.save(tmp_path / "scan.npy", np.zeros((1, 1, 30, 30, 30), dtype=np.float32))
    with pytest.raises(
        BadScan, match=r"shape \(1, 1, 30, 30, 30\) is not a known grid; .* must be 121x145x121 \(1.5 mm\)"
    ):
        open_image(tmp_path / "scan.npy")
    np.save(tmp_path / "two.npy", np.zeros((2, 121, 145, 121), dtype=np.uint8))
    with pytest.raises(BadScan, match=r"shape \(2, 121, 145, 121\) is not one 3D volume"):
        open_image(tmp_path / "two.npy")
    np.save(tmp_path / "objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Evil()))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(BadScan, match="unreadable: ValueError"):
            open_image(tmp_path / name)
    assert not Evil.unpickled


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii", "scaled+tlrc.HEAD"])
def test_nibabels_sample_files_have_the_voxels_that_nibabel_reads(name):
    image = nibabel.squeeze_image(nibabel.as_closest_canonical(nibabel.load(NIBABEL / name)))
    volume = load_volume(NIBABEL / name, Grid.of(image.shape, image.affine))
    expected = image.get_fdata()
    while np.abs(expected).max() > 32768:
        expected = expected / 2
    np.testing.assert_allclose(volume, expected.astype(np.float16), rtol=1e-3)
