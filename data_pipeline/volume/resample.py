"""Bring a volume to a grid: reorient, crop and pad, or interpolate."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import foreground


def to_grid(
    voxels: NDArray[np.float32], affine: NDArray[np.float64], grid: Grid, crop: str = "world"
) -> NDArray[np.float32]:
    """Bring a volume in RAS to a grid.

    The volume is cropped and padded with zeros if its voxels coincide with the grid's, else interpolated (trilinear). The
    interpolation is scipy's in float32, because nibabel's ``resample_from_to`` rounds to the file's type, which for a uint8
    image are whole numbers.

    Args:
        voxels: (D, H, W) float32.
        affine: (4, 4), of the volume.
        grid: the target.
        crop: ``world`` uses the grid where its affine says; ``brain`` centres the grid on the centre of mass of the
            foreground.

    Returns:
        The voxels on the grid, float32; ``voxels`` itself if it is on the grid already.
    """
    affine, target = _rounded(affine), np.array(grid.affine)
    if crop == "world" and Grid.of(voxels.shape, affine) == grid:
        return voxels
    step = np.linalg.inv(affine) @ target  # from the grid's indices to the volume's
    matrix, offset = step[:3, :3], step[:3, 3]
    if crop == "brain":
        # Rounded, so that a centre half-way between voxels does not depend on the last bit.
        offset = np.round(centre_of_mass(voxels) - matrix @ ((np.array(grid.shape) - 1) / 2), 6)
    if np.allclose(matrix, np.eye(3), atol=1e-5):
        whole = np.round(offset)
        if crop == "brain" or np.abs(offset - whole).max() < 1e-3:
            return _cut(voxels, whole.astype(int), grid.shape)
    from scipy import ndimage  # 0.3 s of CPU, and most volumes are on the grid already

    resampled: NDArray[np.float32] = ndimage.affine_transform(
        voxels, matrix, offset, grid.shape, order=1, output=np.float32
    )
    return resampled


def centre_of_mass(voxels: NDArray[np.float32]) -> NDArray[np.float64]:
    """(3,) centre of mass of the foreground in indices; all foreground voxels have equal weight."""
    from scipy import ndimage

    return np.asarray(ndimage.center_of_mass(foreground(voxels)))


def reorient(voxels: NDArray[Any], orientation: str) -> NDArray[Any]:
    """Return an array (D, H, W) reoriented from ``orientation`` (for example ``LAS``) to RAS; its axes may change places."""
    if orientation == "RAS":
        return voxels
    turn = nibabel.orientations.axcodes2ornt(orientation)
    return np.ascontiguousarray(nibabel.orientations.apply_orientation(voxels, turn))


def _rounded(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """An affine without the last bits of float32, which depend on the order in which a file stores its axes."""
    rounded = np.asarray(np.round(np.asarray(affine, dtype=np.float64), 6), dtype=np.float64)
    rounded[:3, 3] = np.round(rounded[:3, 3], 3)
    rounded += 0.0  # -0.0 becomes 0.0
    return rounded


def _cut(voxels: NDArray[np.float32], start: NDArray[np.int_], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Cut ``shape`` voxels from index ``start``; outside the volume the result is 0."""
    cut = np.zeros(shape, dtype=np.float32)
    source = [slice(max(0, s), max(0, min(n, s + m))) for s, n, m in zip(start, voxels.shape, shape, strict=True)]
    target = [
        slice(axis.start - s, axis.start - s + max(0, axis.stop - axis.start))
        for axis, s in zip(source, start, strict=True)
    ]
    if all(axis.stop > axis.start for axis in source):
        cut[tuple(target)] = voxels[tuple(source)]
    return cut
