"""The first pose of a brain: rotation, place and size relative to the template, from any orientation that a header may give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

from data_pipeline.prepare.resampling import isotropic, resample
from data_pipeline.prepare.template import load_template
from data_pipeline.volume.grid import Grid

COARSE = 8.0  # mm: enough for the shape of a brain
BEST = 3  # starts that are refined
POWELL: Any = {"xtol": 0.05, "ftol": 1e-5, "maxiter": 20}
Affine = NDArray[np.float64]


def find_pose(brain: NDArray[np.float32], affine: Affine, angles: Sequence[float], *, rigid: bool) -> Affine:
    """Find the pose of a brain by the correlation of coarse volumes.

    The centres of mass are joined first. Every combination of ``angles`` about the three axes is tried, and the best are
    refined in seven parameters: rotation, translation and size.

    Args:
        brain: (D, H, W) intensities, 0 outside the brain.
        affine: of the volume.
        angles: in degrees.
        rigid: leave the size as it is.

    Returns:
        (4, 4) from points (mm) of the template to points of the brain.
    """
    coarse, coarse_affine = isotropic(brain, affine, COARSE)
    template = load_template(Grid.vbm(COARSE))
    centres = [_centre(coarse, coarse_affine), _centre(template.t1, template.affine)]
    size = 0.0 if rigid else np.log(_radius(coarse, coarse_affine) / _radius(template.t1, template.affine))

    def pose(parameters: NDArray[np.float64]) -> Affine:
        """The map of a rotation vector (degrees), a shift (mm) and the logarithm of the size."""
        found = np.eye(4)
        scale = 1.0 if rigid else np.exp(size + parameters[6] / 100.0)
        found[:3, :3] = scale * Rotation.from_rotvec(parameters[:3], degrees=True).as_matrix()
        found[:3, 3] = centres[0] + parameters[3:6] - found[:3, :3] @ centres[1]
        return found

    def cost(parameters: NDArray[np.float64]) -> float:
        """Minus the correlation with the template."""
        moved = resample(coarse, coarse_affine, template.grid, pose(parameters))
        return -float(np.corrcoef(moved.ravel(), template.t1.ravel())[0, 1]) if moved.any() else 1.0

    starts = [np.array([*turn, 0.0, 0.0, 0.0, 0.0]) for turn in itertools.product(angles, repeat=3)]
    starts.sort(key=cost)
    refined = [optimize.minimize(cost, start, method="Powell", options=POWELL) for start in starts[:BEST]]
    return pose(min(refined, key=lambda result: float(result.fun)).x)


def angle_of(matrix: Affine) -> float:
    """The angle in degrees of the rotation in an affine map."""
    return float(np.degrees(_rotation(matrix).magnitude()))


def stretches_of(matrix: Affine) -> NDArray[np.float64]:
    """(3,) factors of length of an affine map along its principal axes, the smallest first."""
    return np.asarray(np.linalg.svd(matrix[:3, :3], compute_uv=False)[::-1], dtype=np.float64)


def _rotation(matrix: Affine) -> Rotation:
    """The rotation nearest to the linear part of an affine map."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    turn = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
    return Rotation.from_matrix(turn)


def _centre(voxels: NDArray[np.float32], affine: Affine) -> NDArray[np.float64]:
    """The centre of mass of positive voxels in mm."""
    index = np.array(ndimage.center_of_mass(voxels > 0))
    return np.asarray(affine[:3, :3] @ index + affine[:3, 3], dtype=np.float64)


def _radius(voxels: NDArray[np.float32], affine: Affine) -> float:
    """The radius in mm of a ball with the volume of the positive voxels."""
    return float((np.count_nonzero(voxels > 0) * abs(np.linalg.det(affine[:3, :3]))) ** (1 / 3))
