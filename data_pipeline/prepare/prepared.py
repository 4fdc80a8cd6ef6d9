"""What a pipeline makes of one scan, and its files in a BIDS derivative: the same volumes give the same bytes."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray

from data_pipeline.cohort.scan import Scan, safe_name
from data_pipeline.prepare.settings import SPACE
from data_pipeline.volume.grid import Grid
from infra.files import atomic_write

SCANNER, MNI = 1, 4  # codes of NIfTI for the space of an affine
COMPRESSION = 6
MARK = b"prepared by yaware"  # in the header of every volume
# The last part of each file's name, after sub-X_ses-Y[_run-Z]_.
PREPROCESSED = f"space-{SPACE}_desc-preproc_T1w"
GREY_MATTER = f"space-{SPACE}_desc-mwp1_probseg"
BRAIN = f"space-{SPACE}_desc-brain_mask"
OWN_BRAIN = "desc-brain_mask"
LINEAR = f"from-{SPACE}_to-T1w_mode-points_xfm"
WARP = f"from-{SPACE}_to-affine_mode-points_xfm"
ENDINGS = (
    *(f"{name}.nii.gz" for name in (PREPROCESSED, GREY_MATTER, BRAIN, OWN_BRAIN, WARP)), f"{LINEAR}.txt",
    *(f"{name}.json" for name in (PREPROCESSED, GREY_MATTER)),
)  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """A volume of the derivative: its voxels, affine, space (a code of NIfTI) and kind of voxels."""

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    space: int = MNI
    kind: Literal["intensity", "mask", "field"] = "intensity"


@dataclass(frozen=True)
class Picture:
    """What the quality page draws: an image on a grid of the template (D, H, W), and the brain's mask on it."""

    voxels: NDArray[np.float32]
    mask: NDArray[np.bool_]
    grid: Grid


@dataclass(frozen=True)
class Prepared:
    """The result of a pipeline: the name of its main image, its volumes and texts by name, figures and picture."""

    main: str
    volumes: Mapping[str, Volume]
    picture: Picture
    texts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


def stem_of(scan: Scan) -> str:
    """Return the path of a scan's files in the derivative without their last part: ``sub-X/ses-Y/anat/sub-X_ses-Y``."""
    participant, session = f"sub-{safe_name(scan.participant_id)}", f"ses-{safe_name(scan.session)}"
    run = f"_run-{safe_name(scan.run)}" if scan.run else ""
    return f"{participant}/{session}/anat/{participant}_{session}{run}"


def write_prepared(root: Path, stem: str, prepared: Prepared) -> list[str]:
    """Write volumes and texts below ``root``, each under a temporary name first; return their paths relative to it."""
    written = []
    for name, volume in prepared.volumes.items():
        written.append(f"{stem}_{name}.nii.gz")
        with atomic_write(root / written[-1]) as stream:
            stream.write(nifti_bytes(volume))
    for name, text in prepared.texts.items():
        written.append(f"{stem}_{name}")
        with atomic_write(root / written[-1], "w") as stream:
            stream.write(text)
    return written


def nifti_bytes(volume: Volume) -> bytes:
    """Return a volume as a compressed NIfTI file, the same bytes for the same voxels.

    Intensities and fields are rounded to the precision of float16, which shards store: their last bits are noise that does
    not compress.
    """
    if volume.kind == "mask":
        voxels: NDArray[Any] = np.asarray(volume.voxels, dtype=np.uint8)
    else:
        voxels = np.asarray(volume.voxels, dtype=np.float16).astype(np.float32)
    if volume.kind == "field":  # as ITK reads displacements: x, y, z, time, component
        voxels = voxels[:, :, :, None, :]
    image = nibabel.Nifti1Image(voxels, volume.affine)
    if volume.kind == "field":
        image.header.set_intent("vector")
    image.set_sform(volume.affine, volume.space)
    image.set_qform(volume.affine, volume.space)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = MARK
    return gzip.compress(image.to_bytes(), compresslevel=COMPRESSION, mtime=0)
