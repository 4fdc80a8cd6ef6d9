"""Brain extraction by deepbet's network (Fisch et al. 2024, MIT license). The only module that imports deepbet."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from data_pipeline.volume.errors import BadScan
from infra.errors import UserError


def brain_mask(
    voxels: NDArray[np.float32], affine: NDArray[np.float64], *, threshold: float, gpu: bool = False
) -> NDArray[np.bool_]:
    """Return the mask (D, H, W) of the brain in a T1-weighted head (D, H, W), RAS.

    ``threshold`` is that of the network's probability. Raises BadScan if the network finds no brain, and UserError if deepbet
    is not installed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a Ray task, so that sums round alike
    try:
        _, mask, _ = _network(gpu).run(nibabel.Nifti1Image(voxels, affine), threshold=threshold)
    except (AssertionError, ValueError, IndexError) as error:  # what deepbet raises without any foreground
        raise BadScan(f"no brain was found ({' '.join(str(error).split())[:80]})", "brain") from None
    finally:
        torch.set_num_threads(threads)
    return np.asarray(mask.dataobj) > 0


@lru_cache(maxsize=2)
def _network(gpu: bool) -> Any:
    try:
        from deepbet import BrainExtraction
    except ImportError:
        raise UserError(
            "deepbet is not installed, which finds the brain in raw scans; install it: pip install 'yaware[prepare]', or set "
            "--prepare.brain.method=given for scans whose brain is extracted already"
        ) from None
    return BrainExtraction(no_gpu=not gpu)
