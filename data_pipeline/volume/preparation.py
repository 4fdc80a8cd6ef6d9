"""The settings that turn a scan's file into the voxels of a shard: grid, crop, intensity, scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import INTENSITIES
from data_pipeline.volume.load import DEFAULT_CHECKS
from infra.errors import UserError, nearest

CROPS = ("world", "brain")
SCALINGS = ("none", "tiv")
REFERENCE_TIV_ML = 1500.0  # the head size to which ``tiv`` scales every scan
# The preparation of data sets and encoders that were made before these were settings.
DEFAULT_PREPARATION = {"crop": "world", "intensity": "none"}
# Rules for the voxels of a file, as ``read_voxels`` applies them, and what data sets without the rule did.
FILE_RULES = {"nonfinite": "refuse", "constant": "refuse", "grid": "resample"}


@dataclass(frozen=True)
class Preparation:
    """How a scan's file becomes the voxels of a shard; see ``load_volume`` and ``scale_factor``."""

    grid: Grid
    scaling: str = "none"
    crop: str = "world"
    intensity: str = "none"

    @classmethod
    def of(cls, grid: dict[str, Any], settings: Mapping[str, Any]) -> Preparation:
        """The preparation that a manifest records."""
        settings = {**DEFAULT_PREPARATION, **settings}
        return cls(Grid.from_dict(grid), str(settings["scaling"]), str(settings["crop"]), str(settings["intensity"]))


@dataclass(frozen=True)
class FilePreparation:
    """How any file becomes voxels as the scans of a data set did: ``Preparation``, and what depends on the file.

    Attributes:
        preparation: grid, scaling, crop and intensity.
        checks: the rules that refuse a file, see ``read_voxels``; without ``nonfinite``, NaN voxels become 0.
        orientations: of .npy arrays in each data set; empty for that of the array's shape.
        arrays_on_grid: .npy arrays of the grid's shape lie on the grid, as in an index of arrays.
    """

    preparation: Preparation
    checks: frozenset[str] = DEFAULT_CHECKS
    orientations: Mapping[str, str] = field(default_factory=dict)
    arrays_on_grid: bool = False

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> FilePreparation:
        """The preparation that preprocessing.json of an encoder records."""
        settings = {name: value for name, value in preprocessing.items() if value is not None}
        rules, arrays = {**FILE_RULES, **settings.get("rules", {})}, settings.get("arrays", {})
        if "nonfinite" in settings:  # where encoders of earlier versions have this rule
            rules["nonfinite"] = settings["nonfinite"]
        return cls(
            Preparation.of(settings["grid"], {"scaling": "none", **settings}),
            frozenset(name for name, value in rules.items() if value == "refuse"),
            dict(arrays.get("orientations", {})),
            bool(arrays.get("on_grid", False)),
        )

    def orientation(self) -> str:
        """The orientation of .npy arrays. Raises UserError if the data sets differ in it."""
        if len(set(self.orientations.values())) < 2:
            return next(iter(self.orientations.values()), "")
        listed = ", ".join(f"{name}: {text or 'by shape'}" for name, text in sorted(self.orientations.items()))
        raise UserError(
            f"the encoder's training scans have .npy arrays of different orientations ({listed}); give that of these "
            "files, for example --orientation LAS (orientation='LAS')"
        )


def file_rules(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest's settings say about single files, as preprocessing.json records it; see ``FilePreparation``."""
    quality = settings.get("quality", {})
    orientations = dict(settings.get("array_orientations", {}))
    for later in settings.get("appended", []):
        orientations |= later.get("array_orientations", {})
    # Indexes of earlier versions tell arrays from NIfTI members, which have headers, by their codec alone.
    by_codec = str(settings.get("codec", "")).startswith(("npy", "zst"))
    indexed_arrays = bool(settings.get("indexed")) and bool(settings.get("arrays", by_codec))
    if indexed_arrays:
        orientations[str(settings.get("dataset", ""))] = str(settings.get("orientation", "RAS"))
    return {
        "rules": {name: str(quality.get(name, default)) for name, default in FILE_RULES.items()},
        "arrays": {"orientations": orientations, "on_grid": indexed_arrays},
    }


def check_preparation(modality: str, crop: str, intensity: str | None) -> str:
    """Check crop and intensity; return the intensity scaling to use.

    Without an ``intensity``, that is ``none`` for VBM maps, whose voxels are volumes, and ``robust`` for T1 images.
    Raises UserError if the crop or the intensity is unknown.
    """
    intensity = intensity or ("none" if modality == "vbm" else "robust")
    for name, value, allowed in (("crop", crop, CROPS), ("intensity", intensity, tuple(INTENSITIES))):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not known{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    return intensity


def check_scaling(scaling: str) -> None:
    """Raise UserError if ``scaling`` is unknown."""
    if scaling not in SCALINGS:
        raise UserError(f"scaling={scaling!r} is not known{nearest(scaling, SCALINGS)}; allowed: {', '.join(SCALINGS)}")


def scale_factor(scaling: str, values: Mapping[str, Any]) -> float:
    """Return the factor by which a scan's voxels are multiplied.

    Args:
        scaling: ``none`` (1), or ``tiv``: 1500 ml / total intracranial volume, which removes the effect of head size.
        values: the participant's values; ``tiv`` is in ml.

    Raises:
        BadScan: the scaling needs a total intracranial volume, which is missing or not in 300..3000 ml.
    """
    if scaling == "none":
        return 1.0
    tiv = values.get("tiv")
    if not isinstance(tiv, int | float) or not 300 < tiv < 3000:
        raise BadScan(f"tiv={tiv!r} is not a volume of 300..3000 ml; scaling: tiv needs it", "tiv")
    return REFERENCE_TIV_ML / float(tiv)
