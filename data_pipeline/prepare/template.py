"""The template: MNI152 (ICBM 2009a, nonlinear, symmetric; Fonov et al. 2011), as nilearn ships it: T1 image and tissue maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from data_pipeline.prepare.resampling import resample
from data_pipeline.volume.grid import Grid
from infra.files import regular_file


@dataclass(frozen=True)
class Template:
    """The template on a grid: T1 intensities without skull, 0..1, and the shares of three tissues, all (D, H, W) float32."""

    grid: Grid
    t1: NDArray[np.float32]
    grey: NDArray[np.float32]
    white: NDArray[np.float32]
    fluid: NDArray[np.float32]

    @property
    def brain(self) -> NDArray[np.bool_]:
        """(D, H, W) mask of the brain and the fluid around it."""
        inside: NDArray[np.bool_] = self.grey + self.white + self.fluid > 0.5
        return inside

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) of the grid."""
        return np.array(self.grid.affine)


@lru_cache(maxsize=4)
def load_template(grid: Grid) -> Template:
    """Load the template on a grid; cached."""
    (t1, affine), (grey, _), (white, _) = (_read(name) for name in ("t1", "gm", "wm"))
    fluid = np.clip((t1 > 0) - grey - white, 0.0, 1.0).astype(np.float32)
    maps = (resample(values, affine, grid, np.eye(4)) for values in (t1, grey, white, fluid))
    return Template(grid, *maps)


def _read(name: str) -> tuple[NDArray[np.float32], Any]:
    import nilearn

    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    path = Path(nilearn.__file__).parent / "datasets" / "data" / file
    image = nibabel.as_closest_canonical(nibabel.load(regular_file(path)))
    return np.asarray(image.dataobj, dtype=np.float32) / np.float32(255.0), image.affine
