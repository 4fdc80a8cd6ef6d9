"""The grid on which the voxels of a data set lie, and the known grids of arrays without a header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# CAT12's default bounding box at 1.5 mm, the grid of the paper's grey-matter maps.
VBM_SHAPE = (121, 145, 121)
VBM_ORIGIN = (-90.0, -126.0, -72.0)  # mm


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: shape (D, H, W), and the 4 x 4 affine from indices to the centres of voxels in mm (RAS)."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        spacing = " x ".join(f"{edge:g}" for edge in self.spacing)
        return f"{' x '.join(map(str, self.shape))} voxels of {spacing} mm"

    @property
    def spacing(self) -> tuple[float, ...]:
        """The three edges of a voxel in mm."""
        return tuple(float(round(v, 6)) for v in np.linalg.norm(np.array(self.affine)[:3, :3], axis=0))

    def to_dict(self) -> dict[str, Any]:
        """The grid as stored in the manifest."""
        return {"shape": list(self.shape), "spacing": list(self.spacing), "affine": [list(row) for row in self.affine]}

    @classmethod
    def from_dict(cls, grid: dict[str, Any]) -> Grid:
        """The inverse of ``to_dict``."""
        d, h, w = (int(n) for n in grid["shape"])
        return cls((d, h, w), tuple(tuple(float(v) for v in row) for row in grid["affine"]))

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: NDArray[Any]) -> Grid:
        """The grid of an image; the affine is rounded to 1 µm so that equal grids compare equal."""
        d, h, w = (int(n) for n in shape)
        return cls((d, h, w), tuple(tuple(float(round(v, 3)) + 0.0 for v in row) for row in np.asarray(affine)))

    def distance(self, other: Grid) -> float:
        """The largest distance in mm between corresponding corners of two grids; 0 if the grids are equal."""
        corners = [
            np.array([[i, j, k, 1] for i in (0, d - 1) for j in (0, h - 1) for k in (0, w - 1)]) @ np.array(affine).T
            for (d, h, w), affine in ((self.shape, self.affine), (other.shape, other.affine))
        ]
        return float(np.linalg.norm((corners[0] - corners[1])[:, :3], axis=1).max())

    @classmethod
    def vbm(cls, spacing: float) -> Grid:
        """The VBM box (181.5 x 217.5 x 181.5 mm) divided into voxels of ``spacing`` mm."""
        edges = [n * 1.5 for n in VBM_SHAPE]
        shape = tuple(max(1, round(edge / spacing)) for edge in edges)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = [o - 0.75 + spacing / 2 for o in VBM_ORIGIN]
        return cls.of(shape, affine)

    @classmethod
    def centred(cls, shape: tuple[int, ...], spacing: float) -> Grid:
        """``shape`` voxels of ``spacing`` mm, centred on the origin of the world."""
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * spacing for n in shape]
        return cls.of(shape, affine)

    @property
    def upright(self) -> bool:
        """Whether the axes are the world's x, y and z, neither oblique nor reversed."""
        linear = np.array(self.affine)[:3, :3]
        return bool(np.array_equal(linear, np.diag(np.diag(linear))) and (np.diag(linear) > 0).all())


class ArrayBox(NamedTuple):
    """The grid of .npy arrays of a known shape."""

    modality: str
    spacing: float  # mm
    origin: tuple[float, float, float]  # mm, of the first voxel after reorienting to RAS
    orientation: str  # of the stored axes, for example LAS


# OpenBHB's grey-matter maps are stored as CAT12 writes them (RAS). Its quasi-raw images were registered by FSL to
# MNI152_T1_1mm and are assumed to keep that template's orientation (LAS: the first axis runs from right to left).
ARRAY_BOXES = {
    VBM_SHAPE: ArrayBox("vbm", 1.5, VBM_ORIGIN, "RAS"),
    (182, 218, 182): ArrayBox("quasiraw", 1.0, (-91.0, -126.0, -72.0), "LAS"),
}


def array_orientation(shape: tuple[int, ...], declared: str = "") -> str:
    """The orientation of an array: the declared one, or that of its known shape, or RAS."""
    box = ARRAY_BOXES.get((shape[0], shape[1], shape[2]))
    return declared or (box.orientation if box else "RAS")


def array_grid(shape: tuple[int, ...]) -> Grid | None:
    """The grid of an array in RAS, or None if its shape is not in ``ARRAY_BOXES``."""
    box = ARRAY_BOXES.get((shape[0], shape[1], shape[2]))
    if box is None:
        return None
    affine = np.diag([box.spacing] * 3 + [1.0])
    affine[:3, 3] = box.origin
    return Grid.of(shape, affine)
