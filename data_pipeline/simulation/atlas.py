"""The anatomy of simulated brains: MNI152 tissue maps on a grid, region maps, and smooth random fields.

The tissue maps come with nilearn (ICBM 2009a, 1 mm). All sizes are in mm of MNI space, so a coarser grid shows the same
brain.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.volume.grid import Grid
from infra.errors import UserError
from infra.files import atomic_write, regular_file, writable_folder

VERSION = 5  # part of the name of a cached template; increase it if the content changes

# Gaussian regions: centre and standard deviations in mm (x, y, z). Paired regions are those of the right side; the left
# side is their mirror image.
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
    """Maps on one grid, either (D, H, W) or at the M voxels of the mask."""

    grid: Grid
    mask: NDArray[np.bool_]  # (D, H, W) voxels that may hold grey matter
    gm: NDArray[np.float32]  # (D, H, W) share of grey matter, 0..1
    wm: NDArray[np.float32]  # (D, H, W) share of white matter, 0..1
    csf: NDArray[np.float32]  # (D, H, W) share of cerebrospinal fluid, 0..1
    residual: NDArray[np.float32]  # (D, H, W) T1 minus the mixture of tissue means; 1 is the white-grey difference
    ventricle_distance: NDArray[np.float32]  # (D, H, W) mm to the lateral ventricles' wall, negative inside
    regions: NDArray[np.float32]  # (R, M) region maps, 0..1

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return float(np.prod(self.grid.spacing)) / 1000.0


def load_template(grid: Grid) -> Template:
    """Load the template on a grid from the user's cache, or make it in a few seconds and cache it."""
    key = hashlib.sha256(repr((VERSION, grid)).encode()).hexdigest()[:16]
    path = None
    with contextlib.suppress(UserError):  # without a cache the next start only takes a few seconds longer
        path = writable_folder("templates") / f"template-{key}.npz"
    if path is not None and path.is_file():
        try:
            with np.load(regular_file(path)) as stored:
                return Template(grid, **{name: stored[name] for name in stored.files})
        except (OSError, ValueError, TypeError, EOFError):
            path.unlink(missing_ok=True)  # another format, or damaged; made again below
    maps = _make(grid)
    if path is not None:
        with contextlib.suppress(OSError), atomic_write(path) as stream:
            np.savez(stream, **maps)
    return Template(grid, **maps)


def _make(grid: Grid) -> dict[str, Any]:
    """Return the arguments of ``Template`` for a grid, by name."""
    (gm, affine), (wm, _), (t1, _) = (_read_map(name) for name in ("gm", "wm", "t1"))
    brain = ndimage.binary_fill_holes(gm + wm > 0.3)
    csf = np.clip(brain - gm - wm, 0.0, 1.0).astype(np.float32)
    means = [float((t1 * tissue).sum() / tissue.sum()) for tissue in (gm, wm, csf)]
    mixture = gm * means[0] + wm * means[1] + csf * means[2]
    residual = np.where(brain, (t1 - mixture) / (means[1] - means[0]), 0.0).astype(np.float32)
    ventricles = _ventricles(csf, affine)
    outside, inside = (ndimage.distance_transform_edt(voxels) for voxels in (~ventricles, ventricles))
    distance = (outside - inside).astype(np.float32)
    tissues = {"gm": gm, "wm": wm, "csf": csf, "residual": residual}
    on_grid = {name: _to_grid(values, affine, grid) for name, values in tissues.items()}
    # Dilated by 3 mm so that tissue moved by a deformation stays inside.
    mask = ndimage.binary_dilation(on_grid["gm"] > 0.02, iterations=int(np.ceil(3.0 / grid.spacing[0])))
    positions = _world_coordinates(grid)[:, mask]
    return {
        **on_grid,
        "ventricle_distance": _to_grid(distance, affine, grid, smooth=False),
        "mask": mask,
        "regions": np.stack([_region(name, positions) for name in REGIONS]).astype(np.float32),
    }


def _read_map(name: str) -> tuple[NDArray[np.float32], Any]:
    """Read a tissue map: (D, H, W) float32 in 0..1, RAS; and its affine."""
    import nilearn

    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    image = nibabel.as_closest_canonical(nibabel.load(Path(nilearn.__file__).parent / "datasets" / "data" / file))
    return np.asarray(image.dataobj, dtype=np.float32) / np.float32(255.0), image.affine


def _to_grid(values: NDArray[np.float32], affine: Any, grid: Grid, smooth: bool = True) -> NDArray[np.float32]:
    """Smooth a map by the size of the grid's voxels, then sample it at their centres."""
    if smooth:
        values = ndimage.gaussian_filter(values, np.array(grid.spacing) / 2.355, mode="constant", truncate=2.5)
    to_fine = np.linalg.inv(affine) @ np.array(grid.affine)
    sampled: NDArray[np.float32] = ndimage.affine_transform(
        values,
        to_fine[:3, :3],
        to_fine[:3, 3],
        output_shape=grid.shape,
        order=1,
        mode="constant" if smooth else "nearest",
    )
    return sampled


def _ventricles(csf: NDArray[np.float32], affine: Any) -> Any:
    """(D, H, W) bool, the lateral ventricles: the two largest connected components of fluid in a box around them."""
    inside = csf > 0.5
    corners = [np.linalg.inv(affine) @ np.array([*mm, 1.0]) for mm in ((-40, -55, -15), (40, 40, 35))]
    low, high = (np.round(corner[:3]).astype(int) for corner in corners)
    box = np.zeros_like(inside)
    cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    box[cut] = ndimage.binary_opening(inside[cut])
    labels, _ = ndimage.label(box)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.isin(labels, np.argsort(sizes)[-2:]) & box


def _world_coordinates(grid: Grid) -> NDArray[np.float32]:
    """(3, D, H, W) position of every voxel's centre in mm."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")).reshape(3, -1)
    affine = np.array(grid.affine)
    positions: NDArray[np.float32] = (
        (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *grid.shape).astype(np.float32)
    )
    return positions


def _region(name: str, positions: NDArray[np.float32]) -> NDArray[np.float32]:
    """(M,) values of a Gaussian region at (3, M) positions in mm."""
    base, _, side = name.rpartition("_")
    centre, widths = PAIRED[base] if base in PAIRED else MIDLINE[name]
    x = -centre[0] if side == "left" and base in PAIRED else centre[0]
    middle = np.array([x, *centre[1:]], dtype=np.float32)[:, None]
    values: NDArray[np.float32] = np.exp(
        -0.5 * (((positions - middle) / np.array(widths, dtype=np.float32)[:, None]) ** 2).sum(0)
    )
    return values


class SmoothField:
    """Random fields made of cubic B-splines with control points every ``spacing`` mm of MNI space, evaluated on a grid.

    A field is twice differentiable. The same control points give the same field on every grid.

    Args:
        grid: the grid on which fields are evaluated.
        spacing: distance of the control points in mm.
    """

    LOW, HIGH = (-100.0, -136.0, -82.0), (102.0, 102.0, 119.0)  # corners in mm of the box that the control points cover

    def __init__(self, grid: Grid, spacing: float) -> None:
        self.spacing = spacing
        origin, steps = np.array(grid.affine)[:3, 3], np.diag(np.array(grid.affine))[:3]
        self._basis = [
            _spline_basis((origin[a] + steps[a] * np.arange(grid.shape[a]) - self.LOW[a]) / spacing, self.shape[a])
            for a in range(3)
        ]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of control points along each axis; it does not depend on the grid."""
        d, h, w = (int(np.ceil((b - a) / self.spacing)) + 3 for a, b in zip(self.LOW, self.HIGH, strict=True))
        return d, h, w

    def draw(self, generator: np.random.Generator) -> NDArray[np.float32]:
        """Draw control points, ``shape`` float32: independent normals, scaled so that the field has variance 1 on average.

        Along one axis the squared weights of a cubic B-spline sum to 151/315 on average.
        """
        return generator.standard_normal(self.shape, dtype=np.float32) / np.float32((151.0 / 315.0) ** 1.5)

    def evaluate(
        self, control: NDArray[np.float32], box: tuple[slice, slice, slice] | None = None
    ) -> NDArray[np.float32]:
        """(D, H, W) float32 values of the field with these control points, on the whole grid or in a box of voxels."""
        bases = self._basis if box is None else [basis[cut] for basis, cut in zip(self._basis, box, strict=True)]
        first, second, third = bases
        rows: NDArray[np.float32] = np.matmul(second, np.tensordot(first, control, axes=(1, 0)))
        return (rows.reshape(-1, rows.shape[2]) @ third.T).reshape(len(first), len(second), len(third))


def _spline_basis(positions: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """(n, count) weights of cubic B-splines at n positions in units of their spacing; control point k is at k - 1."""
    distance = np.abs(positions[:, None] - (np.arange(count)[None, :] - 1.0))
    near = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    far = np.clip(2.0 - distance, 0.0, None) ** 3 / 6.0
    weights: NDArray[np.float32] = np.where(distance < 1.0, near, far).astype(np.float32)
    return weights
