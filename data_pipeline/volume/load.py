"""One scan as an array: read, turned to RAS, brought to the grid, scaled, checked. Axes (D, H, W) = nibabel's x, y, z."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from data_pipeline.volume.grid import ARRAY_BOXES, array_grid, array_orientation
from data_pipeline.volume.grid import VBM_ORIGIN as VBM_ORIGIN
from data_pipeline.volume.grid import VBM_SHAPE as VBM_SHAPE
from data_pipeline.volume.grid import Grid as Grid
from infra.errors import UserError, nearest

Array = np.ndarray[Any, np.dtype[Any]]

REFERENCE_TIV_ML = 1500.0  # to which `scaling: tiv` brings every head


@dataclass(frozen=True)
class Preparation:
    """How a scan's file becomes the voxels of a shard: grid, crop, intensity (``load_volume``), scaling (``scale_factor``)."""

    grid: Grid
    scaling: str = "none"
    crop: str = "world"
    intensity: str = "none"

    @classmethod
    def of(cls, grid: dict[str, Any], settings: Mapping[str, Any]) -> Preparation:
        """From a manifest's grid and settings."""
        kept = {**PREPARED, **settings}
        return cls(Grid.from_dict(grid), str(kept["scaling"]), str(kept["crop"]), str(kept["intensity"]))


class BadScan(Exception):
    """A scan that cannot be used; the text is the reason that quarantine.tsv gives, beside rule, figure and threshold."""

    def __init__(
        self, reason: str, rule: str = "unreadable", figure: float | None = None, threshold: float | None = None
    ) -> None:
        super().__init__(reason)
        self.rule, self.figure, self.threshold = rule, figure, threshold


def open_image(path: Path, orientation: str = "") -> Any:
    """A scan's image, RAS, three-dimensional (one-volume 4D files lose their last axis). BadScan where it is not one.

    ``orientation`` (as in ``LAS``) is what was declared of an array file's axes; other files' headers say it.
    """
    if path.suffix == ".npy":
        return _open_array(path, orientation)
    try:
        image = nibabel.load(path)
        # A time series may be large: its shape is looked at before anything is turned.
        shape = tuple(int(n) for n in image.shape)
        if len(shape) < 3 or any(n != 1 for n in shape[3:]):
            raise BadScan(f"shape {shape} is not one 3D volume", "shape", len(shape), 3)
        if image.get_data_dtype().kind not in "iuf":
            raise BadScan(f"voxels are of type {image.get_data_dtype()}; numbers are needed", "type")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
            raise BadScan("its affine is not invertible, so nothing says where its voxels lie", "affine")
        image = nibabel.as_closest_canonical(image)
    except BadScan:
        raise
    except Exception as error:  # nibabel and gzip raise many kinds for a damaged file
        raise _unreadable(path, error) from None
    return image if len(shape) == 3 else nibabel.squeeze_image(image)


def load_volume(
    path: Path, grid: Grid, *, factor: float = 1.0, crop: str = "world", intensity: str = "none", orientation: str = ""
) -> Array:
    """A scan on the grid: (D, H, W) float16, multiplied by ``factor``. BadScan for what cannot be used.

    Args:
        crop: one of ``CROPS``: ``world`` lays the grid where its affine says; ``brain`` moves it so that its middle lies on
            the centre of mass of the scan's foreground.
        intensity: one of ``INTENSITIES``: ``none``, or ``robust`` (see ``robust_intensity``).
        orientation: see ``open_image``.
    """
    return to_float16(read_voxels(path, grid, crop=crop, intensity=intensity, orientation=orientation), factor)


# What a scan is refused for at loading, where the cohort's rules say so (data_pipeline.quality.rules).
DEFAULT_CHECKS = frozenset({"nonfinite", "constant"})


def read_voxels(
    path: Path, grid: Grid, checks: frozenset[str] = DEFAULT_CHECKS, *, crop: str = "world", intensity: str = "none",
    orientation: str = "",
) -> Array:  # fmt: skip
    """A scan on the grid: (D, H, W) float32, not scaled by a factor. Arguments as ``load_volume``, and

    ``checks``: ``nonfinite`` refuses NaN and infinite voxels (else they become 0), ``constant`` a volume of one value,
    ``grid`` one that lies on another grid (else it is resampled). BadScan names the rule and the figure.
    """
    image = open_image(path, orientation)
    if "grid" in checks:
        _refuse_other_grid(Grid.of(image.shape, image.affine), grid)
    try:
        voxels = _in_c_order(np.asarray(image.dataobj, dtype=np.float32))
    except Exception as error:  # a truncated gzip stream shows only here
        raise _unreadable(path, error) from None
    if voxels.size == 0:
        raise BadScan("no voxels", "empty", 0, 1)
    low, high = float(voxels.min()), float(voxels.max())
    if not np.isfinite((low, high)).all():  # NaN or infinity anywhere shows in one of them
        finite = np.isfinite(voxels)
        count = int((~finite).sum())
        if "nonfinite" in checks:
            raise BadScan(f"{count} voxels are NaN or infinite", "nonfinite", count, 0)
        voxels[~finite] = 0.0
        low, high = float(voxels.min()), float(voxels.max())
    if "constant" in checks and low == high:
        raise BadScan(f"every voxel is {low:g}", "constant", low)
    placed = INTENSITIES[intensity](to_grid(voxels, image.affine, grid, crop))
    if "constant" in checks and placed is not voxels:
        _refuse_constant(placed, "on the grid every voxel is {:g}: it lies elsewhere; try --crop brain")
    return placed


def scaled(voxels: Array, factor: float = 1.0) -> Array:
    """float32 voxels times ``factor``, within the range of float16; ``voxels`` itself may be overwritten."""
    peak = max(-float(voxels.min()), float(voxels.max())) * abs(factor)
    # float16 ends at 65504: raw intensities beyond are scaled by a power of two, which loses nothing and which the
    # z-score of the loader takes out again.
    while 32768.0 < peak < np.inf:
        factor *= 0.5
        peak *= 0.5
    if factor == 1.0:
        return voxels
    return np.multiply(voxels, np.float32(factor), out=voxels if voxels.flags.writeable else None)


def to_float16(voxels: Array, factor: float = 1.0) -> Array:
    """What the shards hold: float32 voxels times ``factor`` as float16 in C order; ``voxels`` may be overwritten."""
    return as_float16(scaled(voxels, factor))


def as_float16(voxels: Array) -> Array:
    """float32 voxels rounded to float16, in C order.

    By torch where the process has it (0.3 ms for 121 x 145 x 121), else by numpy, which converts voxel by voxel (4.7 ms):
    both round to the nearest, ties to even, so the bits are the same. Reader processes do without torch, which would take
    two thirds of their memory.
    """
    torch = sys.modules.get("torch")
    if torch is None or voxels.dtype != np.float32 or not voxels.flags.writeable:
        return np.ascontiguousarray(voxels.astype(np.float16))
    half: Array = torch.from_numpy(np.ascontiguousarray(voxels)).to(torch.float16).numpy()
    return half


def _in_c_order(voxels: Array) -> Array:
    """A copy in C order, whatever the file's (NIfTI's first axis runs fastest): sums then round alike for every orientation.

    Plane by plane along the middle axis, each plane small enough for the cache: 2.4 ms for 121 x 145 x 121, numpy's own 4.0.
    """
    if voxels.ndim != 3 or voxels.flags.c_contiguous:
        return np.array(voxels, order="C")
    ordered = np.empty(voxels.shape, voxels.dtype)
    for plane in range(voxels.shape[1]):
        ordered[:, plane] = voxels[:, plane]
    return ordered


def _refuse_other_grid(here: Grid, grid: Grid) -> None:
    if here != grid:
        found = f"{' x '.join(map(str, here.shape))} voxels of {' x '.join(f'{v:g}' for v in here.spacing)} mm"
        off = here.distance(grid)
        raise BadScan(f"lies on another grid ({found}), up to {off:.4g} mm off", "grid", off, 0)


def _refuse_constant(voxels: Array, text: str) -> None:
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise BadScan(text.format(low), "constant", low)


def to_grid(voxels: Array, affine: Array, grid: Grid, crop: str = "world") -> Array:
    """(D, H, W) float32 voxels of a RAS image on a grid: cut and padded by zeros where the voxels coincide, else trilinear.

    Interpolation is scipy's, in float32: nibabel's ``resample_from_to`` rounds to the file's type, which for a uint8 image
    are whole numbers.
    """
    affine, target = _steady(affine), np.array(grid.affine)
    if crop == "world" and Grid.of(voxels.shape, affine) == grid:
        return voxels
    step = np.linalg.inv(affine) @ target  # from the grid's voxels to the scan's
    matrix, offset = step[:3, :3], step[:3, 3]
    if crop == "brain":
        # Rounded, as a centre half-way between voxels must not depend on the last bit.
        offset = np.round(centre_of_mass(voxels) - matrix @ ((np.array(grid.shape) - 1) / 2), 6)
    if np.allclose(matrix, np.eye(3), atol=1e-5):
        whole = np.round(offset)
        if crop == "brain" or np.abs(offset - whole).max() < 1e-3:
            return _cut(voxels, whole.astype(int), grid.shape)
    resampled: Array = ndimage.affine_transform(voxels, matrix, offset, grid.shape, order=1, output=np.float32)
    return resampled


def centre_of_mass(voxels: Array) -> Array:
    """The foreground's centre of mass, (3,) in voxels; every foreground voxel weighs the same, bright or dark."""
    return np.array(ndimage.center_of_mass(foreground(voxels)))


def foreground(voxels: Array) -> Array:
    """Which voxels are head: those above the mean, which lies between air and tissue where much of the image is air."""
    inside: Array = voxels > voxels.mean(dtype=np.float64)
    return inside


def robust_intensity(voxels: Array) -> Array:
    """Intensities as shares of the foreground's range: its 1st percentile is 0, its 99th is 1, the rest is cut off there.

    For raw T1 images, whose unit differs between scanners and whose brightest voxels (fat, vessels) say little.
    """
    values = voxels[foreground(voxels)]
    if not len(values):
        return voxels
    low, high = np.percentile(values, ROBUST_PERCENTILES)
    if high <= low:
        raise BadScan(
            f"99 % of its foreground is {float(low):g}; there is no range to scale intensities by",
            "constant",
            float(low),
        )
    scaled: Array = np.clip((voxels - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return scaled


def _as_they_are(voxels: Array) -> Array:
    return voxels


ROBUST_PERCENTILES = (1.0, 99.0)
INTENSITIES: dict[str, Callable[[Array], Array]] = {"none": _as_they_are, "robust": robust_intensity}
CROPS = ("world", "brain")
# How data sets and encoders were prepared that say nothing of it: before these were settings.
PREPARED = {"crop": "world", "intensity": "none"}


def check_preparation(modality: str, crop: str, intensity: str | None) -> str:
    """The intensity scaling meant (None: ``none`` for VBM maps, which are volumes; ``robust`` for T1 images)."""
    intensity = intensity or ("none" if modality == "vbm" else "robust")
    for name, value, allowed in (("crop", crop, CROPS), ("intensity", intensity, tuple(INTENSITIES))):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not known{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    return intensity


def _open_array(path: Path, orientation: str) -> Any:
    """An .npy file (never a pickle) of one of ``ARRAY_BOXES``'s shapes, leading axes of length 1 taken off, turned to RAS."""
    try:
        voxels = np.load(path, mmap_mode="r", allow_pickle=False)
        shape = voxels.shape
        if voxels.dtype.kind not in "iuf":
            raise BadScan(f"voxels are of type {voxels.dtype}; numbers are needed")
        while voxels.ndim > 3 and voxels.shape[0] == 1:
            voxels = voxels[0]
        if voxels.ndim != 3:
            raise BadScan(f"shape {shape} is not one 3D volume", "shape", len(shape), 3)
        voxels = turned(np.asarray(voxels, dtype=np.float32), array_orientation(voxels.shape, orientation))
    except BadScan:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    grid = array_grid(voxels.shape)
    if grid is None:
        shapes = " or ".join(f"{'x'.join(map(str, known))} ({box.spacing:g} mm)" for known, box in ARRAY_BOXES.items())
        raise BadScan(f"shape {shape} is no known grid; .npy files, which have no header, must be {shapes}")
    return nibabel.Nifti1Image(voxels, np.array(grid.affine))


def turned(voxels: Array, orientation: str) -> Array:
    """An array stored in ``orientation`` (as in ``LAS``) as RAS."""
    if orientation == "RAS":
        return voxels
    turn = nibabel.orientations.axcodes2ornt(orientation)
    return np.ascontiguousarray(nibabel.orientations.apply_orientation(voxels, turn))


def _unreadable(path: Path, error: Exception) -> BadScan:
    """The reason without the file's place, which may name a person."""
    text = " ".join(str(error).split())
    for place in (str(path), str(path.parent), path.name, path.name.partition(".")[0]):
        text = text.replace(place, "the file")
    return BadScan(f"unreadable: {type(error).__name__}: {text[:120]}")


def _steady(affine: Array) -> Array:
    """An affine without the last bits of float32, which differ with the order in which a file stores its axes."""
    steady = np.round(np.asarray(affine, dtype=np.float64), 6)
    steady[:3, 3] = np.round(steady[:3, 3], 3)
    return steady + 0.0


def _cut(voxels: Array, start: Array, shape: tuple[int, ...]) -> Array:
    """``shape`` voxels from ``start`` on, zeros where the image ends; no interpolation."""
    cut = np.zeros(shape, dtype=np.float32)
    source = [slice(max(0, s), max(0, min(n, s + m))) for s, n, m in zip(start, voxels.shape, shape, strict=True)]
    place = [
        slice(part.start - s, part.start - s + max(0, part.stop - part.start))
        for part, s in zip(source, start, strict=True)
    ]
    if all(part.stop > part.start for part in source):
        cut[tuple(place)] = voxels[tuple(source)]
    return cut


def scale_factor(scaling: str, values: dict[str, Any]) -> float:
    """What ``load_volume`` multiplies by. ``tiv``: 1500 ml / total intracranial volume, which takes head size out."""
    if scaling == "none":
        return 1.0
    tiv = values.get("tiv")
    if not isinstance(tiv, int | float) or not 300 < tiv < 3000:
        raise BadScan(f"tiv={tiv!r} is not a volume of 300..3000 ml; scaling: tiv needs it", "tiv")
    return REFERENCE_TIV_ML / float(tiv)


def check_scaling(scaling: str) -> None:
    """UserError for an unknown ``scaling``."""
    if scaling not in ("none", "tiv"):
        raise UserError(f"scaling={scaling!r} is not known; allowed: none, tiv")


def zscore(voxels: Array) -> Array:
    """(voxels - mean) / standard deviation over the whole volume, float32, as in the paper's code."""
    wide = voxels.astype(np.float32)
    mean, deviation = float(wide.mean(dtype=np.float64)), float(wide.std(dtype=np.float64))
    return (wide - np.float32(mean)) / np.float32(max(deviation, 1e-8))
