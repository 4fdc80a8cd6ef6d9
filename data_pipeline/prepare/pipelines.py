"""The pipelines: from an aligned brain to the volumes of a derivative. A pipeline of its own is a function and a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.prepare.align import Aligned, without_bias
from data_pipeline.prepare.prepared import (
    BRAIN,
    GREY_MATTER,
    LINEAR,
    OWN_BRAIN,
    PREPROCESSED,
    SCANNER,
    WARP,
    Picture,
    Prepared,
    Volume,
)
from data_pipeline.prepare.resampling import FWHM, displaced, jacobian, resample
from data_pipeline.prepare.settings import PrepareRecipe
from data_pipeline.prepare.steps import antspy
from data_pipeline.prepare.steps import deepmriprep as networks
from data_pipeline.prepare.steps.partial_volume import tissue_shares
from data_pipeline.prepare.template import load_template
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid

PICTURED = Grid.vbm(1.5)
KEPT_WARP = Grid.vbm(3.0)  # displacements are smooth; at the full grid they would be ten times a scan's other files
SPLINE: Literal[3] = 3  # order of the interpolation of intensities: linear would blur thick slices


def quasiraw(aligned: Aligned, recipe: PrepareRecipe) -> Prepared:
    """Sample the brain once, from its own voxels to the grid, and scale its intensities by percentiles."""
    grid = recipe.grid
    voxels, mask = aligned.on(grid, order=SPLINE)
    if not mask.any():
        raise BadScan("no voxel of its brain is inside the template's box", "brain")
    low, high = np.percentile(voxels[mask], (recipe.intensity.low, recipe.intensity.high))
    scaled = np.where(mask, np.clip((voxels - low) / max(float(high - low), 1e-6), 0.0, 1.0), 0.0).astype(np.float32)
    figures = {}
    if recipe.linear.kind == "affine":
        template = load_template(Grid.vbm(1.0))
        figures["tiv"] = float(np.count_nonzero(template.brain)) / 1000.0 * _volume_factor(aligned)
    return Prepared(
        PREPROCESSED, {PREPROCESSED: Volume(scaled, np.array(grid.affine)), **_masks(aligned, grid, mask)},
        _picture(aligned), _linear(aligned), figures,
    )  # fmt: skip


def vbm(aligned: Aligned, recipe: PrepareRecipe) -> Prepared:
    """Segment the brain, register it nonlinearly, and modulate its grey matter: ml of tissue stay ml of tissue."""
    fine = Grid.vbm(recipe.tissues.spacing)
    template = load_template(fine)
    voxels, mask = aligned.on(fine, order=SPLINE)
    if not mask.any():
        raise BadScan("no voxel of its brain is inside the template's box", "brain")
    voxels = without_bias(voxels, template.affine, mask, recipe.bias, alone=True)
    # Voxels without any prior would be no tissue at all.
    priors = [tissue + np.float32(0.01) for tissue in (template.fluid, template.grey, template.white)]
    total = priors[0] + priors[1] + priors[2]
    tissues = antspy.segment(
        voxels, template.affine, mask, [prior / total for prior in priors], iterations=recipe.tissues.iterations,
        prior_weight=recipe.tissues.prior_weight, smoothness=recipe.tissues.smoothness,
    )  # fmt: skip
    if recipe.tissues.partial_volume:
        tissues = tissue_shares(voxels, mask, tissues)
    fluid, grey, white = tissues
    millilitre = float(np.prod(fine.spacing)) / 1000.0 * _volume_factor(aligned)
    figures = {
        "grey_ml": float(grey.sum(dtype=np.float64)) * millilitre,
        "white_ml": float(white.sum(dtype=np.float64)) * millilitre,
        "csf_ml": float(fluid.sum(dtype=np.float64)) * millilitre,
    }
    figures["tiv"] = sum(figures.values())
    coarse, displacement = _warp(aligned, recipe)
    change = jacobian(displacement, coarse.spacing[0])
    grid = recipe.grid
    if grid != coarse:
        displacement, change = _onto(displacement, coarse, grid), _onto(change[..., None], coarse, grid)[..., 0]
    if recipe.tissues.smoothing:
        grey = ndimage.gaussian_filter(grey, recipe.tissues.smoothing / FWHM / np.array(fine.spacing))
    tissue = displaced(grey, template.affine, grid, displacement)
    modulated = tissue * np.maximum(change, 0.0) * np.float32(_volume_factor(aligned))
    volumes = {GREY_MATTER: Volume(modulated.astype(np.float32), np.array(grid.affine))}
    volumes |= _masks(aligned, grid, aligned.on(grid)[1])
    if recipe.keep_warp:
        kept = _onto(displacement, grid, KEPT_WARP) * antspy.TO_LPS  # as ITK reads them
        volumes[WARP] = Volume(kept, np.array(KEPT_WARP.affine), kind="field")
    return Prepared(GREY_MATTER, volumes, _picture(aligned), _linear(aligned), figures)


def deepmriprep(aligned: Aligned, recipe: PrepareRecipe) -> Prepared:
    """Grey matter by deepmriprep's networks; the aligned brain gives the figures and the picture."""
    found = networks.grey_matter(aligned.raw.voxels, aligned.affine, gpu=aligned.gpu)
    grid = recipe.grid
    modulated = resample(found.voxels, found.affine, grid, np.eye(4))
    volumes = {GREY_MATTER: Volume(modulated, np.array(grid.affine)), **_masks(aligned, grid, aligned.on(grid)[1])}
    return Prepared(GREY_MATTER, volumes, _picture(aligned), _linear(aligned), found.figures)


def _warp(aligned: Aligned, recipe: PrepareRecipe) -> tuple[Grid, NDArray[np.float32]]:
    """The grid of the nonlinear registration, and the displacements (D, H, W, 3) in mm from the template to the brain."""
    settings, grid = recipe.nonlinear, Grid.vbm(recipe.nonlinear.spacing)
    voxels, mask = aligned.on(grid)
    template = load_template(grid)
    brain = np.where(mask, voxels / max(float(np.percentile(voxels[mask], 99)), 1e-6), 0.0).astype(np.float32)
    return grid, antspy.register_nonlinear(
        template.t1, brain, template.affine, iterations=settings.iterations, step=settings.step,
        smoothing=settings.smoothing, seed=recipe.seed,
    )  # fmt: skip


def _onto(field: NDArray[np.float32], own: Grid, grid: Grid) -> NDArray[np.float32]:
    """A field (D, H, W, C) on another grid."""
    still = np.zeros((*grid.shape, 3), np.float32)
    parts = [
        displaced(field[..., part], np.array(own.affine), grid, still, smooth=False) for part in range(field.shape[-1])
    ]
    return np.stack(parts, axis=-1)


def _volume_factor(aligned: Aligned) -> float:
    """How many mm³ of the scan one mm³ of the template is."""
    return abs(float(np.linalg.det(aligned.to_scan[:3, :3])))


def _masks(aligned: Aligned, grid: Grid, mask: NDArray[np.bool_]) -> dict[str, Volume]:
    return {
        BRAIN: Volume(mask, np.array(grid.affine), kind="mask"),
        OWN_BRAIN: Volume(aligned.mask, aligned.affine, SCANNER, "mask"),
    }


def _linear(aligned: Aligned) -> dict[str, str]:
    return {f"{LINEAR}.txt": antspy.itk_transform(aligned.to_scan)}


def _picture(aligned: Aligned) -> Picture:
    voxels, mask = aligned.on(PICTURED)
    return Picture(voxels, mask, PICTURED)


PIPELINES: dict[str, Callable[[Aligned, PrepareRecipe], Prepared]] = {
    "quasiraw": quasiraw, "vbm": vbm, "deepmriprep": deepmriprep,
}  # fmt: skip
