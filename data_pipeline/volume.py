"""One scan as an array: read, turned to RAS, brought to the grid, scaled, checked. Axes (D, H, W) = nibabel's x, y, z."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.processing import resample_from_to

from infra.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

# CAT12's default bounding box at 1.5 mm, the grid of the paper's grey-matter maps.
VBM_SHAPE = (121, 145, 121)
VBM_ORIGIN = (-90.0, -126.0, -72.0)
REFERENCE_TIV_ML = 1500.0  # to which `scaling: tiv` brings every head


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: shape (D, H, W), spacing in mm, and the RAS affine of voxel (0, 0, 0)'s centre."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edge lengths of a voxel in mm."""
        return tuple(float(round(v, 6)) for v in np.linalg.norm(np.array(self.affine)[:3, :3], axis=0))

    def to_dict(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {"shape": list(self.shape), "spacing": list(self.spacing), "affine": [list(row) for row in self.affine]}

    @classmethod
    def from_dict(cls, grid: dict[str, Any]) -> Grid:
        """From the manifest."""
        d, h, w = (int(n) for n in grid["shape"])
        return cls((d, h, w), tuple(tuple(float(v) for v in row) for row in grid["affine"]))

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: Array) -> Grid:
        """From an image's shape and affine, rounded to a micrometre so that equal grids compare equal."""
        d, h, w = (int(n) for n in shape)
        return cls((d, h, w), tuple(tuple(float(round(v, 3)) + 0.0 for v in row) for row in np.asarray(affine)))

    def distance(self, other: Grid) -> float:
        """The longest way in mm between corresponding corners of the two grids: 0 for equal ones."""
        ends = [
            np.array([[i, j, k, 1] for i in (0, d - 1) for j in (0, h - 1) for k in (0, w - 1)]) @ np.array(affine).T
            for (d, h, w), affine in ((self.shape, self.affine), (other.shape, other.affine))
        ]
        return float(np.linalg.norm((ends[0] - ends[1])[:, :3], axis=1).max())

    @classmethod
    def vbm(cls, spacing: float) -> Grid:
        """The VBM box (181.5 x 217.5 x 181.5 mm) cut into voxels of ``spacing`` mm."""
        edges = [n * 1.5 for n in VBM_SHAPE]
        shape = tuple(max(1, round(edge / spacing)) for edge in edges)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = [o - 0.75 + spacing / 2 for o in VBM_ORIGIN]
        return cls.of(shape, affine)


class BadScan(Exception):
    """A scan that cannot be used; the text is the reason that quarantine.tsv gives, beside rule, figure and threshold."""

    def __init__(
        self, reason: str, rule: str = "unreadable", figure: float | None = None, threshold: float | None = None
    ) -> None:
        super().__init__(reason)
        self.rule, self.figure, self.threshold = rule, figure, threshold


def open_image(path: Path) -> Any:
    """A scan's image, RAS, three-dimensional (one-volume 4D files lose their last axis). BadScan where it is not one."""
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))
    except Exception as error:  # nibabel and gzip raise many kinds for a damaged file
        raise BadScan(f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        image = nibabel.squeeze_image(image)
    elif len(shape) != 3:
        raise BadScan(f"shape {shape} is not one 3D volume", "shape", len(shape), 3)
    if not (np.isfinite(image.affine).all() and abs(np.linalg.det(image.affine)) > 1e-9):
        raise BadScan("the affine in the header is singular or not finite", "affine")
    return image


# What a scan is refused for at loading, where the cohort's rules say so (data_pipeline.quality).
DEFAULT_CHECKS = frozenset({"nonfinite", "constant"})


def load_volume(path: Path, grid: Grid, *, factor: float = 1.0) -> Array:
    """A scan on the grid: (D, H, W) float16, multiplied by ``factor``. BadScan for what cannot be used."""
    return to_float16(read_voxels(path, grid), factor)


def read_voxels(path: Path, grid: Grid, checks: frozenset[str] = DEFAULT_CHECKS) -> Array:
    """A scan on the grid: (D, H, W) float32, not scaled.

    ``checks``: ``nonfinite`` refuses NaN and infinite voxels (else they become 0), ``constant`` a volume of one value,
    ``grid`` one that lies on another grid (else it is resampled). BadScan names the rule and the figure.
    """
    image = open_image(path)
    here = Grid.of(image.shape, image.affine)
    if here != grid and "grid" in checks:
        found = f"{' x '.join(map(str, here.shape))} voxels of {' x '.join(f'{v:g}' for v in here.spacing)} mm"
        raise BadScan(
            f"lies on another grid ({found}), up to {here.distance(grid):.4g} mm off", "grid", here.distance(grid), 0
        )
    try:
        if here != grid:
            image = resample_from_to(image, (grid.shape, np.array(grid.affine)), order=1)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # a truncated gzip stream shows only here
        raise BadScan(f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    if voxels.size == 0:
        raise BadScan("no voxels", "empty", 0, 1)
    if not np.isfinite((voxels.min(), voxels.max())).all():  # either is NaN where any voxel is
        finite = np.isfinite(voxels)
        count = int((~finite).sum())
        if "nonfinite" in checks:
            raise BadScan(f"{count} voxels are NaN or infinite", "nonfinite", count, 0)
        voxels = np.where(finite, voxels, np.float32(0))
    if "constant" in checks and voxels.min() == voxels.max():
        value = float(voxels.flat[0])
        raise BadScan(f"every voxel is {value:g}", "constant", value)
    return voxels


def scaled(voxels: Array, factor: float = 1.0) -> Array:
    """float32 voxels times ``factor``, within the range of float16; ``voxels`` itself may be overwritten."""
    peak = max(-float(voxels.min()), float(voxels.max())) * abs(factor)
    # float16 ends at 65504: raw intensities beyond are scaled by a power of two, which loses nothing and which the
    # z-score of the loader takes out again.
    while peak > 32768.0:
        factor *= 0.5
        peak *= 0.5
    if factor == 1.0:
        return voxels
    return np.multiply(voxels, np.float32(factor), out=voxels if voxels.flags.writeable else None)


def to_float16(voxels: Array, factor: float = 1.0) -> Array:
    """What the shards hold: float32 voxels times ``factor`` as float16 in C order; ``voxels`` may be overwritten."""
    return np.ascontiguousarray(scaled(voxels, factor).astype(np.float16))


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
