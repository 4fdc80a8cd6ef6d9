"""From a raw head to a brain without bias field and its place in the template, with the figures by which it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.prepare.pose import angle_of, find_pose, stretches_of
from data_pipeline.prepare.raw import RawScan
from data_pipeline.prepare.resampling import isotropic, resample, spread
from data_pipeline.prepare.settings import Bias, PrepareRecipe
from data_pipeline.prepare.steps import antspy
from data_pipeline.prepare.steps.extraction import brain_mask
from data_pipeline.prepare.template import Template, load_template
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid

# Voxels of 1 mm that hold a head and some of its neck in the template's pose.
UPRIGHT = Grid.of((200, 250, 240), np.array([[1.0, 0, 0, -100], [0, 1, 0, -145], [0, 0, 1, -125], [0, 0, 0, 1]]))
JUDGED = 4.0  # mm: the voxels on which a scan is compared with the template
ALONE = 0.8  # share of a coarse voxel that must be brain if the bias field of a brain alone is estimated from it
NEAR = 1.1  # a brain whose volume is this near to the limits is registered, so that a wrong contrast is named first
SURE = 0.8  # share of a tissue in the template's voxels by which the contrast is measured
Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Aligned:
    """A brain and where it lies.

    Attributes:
        voxels: (D, H, W) the head's intensities without bias field, in the scan's own voxels (RAS).
        affine: of these voxels.
        mask: (D, H, W) the brain.
        to_scan: (4, 4) from points (mm) of the template to points of the scan.
        raw: the scan as it was read.
        gpu: whether a pipeline may use a GPU.
        figures: what was measured, by name.
    """

    voxels: NDArray[np.float32]
    affine: Affine
    mask: NDArray[np.bool_]
    to_scan: Affine
    raw: RawScan
    gpu: bool = False
    figures: dict[str, float] = field(default_factory=dict)

    def on(self, grid: Grid, *, order: Literal[1, 3] = 1) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return intensities and mask (D, H, W) on a grid of the template, each sampled once."""
        voxels = resample(self.voxels, self.affine, grid, self.to_scan, order=order)
        mask = resample(self.mask.astype(np.float32), self.affine, grid, self.to_scan) > 0.5
        return np.maximum(voxels, 0.0), mask


def align(scan: RawScan, recipe: PrepareRecipe, *, gpu: bool = False) -> Aligned:
    """Remove the bias field, find the brain and register it to the template.

    Raises BadScan if no brain is found, or if its volume is outside the limits: a brain of another species cannot be
    registered.
    """
    positive = scan.voxels - min(0.0, float(scan.voxels.min()))
    bias = recipe.bias
    head = without_bias(
        positive, scan.affine, _foreground(positive), bias, spacing=bias.head_spacing, iterations=bias.head_iterations
    )
    mask = _brain(head, scan.affine, recipe, gpu)
    _check_volume(_millilitres(mask, scan.affine), recipe)
    start = find_pose(head * mask, scan.affine, recipe.linear.angles, rigid=recipe.linear.kind == "rigid")
    if recipe.brain.method == "deepbet" and angle_of(start) > recipe.brain.upright:
        mask = _upright_brain(head, scan.affine, start, recipe, gpu)
    figures = {"brain_ml": _millilitres(mask, scan.affine)}
    _check_volume(figures["brain_ml"], recipe)
    head = without_bias(head, scan.affine, mask, bias, alone=True)
    to_scan = _register(head * mask, scan.affine, start, recipe)
    aligned = Aligned(head, scan.affine, mask, to_scan, scan, gpu=gpu, figures=figures)
    figures.update(_compare(aligned))
    return aligned


def _millilitres(mask: NDArray[np.bool_], affine: Affine) -> float:
    """The volume of a mask in ml."""
    return float(np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000.0)


def _check_volume(millilitres: float, recipe: PrepareRecipe) -> None:
    low, high = recipe.limits.brain_ml
    if not low / NEAR <= millilitres <= high * NEAR:
        raise BadScan(
            f"its brain has {millilitres:.0f} ml, outside {low:g} to {high:g}: no whole human brain was found", "brain_ml",
            millilitres, low if millilitres < low else high,
        )  # fmt: skip


def _foreground(voxels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(D, H, W) the voxels above a tenth of the 98th percentile: the head without air."""
    inside: NDArray[np.bool_] = voxels > 0.1 * np.percentile(voxels, 98)
    return inside


def without_bias(
    voxels: NDArray[np.float32], affine: Affine, mask: NDArray[np.bool_], bias: Bias, *, alone: bool = False,
    spacing: float | None = None, iterations: int | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Return a volume (D, H, W) divided by its bias field, which is estimated in the mask.

    ``alone``: nothing around the mask has a part in it; else a coarse voxel at the border holds some of it. ``spacing`` and
    ``iterations`` are those of ``bias`` if they are not given. Raises BadScan if the mask is empty.
    """
    spacing, iterations = spacing or bias.spacing, iterations or bias.iterations
    share, coarse_affine = isotropic(mask.astype(np.float32), affine, spacing)
    coarse, _ = isotropic(voxels * mask if alone else voxels, affine, spacing)
    least = ALONE if alone else 0.5
    inside = (share > least) & (coarse > 0)
    if not inside.any():
        raise BadScan("has no foreground", "brain")
    if alone:
        coarse = np.where(inside, coarse / np.maximum(share, least), 1.0).astype(np.float32)
    found = antspy.bias_field(
        coarse, coarse_affine, inside, iterations=iterations, tolerance=bias.tolerance, spline=bias.spline,
        resolutions=bias.resolutions,
    )  # fmt: skip
    factor: NDArray[np.float32] = np.maximum(spread(found, coarse_affine, voxels.shape, affine), 1e-3)
    corrected: NDArray[np.float32] = voxels / factor
    return corrected


def _brain(head: NDArray[np.float32], affine: Affine, recipe: PrepareRecipe, gpu: bool) -> NDArray[np.bool_]:
    """The brain's mask by the recipe's method, without holes."""
    if recipe.brain.method == "given":
        filled: NDArray[np.bool_] = ndimage.binary_fill_holes(head > 0.02 * np.percentile(head, 99))
        return filled
    return brain_mask(head, affine, threshold=recipe.brain.threshold, gpu=gpu)


def _upright_brain(
    head: NDArray[np.float32], affine: Affine, pose: Affine, recipe: PrepareRecipe, gpu: bool
) -> NDArray[np.bool_]:
    """The brain's mask, found in the head after it has been turned upright by a first pose."""
    turned = resample(head, affine, UPRIGHT, pose)
    found = brain_mask(turned, np.array(UPRIGHT.affine), threshold=recipe.brain.threshold, gpu=gpu)
    step = np.linalg.inv(np.array(UPRIGHT.affine)) @ np.linalg.inv(pose) @ affine
    back = ndimage.affine_transform(
        found.astype(np.float32), step[:3, :3], step[:3, 3], head.shape, order=1, output=np.float32
    )
    inside: NDArray[np.bool_] = back > 0.5
    return inside


def _register(brain: NDArray[np.float32], affine: Affine, start: Affine, recipe: PrepareRecipe) -> Affine:
    """The map from points of the template to points of the scan."""
    settings = recipe.linear
    template = load_template(Grid.vbm(settings.spacing))
    return antspy.register_linear(
        (template.t1, template.affine), isotropic(brain, affine, settings.spacing), start, kind=settings.kind,
        iterations=settings.iterations, sampling=settings.sampling, seed=recipe.seed,
    )  # fmt: skip


def _compare(aligned: Aligned) -> dict[str, float]:
    """The figures of an aligned brain, see ``settings.Limits``."""
    template = load_template(Grid.vbm(JUDGED))
    voxels, mask = aligned.on(template.grid)
    brain = template.brain
    correlation = np.corrcoef((voxels * mask).ravel(), template.t1.ravel())[0, 1]
    overlap = 2.0 * np.count_nonzero(mask & brain) / (np.count_nonzero(mask) + np.count_nonzero(brain))
    stretches = stretches_of(aligned.to_scan)
    return {
        "correlation": float(correlation), "overlap": float(overlap), "contrast": _contrast(voxels, mask, template),
        "rotation": angle_of(aligned.to_scan), "stretch_low": float(stretches[0]), "stretch_high": float(stretches[2]),
    }  # fmt: skip


def _contrast(voxels: NDArray[np.float32], mask: NDArray[np.bool_], template: Template) -> float:
    """How much brighter white than grey matter is, as a share of the brain's range of intensities; 0 if a tissue is missing."""
    white, grey = (voxels[mask & (tissue > SURE)] for tissue in (template.white, template.grey))
    if not len(white) or not len(grey):
        return 0.0
    low, high = np.percentile(voxels[mask], (1, 99))
    return float((np.median(white) - np.median(grey)) / max(high - low, 1e-6))
