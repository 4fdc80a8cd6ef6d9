"""Sample volumes at other points: on a grid through an affine map or displacements, and at coarser isotropic voxels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.volume.grid import Grid

Affine = NDArray[np.float64]
Volume = NDArray[np.float32]
FWHM = 2.355  # widths at half maximum in a standard deviation
COARSER = 1.2  # new voxels so many times larger than the old ones need smoothing against aliasing


def resample(
    voxels: NDArray[Any], affine: Affine, grid: Grid, to_source: Affine, *, order: Literal[1, 3] = 1
) -> Volume:
    """Sample a volume at the voxels of a grid, once.

    Args:
        voxels: (D, H, W), smoothed first if the grid's voxels are larger than its own.
        affine: of the volume.
        grid: where to sample.
        to_source: (4, 4) from points (mm) of the grid to points of the volume.
        order: of the spline; 1 is linear.

    Returns:
        (D, H, W) float32 on the grid; 0 outside the volume.
    """
    step = np.linalg.inv(affine) @ to_source @ np.array(grid.affine)
    sampled: Volume = ndimage.affine_transform(
        _smoothed(voxels, np.abs(step[:3, :3]).max(axis=1)), step[:3, :3], step[:3, 3], grid.shape, order=order,
        output=np.float32,
    )  # fmt: skip
    return sampled


def isotropic(voxels: NDArray[Any], affine: Affine, spacing: float) -> tuple[Volume, Affine]:
    """Return a volume at voxels of ``spacing`` mm along its own axes, and their affine."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    shape = np.maximum(1, np.ceil(np.array(voxels.shape) * lengths / spacing)).astype(int)
    scale = spacing / lengths
    offset = (scale - 1) / 2  # so that the corners of both boxes coincide
    sampled: Volume = ndimage.affine_transform(
        _smoothed(voxels, scale), np.diag(scale), offset, tuple(shape.tolist()), order=1, output=np.float32, mode="nearest"
    )  # fmt: skip
    index = np.eye(4)
    index[:3, :3], index[:3, 3] = np.diag(scale), offset
    return sampled, affine @ index


def spread(values: Volume, affine: Affine, shape: tuple[int, ...], onto: Affine) -> Volume:
    """Interpolate a smooth field (D, H, W), for example of biases, to the voxels of a finer volume over the same place."""
    step = np.linalg.inv(affine) @ onto
    field: Volume = ndimage.affine_transform(
        values, step[:3, :3], step[:3, 3], shape, order=1, output=np.float32, mode="nearest"
    )
    return field


def displaced(
    voxels: Volume, affine: Affine, grid: Grid, displacement: NDArray[np.float32], *, smooth: bool = True
) -> Volume:
    """Sample a volume at the displaced voxels of a grid.

    Args:
        voxels: (D, H, W).
        affine: of the volume.
        grid: where the result lies.
        displacement: (D, H, W, 3) in mm (RAS), on the grid.
        smooth: smooth first if the grid's voxels are larger.

    Returns:
        (D, H, W) float32 on the grid; 0 outside the volume.
    """
    step = np.linalg.inv(affine) @ np.array(grid.affine)
    index = np.indices(grid.shape, dtype=np.float32)
    source = np.tensordot(step[:3, :3], index, axes=1) + step[:3, 3, None, None, None]
    source += np.tensordot(np.linalg.inv(affine)[:3, :3], displacement, axes=(1, 3))
    if smooth:
        voxels = _smoothed(voxels, np.abs(step[:3, :3]).max(axis=1))
    sampled: Volume = ndimage.map_coordinates(voxels, source.astype(np.float32), order=1, output=np.float32)
    return sampled


def jacobian(displacement: NDArray[np.float32], spacing: float) -> Volume:
    """Return the determinant (D, H, W) of the map x -> x + displacement (D, H, W, 3) on a grid with voxels of ``spacing``."""
    slopes = np.stack(
        [np.stack([*np.gradient(displacement[..., axis], spacing)], axis=-1) for axis in range(3)], axis=-2
    )
    slopes += np.eye(3, dtype=slopes.dtype)
    a, b, c = slopes[..., 0, :], slopes[..., 1, :], slopes[..., 2, :]
    determinant: Volume = np.einsum("...i,...i->...", a, np.cross(b, c)).astype(np.float32)
    return determinant


def _smoothed(voxels: NDArray[np.float32], scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """The volume, smoothed along axes where the new voxels are ``COARSER`` (``scale`` times larger)."""
    widths = np.sqrt(np.maximum(scale**2 - 1.0, 0.0)) / FWHM
    widths[scale < COARSER] = 0.0
    if not widths.any():
        return np.asarray(voxels, dtype=np.float32)
    return np.asarray(
        ndimage.gaussian_filter(np.asarray(voxels, dtype=np.float32), widths, mode="nearest", truncate=3.0)
    )
