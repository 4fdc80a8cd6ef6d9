"""The anatomy that simulated brains are made of: MNI152 tissue maps on a grid, region maps, and smooth random fields.

The maps are those that nilearn ships inside its package (ICBM 2009a, 1 mm). Everything is defined in millimetres of MNI
space, so a coarser grid shows the same brain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from data_pipeline.volume.load import Grid
from infra.files import atomic_write

Array = np.ndarray[Any, np.dtype[np.float32]]
VERSION = 5  # part of the cache's name: raise it when what is cached changes

# Gaussian regions: centre and standard deviations in mm (x, y, z); pairs are given once and mirrored.
Ellipsoid = tuple[tuple[float, float, float], tuple[float, float, float]]
PAIRED: dict[str, Ellipsoid] = {
    "hippocampus": ((26, -22, -14), (7, 12, 7)),
    "medial_temporal": ((24, -4, -24), (9, 11, 9)),
    "temporal": ((54, -20, -16), (14, 26, 14)),
    "superior_temporal": ((56, -24, 8), (12, 18, 9)),
    "parietal": ((38, -58, 44), (20, 18, 18)),
    "occipital": ((20, -88, 2), (22, 16, 22)),
    "lateral_frontal": ((42, 28, 24), (18, 24, 22)),
    "orbitofrontal": ((22, 36, -14), (16, 18, 10)),
    "precentral": ((40, -10, 52), (18, 14, 18)),
    "insula": ((38, 4, 0), (8, 18, 12)),
    "caudate": ((12, 12, 10), (7, 14, 11)),
    "thalamus": ((12, -18, 8), (9, 12, 9)),
    "cerebellum": ((24, -62, -36), (22, 18, 16)),
}
MIDLINE: dict[str, Ellipsoid] = {
    "anterior_cingulate": ((0, 34, 18), (9, 16, 16)),
    "precuneus": ((0, -60, 38), (10, 18, 18)),
}
REGIONS = [f"{name}_{side}" for name in PAIRED for side in ("left", "right")] + list(MIDLINE)


@dataclass(frozen=True)
class Template:
    """Maps on one grid, on the whole of it (D, H, W) or at the M voxels of the brain."""

    grid: Grid
    mask: Any  # (D, H, W) bool: where grey matter may be
    gm: Array  # (D, H, W) share of grey matter, 0..1
    wm: Array  # (D, H, W)
    csf: Array  # (D, H, W)
    residual: Array  # (D, H, W) T1 less the mixture of tissue means, in units of the white-grey difference
    ventricle_distance: Array  # (D, H, W) mm outside the lateral ventricles, negative inside
    regions: Array  # (R, M) region maps, 0..1

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.grid.spacing)) / 1000.0


def load_template(grid: Grid) -> Template:
    """The template on ``grid``: from the user's cache, or made in a few seconds and kept there."""
    key = hashlib.sha256(repr((VERSION, grid)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "yaware"
    path = folder / f"template-{key}.npz"
    if path.is_file():
        try:
            with np.load(path) as stored:
                return Template(grid, **{name: stored[name] for name in stored.files})
        except (OSError, ValueError, TypeError, EOFError):
            path.unlink(missing_ok=True)  # not ours, or damaged; made anew below
    maps = _make(grid)
    # A home that cannot be written costs the next start some seconds, nothing else.
    with contextlib.suppress(OSError), atomic_write(path) as stream:
        np.savez(stream, **maps)
    return Template(grid, **maps)


def _make(grid: Grid) -> dict[str, Any]:
    (gm, affine), (wm, _), (t1, _) = (_read_map(name) for name in ("gm", "wm", "t1"))
    brain = ndimage.binary_fill_holes(gm + wm > 0.3)
    csf = np.clip(brain - gm - wm, 0.0, 1.0).astype(np.float32)
    means = [float((t1 * tissue).sum() / tissue.sum()) for tissue in (gm, wm, csf)]
    mixture = gm * means[0] + wm * means[1] + csf * means[2]
    residual = np.where(brain, (t1 - mixture) / (means[1] - means[0]), 0.0).astype(np.float32)
    ventricles = _ventricles(csf, affine)
    outside, inside = (ndimage.distance_transform_edt(where) for where in (~ventricles, ventricles))
    distance = (outside - inside).astype(np.float32)
    tissues = {"gm": gm, "wm": wm, "csf": csf, "residual": residual}
    on_grid = {name: _to_grid(values, affine, grid) for name, values in tissues.items()}
    # Wide enough that tissue moved by a deformation is not cut off at the edge.
    mask = ndimage.binary_dilation(on_grid["gm"] > 0.02, iterations=int(np.ceil(3.0 / grid.spacing[0])))
    where = _world_coordinates(grid)[:, mask]
    return {
        **on_grid,
        "ventricle_distance": _to_grid(distance, affine, grid, smooth=False),
        "mask": mask,
        "regions": np.stack([_region(name, where) for name in REGIONS]).astype(np.float32),
    }


def _read_map(name: str) -> tuple[Array, Any]:
    """A map as (D, H, W) float32 in 0..1, RAS, and its affine."""
    import nilearn

    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    image = nibabel.as_closest_canonical(nibabel.load(Path(nilearn.__file__).parent / "datasets" / "data" / file))
    return np.asarray(image.dataobj, dtype=np.float32) / np.float32(255.0), image.affine


def _to_grid(values: Array, affine: Any, grid: Grid, smooth: bool = True) -> Array:
    """Average over a voxel's size, then sample at its centre."""
    if smooth:
        values = ndimage.gaussian_filter(values, np.array(grid.spacing) / 2.355, mode="constant", truncate=2.5)
    to_fine = np.linalg.inv(affine) @ np.array(grid.affine)
    sampled: Array = ndimage.affine_transform(
        values,
        to_fine[:3, :3],
        to_fine[:3, 3],
        output_shape=grid.shape,
        order=1,
        mode="constant" if smooth else "nearest",
    )
    return sampled


def _ventricles(csf: Array, affine: Any) -> Any:
    """The lateral ventricles: the two largest pieces of fluid in the box around them."""
    inside = csf > 0.5
    corners = [np.linalg.inv(affine) @ np.array([*mm, 1.0]) for mm in ((-40, -55, -15), (40, 40, 35))]
    low, high = (np.round(corner[:3]).astype(int) for corner in corners)
    box = np.zeros_like(inside)
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    box[part] = ndimage.binary_opening(inside[part])
    labels, _ = ndimage.label(box)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.isin(labels, np.argsort(sizes)[-2:]) & box


def _world_coordinates(grid: Grid) -> Array:
    """(3, D, H, W) mm of every voxel's centre."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")).reshape(3, -1)
    affine = np.array(grid.affine)
    where: Array = (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *grid.shape).astype(np.float32)
    return where


def _region(name: str, where: Array) -> Any:
    base, _, side = name.rpartition("_")
    centre, widths = PAIRED[base] if base in PAIRED else MIDLINE[name]
    x = -centre[0] if side == "left" and base in PAIRED else centre[0]
    middle = np.array([x, *centre[1:]], dtype=np.float32)[:, None]
    return np.exp(-0.5 * (((where - middle) / np.array(widths, dtype=np.float32)[:, None]) ** 2).sum(0))


class SmoothField:
    """Cubic B-spline fields with control points every ``spacing`` mm of MNI space, evaluated on a grid.

    A field is twice differentiable, and the same in millimetres on every grid.
    """

    LOW, HIGH = (-100.0, -136.0, -82.0), (102.0, 102.0, 119.0)

    def __init__(self, grid: Grid, spacing: float) -> None:
        self.spacing = spacing
        origin, steps = np.array(grid.affine)[:3, 3], np.diag(np.array(grid.affine))[:3]
        self._basis = [
            _spline_basis((origin[a] + steps[a] * np.arange(grid.shape[a]) - self.LOW[a]) / spacing, self.shape[a])
            for a in range(3)
        ]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of control points along each axis; the same for every grid."""
        d, h, w = (int(np.ceil((b - a) / self.spacing)) + 3 for a, b in zip(self.LOW, self.HIGH, strict=True))
        return d, h, w

    def draw(self, generator: np.random.Generator) -> Array:
        """Control points: independent normals, scaled so that the field has variance 1 on average.

        A cubic B-spline averages its neighbours: along one axis its squared weights sum to 151/315 on average.
        """
        return generator.standard_normal(self.shape, dtype=np.float32) / np.float32((151.0 / 315.0) ** 1.5)

    def evaluate(self, control: Array, box: tuple[slice, slice, slice] | None = None) -> Array:
        """(D, H, W) values of the field with these control points, or those of a box of voxels."""
        parts = self._basis if box is None else [basis[cut] for basis, cut in zip(self._basis, box, strict=True)]
        first, second, third = parts
        rows: Array = np.matmul(second, np.tensordot(first, control, axes=(1, 0)))
        return (rows.reshape(-1, rows.shape[2]) @ third.T).reshape(len(first), len(second), len(third))


def _spline_basis(places: Any, count: int) -> Array:
    """(n, count) weights of cubic B-splines whose control point k lies at place k - 1."""
    distance = np.abs(places[:, None] - (np.arange(count)[None, :] - 1.0))
    near = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    far = np.clip(2.0 - distance, 0.0, None) ** 3 / 6.0
    weights: Array = np.where(distance < 1.0, near, far).astype(np.float32)
    return weights
