"""The largest volumes that are read, so that a file that claims more is refused before memory is taken for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

MAX_SIDE = 4096  # voxels
# 406 cubed; a whole head at 0.5 mm has 58 million voxels. In float64 it takes 0.5 GB, and a process holds two copies at most.
MAX_VOXELS = 2**26
HEADER_BYTES = 2**24  # of one member: its header with all extensions


def is_too_large(shape: Sequence[int]) -> bool:
    """Return whether a volume of this shape is not read at all."""
    return any(side > MAX_SIDE for side in shape) or prod(shape) > MAX_VOXELS


def largest_member(voxels: int = MAX_VOXELS) -> int:
    """Return the most bytes that the file of a volume can have: float64 voxels and a header, not compressed."""
    return 8 * voxels + HEADER_BYTES
