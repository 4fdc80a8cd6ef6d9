"""The largest volumes that are read, so that a file that claims more is refused before memory is taken for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, prod

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


def affine_fault(affine: Sequence[Sequence[float]], spacing: Sequence[float]) -> str:
    """Return what the affine (4, 4) of a grid must be but is not; empty if it fits the edges of its voxels in mm."""
    if list(affine[3]) != [0, 0, 0, 1]:
        return "4 rows of 4 numbers, the last one 0, 0, 0, 1"
    (a, b, c), (d, e, f), (g, h, i) = (row[:3] for row in affine[:3])
    edges = [hypot(*column) for column in zip(*(row[:3] for row in affine[:3]), strict=True)]
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    # The volume of a voxel, compared with that of a box with these edges.
    if not abs(determinant) > 1e-6 * prod(edges) or prod(edges) == 0:
        return "that of a grid: its three axes lie in a plane"
    if any(abs(edge - length) > 1e-3 * length for edge, length in zip(edges, spacing, strict=True)):
        shown = " x ".join(f"{edge:g}" for edge in edges)
        return f"that of voxels of {' x '.join(f'{length:g}' for length in spacing)} mm (its own are {shown})"
    return ""
