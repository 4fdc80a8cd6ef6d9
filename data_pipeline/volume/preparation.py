"""The settings that turn a scan's file into the voxels of a shard: grid, crop, intensity, scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import INTENSITIES
from infra.errors import UserError, nearest

CROPS = ("world", "brain")
SCALINGS = ("none", "tiv")
REFERENCE_TIV_ML = 1500.0  # the head size to which ``tiv`` scales every scan
# The preparation of data sets and encoders that were made before these were settings.
DEFAULT_PREPARATION = {"crop": "world", "intensity": "none"}


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
