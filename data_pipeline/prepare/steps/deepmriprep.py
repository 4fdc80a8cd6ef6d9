"""Grey matter by deepmriprep (Fisch et al. 2024), if the user has installed it with its weights. Only this module imports it.

deepmriprep fetches its weights at its first use. A preparation must not depend on the network, so it is refused without them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from infra.processes.scratch import scratch_folder

WEIGHTS = ("segmentation_model.pt", "segmentation_nogm_model.pt", "warp_model.pt")
VOLUMES = {"grey_ml": "gmv", "white_ml": "wmv", "csf_ml": "csfv", "tiv": "tiv"}  # our name -> deepmriprep's, all in ml


class GreyMatter(NamedTuple):
    """Modulated grey matter (D, H, W) in RAS with its affine, and volumes in ml by name."""

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]
    figures: dict[str, float]


def check_installed() -> None:
    """Raise UserError if the library or its weights are missing."""
    fix = "let it fetch its weights once where there is a network, or choose --pipeline vbm"
    found = util.find_spec("deepmriprep")
    if found is None or found.origin is None:
        raise UserError(f"--pipeline=deepmriprep: it is not installed; pip install deepmriprep, {fix}")
    folder = Path(found.origin).parent / "data" / "models"
    missing = [name for name in WEIGHTS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--pipeline=deepmriprep: {folder} has no {missing[0]}; {fix}")


def grey_matter(voxels: NDArray[np.float32], affine: NDArray[np.float64], *, gpu: bool = False) -> GreyMatter:
    """Return the modulated grey matter of a T1-weighted head (D, H, W), RAS. Raises UserError as ``check_installed``."""
    check_installed()
    with scratch_folder("deepmriprep") as folder:
        path = folder / "head.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        wanted = {name: str(folder / f"{name}.csv") for name in VOLUMES.values()}
        found = _program(gpu).run(
            str(path), {"mwp1": str(folder / "mwp1.nii.gz"), **wanted}, run_all=False, skip_unprocessed=False
        )
        image = nibabel.as_closest_canonical(found["mwp1"])
        figures = {name: float(np.asarray(found[theirs]).item()) for name, theirs in VOLUMES.items()}
        return GreyMatter(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine), figures)


@lru_cache(maxsize=2)
def _program(gpu: bool) -> Any:
    from deepmriprep.preprocess import Preprocess

    return Preprocess(no_gpu=not gpu)
