"""The settings of the preparation of raw scans: the pipeline, all parameters of its steps, and the limits of good figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_pipeline.volume.grid import Grid
from infra.settings import change_settings, load_settings, to_dict

VERSION = 3  # of the pipelines; raise it with every change that alters prepared voxels or figures
SPACINGS = {"quasiraw": 1.0, "vbm": 1.5, "deepmriprep": 1.5}  # mm, the default of each pipeline
SPACE = "MNI152NLin2009"  # the name of the template's space in file names: ICBM 2009a, symmetric, as nilearn has it
# Columns of participants.tsv: our name -> the figure, its unit, and what it is.
COLUMNS = {
    "tiv": ("tiv", "ml", "total intracranial volume"),
    "grey_ml": ("grey_ml", "ml", "volume of grey matter"),
    "white_ml": ("white_ml", "ml", "volume of white matter"),
    "csf_ml": ("csf_ml", "ml", "volume of cerebrospinal fluid inside the brain's mask"),
    "brain_ml": ("brain_ml", "ml", "volume of the brain's mask"),
    "prepare_correlation": ("correlation", "", "correlation of the linearly registered brain with the template"),
    "prepare_overlap": ("overlap", "", "Dice coefficient of the brain's mask and the template's"),
    "prepare_contrast": ("contrast", "", "white minus grey matter, as a share of the brain's range of intensities"),
    "prepare_rotation": ("rotation", "degrees", "angle between the axes of the header and of the template"),
}
_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class Bias:
    """The bias field (N4, Tustison et al. 2010): estimated from coarse voxels, which a smooth field allows.

    N4 runs twice: roughly on the whole head (voxels of ``head_spacing`` mm), so that the brain is found, and then on the brain
    alone (``spacing`` mm). For ``vbm`` it runs once more on the registered brain: what is left depends on how the head lay, and
    moves the borders of the tissues. Coarser voxels of the brain, or more resolutions, take the dark rim of the brain for a
    part of the field, and brighten the cortex: at 6 mm and four resolutions the cortex of a child came out as white matter.
    """

    head_spacing: float = Field(default=6.0, ge=1.0, le=8.0)
    head_iterations: int = Field(default=20, ge=1, le=500)  # at most, at each resolution
    spacing: float = Field(default=3.0, ge=1.0, le=8.0)
    iterations: int = Field(default=50, ge=1, le=500)  # at most, at each resolution of the brain
    tolerance: float = Field(default=1e-3, gt=0.0, le=0.1)  # of a resolution's last change, where it ends
    spline: float = Field(default=150.0, ge=30.0, le=1000.0)  # mm between the control points of the first resolution
    resolutions: int = Field(default=3, ge=1, le=6)  # each halves the distance of the control points


@dataclass(frozen=True, config=_strict)
class Brain:
    """Brain extraction: ``deepbet`` (a network, Fisch et al. 2024), or ``given``: all voxels above 0, for extracted brains.

    The network was trained on upright heads. A head that is turned by more than ``upright`` degrees is turned
    upright by its first pose, and its brain is found again.
    """

    method: Literal["deepbet", "given"] = "deepbet"
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)  # of the network's probability
    upright: float = Field(default=12.0, ge=0.0, le=180.0)


@dataclass(frozen=True, config=_strict)
class Linear:
    """Linear registration to the template (mutual information), on voxels of ``spacing`` mm.

    ``angles`` are the rotations in degrees about each axis at which the search for the first pose starts.
    """

    kind: Literal["affine", "rigid"] = "affine"
    spacing: float = Field(default=2.0, ge=1.0, le=6.0)
    sampling: float = Field(default=0.25, gt=0.0, le=1.0)  # share of the voxels that the metric uses
    iterations: tuple[int, ...] = (200, 100, 50)  # at shrink factors 4, 2, 1
    angles: tuple[float, ...] = (-30.0, 0.0, 30.0)


@dataclass(frozen=True, config=_strict)
class Tissues:
    """Segmentation by Atropos (Avants et al. 2011) with the template's tissue maps as priors, on voxels of ``spacing`` mm.

    ``partial_volume``: voxels at borders are then divided between two tissues by their intensity; else each has the
    probabilities of the segmentation.
    """

    spacing: float = Field(default=1.0, ge=0.7, le=3.0)
    iterations: int = Field(default=12, ge=1, le=100)  # brains that are far from the template need more than five
    prior_weight: float = Field(default=0.1, ge=0.0, le=1.0)
    smoothness: float = Field(default=0.1, ge=0.0, le=2.0)  # of the Markov random field
    partial_volume: bool = True
    smoothing: float = Field(default=2.0, ge=0.0, le=20.0)  # mm, width at half maximum, of the map before it is warped


@dataclass(frozen=True, config=_strict)
class Nonlinear:
    """Nonlinear registration (SyN, Avants et al. 2008) to the template, on voxels of ``spacing`` mm."""

    spacing: float = Field(default=1.5, ge=1.0, le=6.0)
    iterations: tuple[int, ...] = (40, 20, 10)  # at shrink factors 4, 2, 1
    step: float = Field(default=0.2, gt=0.0, le=1.0)
    smoothing: float = Field(default=3.0, ge=0.0, le=10.0)  # voxels, of each update of the displacement


@dataclass(frozen=True, config=_strict)
class Intensity:
    """The scale of a quasi-raw image: these percentiles of the brain's voxels become 0 and 1; what is beyond is cut off."""

    low: float = Field(default=0.5, ge=0.0, lt=50.0)
    high: float = Field(default=99.5, gt=50.0, le=100.0)


@dataclass(frozen=True, config=_strict)
class Limits:
    """A scan whose figures are outside goes to quarantine.tsv.

    ``brain_ml`` is the volume of the brain's mask; ``correlation`` that of the linearly registered brain with the template
    over the whole box, zeros outside the brain included; ``overlap`` the Dice coefficient of the brain's mask and the
    template's; ``contrast`` how much brighter white than grey matter is, as a share of the brain's intensities (negative in
    T2-weighted images); ``rotation`` the angle in degrees between the header's axes and the template's; ``stretch`` the change
    of length along any axis; ``voxel_mm`` the longest edge of a voxel.
    """

    brain_ml: tuple[float, float] = (800.0, 2200.0)
    correlation: float = Field(default=0.85, ge=-1.0, le=1.0)
    overlap: float = Field(default=0.8, ge=0.0, le=1.0)
    contrast: float = Field(default=0.05, ge=-1.0, le=1.0)
    rotation: float = Field(default=50.0, gt=0.0, le=180.0)
    stretch: tuple[float, float] = (0.7, 1.5)
    voxel_mm: float = Field(default=4.0, ge=1.0, le=12.0)


@dataclass(frozen=True, config=_strict)
class PrepareRecipe:
    """Everything that decides what a raw scan becomes. ``spacing`` is that of the prepared voxels; None: the pipeline's own."""

    pipeline: Literal["quasiraw", "vbm", "deepmriprep"] = "quasiraw"
    spacing: float | None = Field(default=None, ge=0.7, le=12.0)
    seed: int = Field(default=1, ge=1, le=2**31 - 1)  # of the points at which the registrations sample their metric
    keep_warp: bool = True  # write the displacements of the nonlinear registration
    bias: Bias = field(default_factory=Bias)
    brain: Brain = field(default_factory=Brain)
    linear: Linear = field(default_factory=Linear)
    tissues: Tissues = field(default_factory=Tissues)
    nonlinear: Nonlinear = field(default_factory=Nonlinear)
    intensity: Intensity = field(default_factory=Intensity)
    limits: Limits = field(default_factory=Limits)

    @property
    def grid(self) -> Grid:
        """The grid of the prepared volumes: the VBM box with voxels of ``spacing``."""
        return Grid.vbm(self.spacing or SPACINGS[self.pipeline])

    @property
    def modality(self) -> str:
        """The modality by which ``cohort inspect`` and ``shards build`` find the prepared volumes."""
        return "quasiraw" if self.pipeline == "quasiraw" else "vbm"


@dataclass(frozen=True, config=_strict)
class _File:
    prepare: PrepareRecipe = field(default_factory=PrepareRecipe)


def load_prepare_recipe(file: Path | None, overrides: Sequence[str] = ()) -> PrepareRecipe:
    """Load the section ``prepare:`` of a YAML file and apply changes of the command line, each ``--prepare.key=value``.

    Raises UserError: a key is unknown or a value is not allowed.
    """
    return load_settings(_File, file, overrides).prepare


def load_recorded(values: Mapping[str, Any], source: str) -> PrepareRecipe:
    """Return the recipe with some recorded values. Raises UserError, naming ``source``, if one is unknown or not allowed."""
    return change_settings(_File(), {"prepare": values}, source).prepare


def recorded(recipe: PrepareRecipe) -> dict[str, Any]:
    """Return the recipe as the files of a preparation record it: its fields, and the version of the pipelines."""
    return {"version": VERSION, **to_dict(recipe), "spacing": recipe.spacing or SPACINGS[recipe.pipeline]}
