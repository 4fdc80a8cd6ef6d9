"""Raw heads for the tests: a real one (Debian's mricron-data), its variants with a known truth, and files that are no heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tests.data_pipeline.volume.phantoms import reoriented

MRICRON = Path("/usr/share/mricron/templates")
CH2, MACAQUE, LABELS = (MRICRON / f"{name}.nii.gz" for name in ("ch2", "inia19-t1-brain", "aal"))
needs_mricron = pytest.mark.skipif(not CH2.is_file(), reason="needs Debian's mricron-data (make test-packages)")


def head() -> tuple[np.ndarray, np.ndarray]:
    """The real head: (D, H, W) float32, and its affine."""
    image = nibabel.load(CH2)
    return np.asarray(image.dataobj, dtype=np.float32), image.affine


def moved(rotation: tuple[float, float, float], shift: tuple[float, float, float]) -> nibabel.Nifti1Image:
    """The head turned (degrees about x, y, z) and shifted (mm) in a box that holds it."""
    voxels, affine = head()
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", rotation, degrees=True).as_matrix()
    turn[:3, 3] = shift
    box = np.eye(4)
    box[:3, 3] = np.array([-115.0, -135.0, -125.0]) + shift
    step = np.linalg.inv(affine) @ np.linalg.inv(turn) @ box
    shape = (231, 271, 241)
    return nibabel.Nifti1Image(
        ndimage.affine_transform(voxels, step[:3, :3], step[:3, 3], shape, order=3).clip(0, 255).astype(np.float32), box
    )


def thick_slices() -> nibabel.Nifti1Image:
    """The head in slices of 3 mm: the mean of three."""
    voxels, affine = head()
    affine = affine.copy()
    affine[2, 3] += 1.0
    affine[:3, 2] *= 3
    return nibabel.Nifti1Image(voxels[:, :, :180].reshape(181, 217, 60, 3).mean(axis=3), affine)


def with_bias() -> nibabel.Nifti1Image:
    """The head with a smooth bias field from 0.6 to 1.6."""
    voxels, affine = head()
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in voxels.shape), indexing="ij")
    return nibabel.Nifti1Image(
        (voxels * np.exp(0.25 * x - 0.2 * y * y + 0.25 * z * x + 0.15)).astype(np.float32), affine
    )


def with_noise(sd: float = 4.5) -> nibabel.Nifti1Image:
    """The head with Rician noise (3 % of white matter)."""
    voxels, affine = head()
    real, imaginary = np.random.default_rng(0).normal(0, sd, (2, *voxels.shape)).astype(np.float32)
    return nibabel.Nifti1Image(np.hypot(voxels + real, imaginary), affine)


def cut(low: int, high: int) -> nibabel.Nifti1Image:
    """The head without its lowest and highest slices."""
    voxels, affine = head()
    affine = affine.copy()
    affine[2, 3] += low
    return nibabel.Nifti1Image(voxels[:, :, low : voxels.shape[2] - high], affine)


def turned_axes() -> nibabel.Nifti1Image:
    """The head stored from back to front, right to left, and top to bottom, with the header that says so."""
    voxels, affine = head()
    return reoriented(voxels, affine, (1, 0, 2), (True, True, True))


def without_origin() -> nibabel.Nifti1Image:
    """The head whose header has lost its origin."""
    voxels, affine = head()
    affine = affine.copy()
    affine[:3, 3] = 0.0
    return nibabel.Nifti1Image(voxels, affine)


def with_slope() -> nibabel.Nifti1Image:
    """The head as int16 with slope and intercept."""
    voxels, affine = head()
    image = nibabel.Nifti1Image((voxels * 100 - 5000).astype(np.int16), affine)
    image.header.set_slope_inter(0.37, 5000 * 0.37)
    return image


VARIANTS: dict[str, Callable[[], nibabel.Nifti1Image]] = {
    "turned": lambda: moved((30.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "turned3": lambda: moved((-20.0, 15.0, 25.0), (40.0, -25.0, 20.0)),
    "thick": thick_slices,
    "axes": turned_axes,
    "origin": without_origin,
    "bias": with_bias,
    "noise": with_noise,
    "neck": lambda: cut(8, 0),
    "top": lambda: cut(0, 28),
    "slope": with_slope,
}


def t2_head() -> nibabel.Nifti1Image:
    """The head with the contrast of a T2-weighted image: dark white matter, bright fluid."""
    voxels, affine = head()
    inside = voxels > 20
    return nibabel.Nifti1Image(np.where(inside, 190.0 - voxels, voxels).clip(0).astype(np.float32), affine)


def four_dimensional() -> nibabel.Nifti1Image:
    """A series of three volumes."""
    return nibabel.Nifti1Image(
        np.random.default_rng(0).random((64, 64, 40, 3), dtype=np.float32), np.diag([3, 3, 3, 1.0])
    )


def empty() -> nibabel.Nifti1Image:
    """A volume of zeros."""
    return nibabel.Nifti1Image(np.zeros((128, 128, 128), np.float32), np.diag([1.5, 1.5, 1.5, 1.0]))


def localiser() -> nibabel.Nifti1Image:
    """Fifteen thick slices."""
    voxels = np.random.default_rng(0).random((256, 256, 15), dtype=np.float32)
    return nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 8.0, 1.0]))


def write_raw(root: Path, images: dict[str, nibabel.Nifti1Image | Path]) -> Path:
    """Write a BIDS folder of raw scans, one participant each; a path is copied."""
    lines = ["participant_id\tage\tsex\tsite\ttiv"]
    for number, (name, image) in enumerate(images.items()):
        folder = root / f"sub-{name}" / "anat"
        folder.mkdir(parents=True)
        target = folder / f"sub-{name}_T1w.nii.gz"
        if isinstance(image, Path):
            target.write_bytes(image.read_bytes())
        else:
            nibabel.save(image, target)
        lines.append(f"sub-{name}\t{30 + number}\t{'FM'[number % 2]}\tsite{number % 2}\t1500")
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root
