"""Any file, orientation and type to one grid: phantoms through real files, then real brains by known anatomy."""

from __future__ import annotations

import itertools
import pickle
import sys
from importlib import resources
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import as_float16, robust_intensity
from data_pipeline.volume.load import load_volume, open_image
from data_pipeline.volume.preparation import check_preparation
from data_pipeline.volume.resample import centre_of_mass
from infra.errors import UserError

TURNS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]
UPRIGHT = np.array([[2.0, 0, 0, -13], [0, 2, 0, -21], [0, 0, 2, -9], [0, 0, 0, 1]])
SPACINGS = np.array([[1.2, 0, 0, -8.3], [0, 1.1, 0, -9.7], [0, 0, 1.3, -7.9], [0, 0, 0, 1]])
NIBABEL = Path(str(resources.files("nibabel"))) / "tests" / "data"
NILEARN = Path(str(resources.files("nilearn"))) / "datasets" / "data"
MRICRON = Path("/usr/share/mricron/templates")
templates = pytest.mark.skipif(not MRICRON.is_dir(), reason="Debian's mricron-data is not here (make test-packages)")


def phantom() -> np.ndarray:
    """No two voxels of a 15 x 18 x 13 brain alike, so that any wrong turn shows; zeros around it."""
    values = np.zeros((15, 18, 13), dtype=np.float32)
    inside = np.arange(1.0, 1 + 11 * 13 * 9).reshape(11, 13, 9)
    values[1:12, 4:17, 2:11] = inside
    return values


def oblique() -> np.ndarray:
    """20 degrees about x and 10 about z, over spacings that float32 cannot hold exactly."""
    a, b = np.deg2rad([20.0, 10.0])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = SPACINGS.copy()
    affine[:3, :3] = about_z @ about_x @ SPACINGS[:3, :3]
    return affine


def turned(voxels: np.ndarray, affine: np.ndarray, axes, flips) -> nibabel.Nifti1Image:
    """The same brain stored with its axes in another order and direction; the affine says so."""
    stored = np.transpose(voxels, axes)
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        back[old, new] = -1 if flip else 1
        back[old, 3] = stored.shape[new] - 1 if flip else 0
        stored = np.flip(stored, new) if flip else stored
    return nibabel.Nifti1Image(np.ascontiguousarray(stored), affine @ back)


def by_world(voxels: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """The slow twin: the world position of every voxel of the grid, looked up in the scan."""
    indices = np.indices(grid.shape).reshape(3, -1)
    world = np.array(grid.affine) @ np.vstack([indices, np.ones(indices.shape[1])])
    places = (np.linalg.inv(affine) @ world)[:3]
    return ndimage.map_coordinates(voxels.astype(np.float64), places, order=1).reshape(grid.shape)


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
    ids=["own grid", "cut and padded", "resampled", "on the brain", "odd spacings", "oblique", "oblique on the brain"],
)
def test_a_phantom_in_all_48_orientations_comes_out_identical(tmp_path, affine, grid, crop):
    voxels = phantom()
    found = []
    for number, (axes, flips) in enumerate(TURNS):
        path = tmp_path / f"{number}.nii"
        nibabel.save(turned(voxels, affine, axes, flips), path)
        found.append(load_volume(path, grid, crop=crop))
    assert len(found) == 48
    if crop == "world":
        np.testing.assert_allclose(found[0].astype(np.float64), by_world(voxels, affine, grid), rtol=2e-3, atol=0.05)
    assert len(np.unique(found[0])) > 100
    for volume in found:
        np.testing.assert_array_equal(volume, found[0])


def test_voxels_that_coincide_are_cut_and_padded_without_interpolation(tmp_path):
    path = tmp_path / "scan.nii.gz"
    voxels = phantom()
    nibabel.save(nibabel.Nifti1Image(voxels, UPRIGHT), path)
    moved = UPRIGHT.copy()
    moved[:3, 3] += [2 * 3, 2 * -2, 0]
    volume = load_volume(path, Grid.of((15, 18, 13), moved))
    expected = np.zeros_like(voxels)
    expected[:12, 2:] = voxels[3:, :16]
    np.testing.assert_array_equal(volume, expected.astype(np.float16))


def test_a_grid_that_misses_the_brain_is_a_bad_scan_that_names_the_fix(tmp_path):
    path = tmp_path / "scan.nii"
    far = UPRIGHT.copy()
    far[:3, 3] += 500
    nibabel.save(nibabel.Nifti1Image(phantom(), far), path)
    with pytest.raises(BadScan, match="on the grid every voxel is 0, because the scan is elsewhere; try --crop brain"):
        load_volume(path, Grid.centred((12, 12, 12), 2.0))
    assert load_volume(path, Grid.centred((12, 12, 12), 2.0), crop="brain").max() > 500


def test_the_crop_on_the_brain_does_not_care_where_the_head_lay(tmp_path):
    grid = Grid.centred((13, 15, 11), 2.0)
    found = []
    for number, shift in enumerate(([0, 0, 0], [31.7, -12.3, 5.1])):
        affine = UPRIGHT.copy()
        affine[:3, 3] += shift
        nibabel.save(nibabel.Nifti1Image(phantom(), affine), tmp_path / f"{number}.nii")
        found.append(load_volume(tmp_path / f"{number}.nii", grid, crop="brain"))
    np.testing.assert_array_equal(*found)
    middle = (np.array(grid.shape) - 1) / 2
    assert np.abs(centre_of_mass(found[0].astype(np.float32)) - middle).max() < 1.0


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
def test_every_format_and_type_gives_the_same_voxels(tmp_path, name, kind):
    cls, file = FORMATS[name]
    if cls is nibabel.MGHImage and kind == "float64":
        pytest.skip("MGH has no float64")
    if cls is nibabel.Spm99AnalyzeImage and kind == "float64":
        kind = ">f8"  # Analyze is written in either byte order
    voxels = np.minimum(phantom(), 250).astype(kind)
    image = turned(voxels, UPRIGHT, (1, 2, 0), (True, False, True))
    nibabel.save(cls(np.asarray(image.dataobj), image.affine), tmp_path / file)
    volume = load_volume(tmp_path / file, Grid.of((15, 18, 13), UPRIGHT))
    np.testing.assert_array_equal(volume, voxels.astype(np.float16))
    if file.endswith(".img"):
        np.testing.assert_array_equal(load_volume(tmp_path / "scan.hdr", Grid.of((15, 18, 13), UPRIGHT)), volume)


def test_analyze_without_a_matrix_is_read_from_right_to_left_as_nibabel_has_it(tmp_path):
    image = nibabel.AnalyzeImage(phantom(), None)
    image.header.set_zooms((2, 2, 2))
    nibabel.save(image, tmp_path / "scan.img")
    read = open_image(tmp_path / "scan.img")
    assert nibabel.aff2axcodes(read.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(np.asarray(read.dataobj), phantom()[::-1])


def test_slope_and_intercept_are_applied_and_whole_numbers_are_interpolated_as_numbers(tmp_path):
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
    assert set(np.unique(fine)) == {0.0, 0.5, 1.0}  # halves, which the file's uint8 could not hold


def test_one_volume_of_four_dimensions_is_read_and_a_series_refused_with_its_shape(tmp_path):
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
def test_what_is_no_volume_is_a_bad_scan_whose_reason_does_not_show_the_path(tmp_path, write, text):
    path = tmp_path / "doe-john.nii"
    write(path)
    with pytest.raises(BadScan) as error:
        load_volume(path, Grid.centred((8, 8, 8), 2.0))
    assert text in str(error.value)
    assert "doe" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    ("shape", "axes", "origin", "flip"),
    [((121, 145, 121), "", (-90, -126, -72), False), ((182, 218, 182), "", (-91, -126, -72), True),
     ((182, 218, 182), "RAS", (-91, -126, -72), False)],
    ids=["vbm", "quasi-raw", "quasi-raw declared RAS"],
)  # fmt: skip
def test_arrays_lie_on_the_grid_that_their_shape_tells(tmp_path, lead, shape, axes, origin, flip):
    voxels = np.zeros(shape, dtype=np.float16)
    voxels[10, 20, 30] = 1.0
    np.save(tmp_path / "scan.npy", voxels.reshape(lead + shape))
    image = open_image(tmp_path / "scan.npy", axes)
    (place,) = np.argwhere(np.asarray(image.dataobj) == 1)
    spacing = 1.5 if shape[0] == 121 else 1.0
    index = [shape[0] - 1 - 10 if flip else 10, 20, 30]
    assert (image.affine @ [*place, 1])[:3].tolist() == [o + spacing * i for o, i in zip(origin, index, strict=True)]


def test_an_array_of_an_unknown_shape_and_a_pickle_are_refused(tmp_path):
    np.save(tmp_path / "scan.npy", np.zeros((1, 1, 30, 30, 30), dtype=np.float32))
    with pytest.raises(
        BadScan, match=r"shape \(1, 1, 30, 30, 30\) is no known grid; .* must be 121x145x121 \(1.5 mm\)"
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
    assert not Evil.woken


def flat_affine() -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(phantom(), None)
    image.header.set_sform(np.diag([2.0, 2, 0, 1]), code=1)
    return image


class Evil:
    """Tells when it is unpickled."""

    woken: list[int] = []  # noqa: RUF012

    def __setstate__(self, state: object) -> None:
        self.woken.append(1)

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


def test_robust_intensity_is_the_share_of_the_foregrounds_range():
    generator = np.random.default_rng(0)
    voxels = np.zeros((20, 20, 20), dtype=np.float32)
    voxels[4:16, 4:16, 4:16] = generator.normal(300, 40, (12, 12, 12))
    voxels[5, 5, 5] = 4000.0  # a vessel
    scaled = robust_intensity(voxels)
    head = np.sort(voxels[voxels > voxels.mean()].astype(np.float64))
    low, high = (np.interp(q * (len(head) - 1), np.arange(len(head)), head) for q in (0.01, 0.99))
    np.testing.assert_allclose(scaled, np.clip((voxels - low) / (high - low), 0, 1), atol=1e-5)
    np.testing.assert_allclose(robust_intensity(voxels * 7), scaled, atol=1e-5)
    assert (scaled.min(), scaled.max()) == (0.0, 1.0)
    flat = np.zeros((8, 8, 8), dtype=np.float32)
    flat[2:5] = 3.0
    with pytest.raises(BadScan, match="99 % of its foreground is 3"):
        robust_intensity(flat)


def test_intensity_follows_the_modality_unless_it_is_given():
    assert [check_preparation(m, "world", None) for m in ("vbm", "t1w", "quasiraw")] == ["none", "robust", "robust"]
    assert check_preparation("vbm", "brain", "robust") == "robust"
    with pytest.raises(UserError, match=r"crop='brian' is not known \(did you mean 'brain'\?\); allowed: world, brain"):
        check_preparation("vbm", "brian", None)
    with pytest.raises(UserError, match="intensity='zscore' is not known; allowed: none, robust"):
        check_preparation("vbm", "world", "zscore")


def at(volume: np.ndarray, grid: Grid, *millimetres: float) -> float:
    """The voxel nearest to a position in MNI space."""
    place = np.linalg.inv(np.array(grid.affine)) @ [*millimetres, 1]
    return float(volume[tuple(np.round(place[:3]).astype(int))])


@pytest.mark.parametrize("turn", [TURNS[0], TURNS[13], TURNS[38]], ids=["as it is", "turned", "turned otherwise"])
def test_mni_tissue_maps_keep_their_anatomy(tmp_path, turn):
    grid = Grid.vbm(3.0)
    maps = {}
    for tissue in ("gm", "wm"):
        image = nibabel.load(NILEARN / f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz")
        nibabel.save(turned(np.asarray(image.dataobj), image.affine, *turn), tmp_path / f"{tissue}.nii")
        maps[tissue] = load_volume(tmp_path / f"{tissue}.nii", grid).astype(np.float32)
        maps[tissue] /= maps[tissue].max()
    for side in (-1, 1):
        assert at(maps["gm"], grid, side * 30, -66, -48) > 0.5  # cerebellar cortex: behind and below
        assert at(maps["gm"], grid, side * 30, 60, -48) < 0.05  # nothing in front of it
        assert at(maps["gm"], grid, side * 12, 12, 6) > 0.5  # caudate head
        assert at(maps["wm"], grid, side * 27, -15, 27) > 0.8  # corona radiata
    assert at(maps["wm"], grid, 0, 27, 3) + at(maps["wm"], grid, 0, -36, 15) > 0.8  # genu and splenium
    assert at(maps["gm"], grid, 0, 0, 105) == 0  # air above the vertex


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii", "scaled+tlrc.HEAD"])
def test_nibabels_own_files_come_out_as_nibabel_reads_them(name):
    image = nibabel.squeeze_image(nibabel.as_closest_canonical(nibabel.load(NIBABEL / name)))
    volume = load_volume(NIBABEL / name, Grid.of(image.shape, image.affine))
    expected = image.get_fdata()
    while np.abs(expected).max() > 32768:
        expected = expected / 2
    np.testing.assert_allclose(volume, expected.astype(np.float16), rtol=1e-3)


@templates
def test_left_is_left_in_the_aal_atlas_and_its_cerebellum_lies_behind_and_below():
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


@templates
def test_left_is_left_in_an_atlas_stored_from_right_to_left():
    path = MRICRON / "HarvardOxford-cort-maxprob-thr0-1mm.nii.gz"
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "A", "S")
    grid = Grid.centred((181, 217, 181), 1.0)
    labels = load_volume(path, grid)
    x, y = (np.indices(grid.shape)[axis] + grid.affine[axis][3] for axis in (0, 1))
    # The planum temporale is larger on the left (Geschwind and Levitsky, Science 1968).
    left, right = (np.count_nonzero((labels == 46) & (side * x > 0)) for side in (-1, 1))
    assert left > 1.15 * right > 4000
    assert y[labels == 48].mean() < -80 < 40 < y[labels == 1].mean()  # occipital pole behind, frontal pole in front


@templates
def test_a_t1_brain_on_the_brain_crop_is_the_same_wherever_and_however_it_was_stored(tmp_path):
    image = nibabel.load(MRICRON / "ch2bet.nii.gz")
    grid = Grid.centred((60, 72, 60), 3.0)
    expected = load_volume(MRICRON / "ch2bet.nii.gz", grid, crop="brain", intensity="robust")
    moved = image.affine.copy()
    moved[:3, 3] += [40, -25, 60]
    nibabel.save(turned(np.asarray(image.dataobj), moved, (2, 0, 1), (False, True, True)), tmp_path / "scan.nii")
    volume = load_volume(tmp_path / "scan.nii", grid, crop="brain", intensity="robust")
    np.testing.assert_array_equal(volume, expected)
    assert (volume.min(), volume.max()) == (0, 1)
    # The brain fills the box's middle: no tissue on any face of it, and the cerebellum behind and below, not in front.
    assert not any(np.take(volume, end, axis=axis).any() for axis in range(3) for end in (0, -1))
    low = volume[:, :, 8:16].astype(np.float32)
    assert low[:, :36].mean() > 3 * low[:, 36:].mean()


def test_torch_and_numpy_round_to_the_same_float16(monkeypatch):
    import torch  # noqa: F401  (so that it is there to be used)

    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate(
        [values[np.abs(values) < 60000.0], np.float32([0.0, -0.0, 6e-8, 2.98e-8, 2.99e-8, 1.0004883])]
    )
    with_torch = as_float16(values.copy())
    monkeypatch.delitem(sys.modules, "torch")
    assert np.array_equal(with_torch.view(np.uint16), as_float16(values.copy()).view(np.uint16))
