"""Phantoms and real images for the tests of volumes."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path

import nibabel
import numpy as np

# Every order and direction of three axes: (axes, flips).
ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]
UPRIGHT = np.array([[2.0, 0, 0, -13], [0, 2, 0, -21], [0, 0, 2, -9], [0, 0, 0, 1]])
NIBABEL = Path(str(resources.files("nibabel"))) / "tests" / "data"


def phantom() -> np.ndarray:
    """(15, 18, 13) zeros around a block whose voxels all differ, so that any wrong turn shows."""
    values = np.zeros((15, 18, 13), dtype=np.float32)
    values[1:12, 4:17, 2:11] = np.arange(1.0, 1 + 11 * 13 * 9).reshape(11, 13, 9)
    return values


def reoriented(voxels: np.ndarray, affine: np.ndarray, axes, flips) -> nibabel.Nifti1Image:
    """The same image stored with its axes in another order and direction, and the affine that states so."""
    stored = np.transpose(voxels, axes)
    to_original = np.zeros((4, 4))
    to_original[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        to_original[old, new] = -1 if flip else 1
        to_original[old, 3] = stored.shape[new] - 1 if flip else 0
        stored = np.flip(stored, new) if flip else stored
    return nibabel.Nifti1Image(np.ascontiguousarray(stored), affine @ to_original)
