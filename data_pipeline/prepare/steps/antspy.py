"""Bias field, registration and tissues by ANTs. The only module that imports ants.

Everything here takes and returns NumPy arrays (D, H, W) in RAS with their 4 x 4 affines in mm. ANTs has one thread and a
fixed seed, so that the same voxels give the same result to the last bit.

What ``ants`` does that its documentation does not say: ``registration`` ignores its argument ``random_seed``, and takes every
file whose path begins with ``outprefix`` for one of its results; ``atropos`` draws its own seed unless ``r=0``, and leaves its
files in the temporary folder. Hence the folder of its own for each call, see `_session`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from infra.files import regular_file
from infra.processes.scratch import scratch_folder

Affine = NDArray[np.float64]  # (4, 4)
Volume = NDArray[np.float32]  # (D, H, W)
TO_LPS = np.array([-1.0, -1.0, 1.0], np.float32)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS, which nibabel uses, and LPS, which ITK uses
THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"
SHRINK = (4, 2, 1)  # of the resolutions of a registration


def import_ants() -> Any:
    """Import ants with one thread. Raises UserError if it is not installed."""
    os.environ[THREADS] = "1"  # ITK reads it once, at its import
    try:
        import ants
    except ImportError:
        raise UserError(
            "antspyx is not installed, which the preparation of raw scans needs; install it: pip install 'yaware[prepare]'"
        ) from None
    return ants


@contextmanager
def _session(seed: int) -> Iterator[tuple[Any, Path]]:
    """Yield ants with a seed, and an empty folder for its files, in which it also makes its temporary ones."""
    ants = import_ants()
    before, mode, number = tempfile.tempdir, ants.config._deterministic, ants.config._random_seed
    with scratch_folder("ants") as folder:
        tempfile.tempdir = str(folder)
        # False: without the seed of NumPy and Python, which are the caller's; the seed counts for ITK all the same.
        ants.config.set_ants_deterministic(False, seed)
        try:
            yield ants, folder
        finally:
            tempfile.tempdir = before
            ants.config.set_ants_deterministic(mode, number)


def _image(ants: Any, voxels: NDArray[Any], affine: Affine) -> Any:
    """An image of ants: float32, with the affine in LPS."""
    lps = FLIP @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return ants.from_numpy(
        np.asarray(voxels, np.float32), origin=lps[:3, 3].tolist(), spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )  # fmt: skip


def bias_field(
    voxels: Volume, affine: Affine, mask: NDArray[np.bool_], *, iterations: int, tolerance: float, spline: float,
    resolutions: int,
) -> Volume:  # fmt: skip
    """Return the bias field (D, H, W) of a volume by N4: positive factors, by which the volume is to be divided.

    Args:
        voxels: (D, H, W) positive intensities; a few mm per voxel suffice.
        affine: of the volume.
        mask: the voxels from which the field is estimated.
        iterations: at most, at each resolution.
        tolerance: of the last change, where a resolution ends.
        spline: distance of the field's control points at the first resolution, in mm.
        resolutions: of the field; each halves the distance of the one before.
    """
    with _session(1) as (ants, _):
        field = ants.n4_bias_field_correction(
            _image(ants, voxels, affine), mask=_image(ants, mask, affine), shrink_factor=1, return_bias_field=True,
            convergence={"iters": [iterations] * resolutions, "tol": tolerance}, spline_param=spline,
        )  # fmt: skip
        found: Volume = np.array(field.numpy(), np.float32)
    return found


def register_linear(
    fixed: tuple[Volume, Affine],
    moving: tuple[Volume, Affine],
    start: Affine,
    *,
    kind: str,
    iterations: Sequence[int],
    sampling: float,
    seed: int,
) -> Affine:
    """Register a volume to a template by mutual information.

    Args:
        fixed: the template's voxels and affine.
        moving: the volume's voxels and affine.
        start: from points (mm) of the template to points of the volume.
        kind: ``affine`` or ``rigid``.
        iterations: at shrink factors 4, 2 and 1.
        sampling: share of the template's voxels at which the metric is computed.
        seed: of their choice.

    Returns:
        (4, 4) from points (mm, RAS) of the template to points of the volume.
    """
    with _session(seed) as (ants, folder):
        (folder / "start.txt").write_text(itk_transform(start))
        found = ants.registration(
            fixed=_image(ants, *fixed), moving=_image(ants, *moving), type_of_transform=kind.capitalize(),
            initial_transform=[str(folder / "start.txt")], outprefix=str(folder / "found"),
            aff_metric="mattes", aff_sampling=32, aff_random_sampling_rate=sampling, aff_iterations=tuple(iterations),
            aff_shrink_factors=SHRINK, aff_smoothing_sigmas=(2, 1, 0),
        )  # fmt: skip
        transform = ants.read_transform(found["fwdtransforms"][0])
        parameters, centre = np.array(transform.parameters), np.array(transform.fixed_parameters)
    return _from_itk(parameters, centre)


def register_nonlinear(
    fixed: Volume,
    moving: Volume,
    affine: Affine,
    *,
    iterations: Sequence[int],
    step: float,
    smoothing: float,
    seed: int,
) -> NDArray[np.float32]:
    """Register a volume to a template by SyN; both are on one grid.

    Args:
        fixed, moving: the template's voxels and the volume's.
        affine: of their grid.
        iterations: at shrink factors 4, 2 and 1.
        step: length of a gradient step in voxels.
        smoothing: of each update, in voxels.
        seed: of the metric's random numbers.

    Returns:
        (D, H, W, 3) displacements in mm (RAS) from each point of the template to the volume's.
    """
    with _session(seed) as (ants, folder):
        found = ants.registration(
            fixed=_image(ants, fixed, affine), moving=_image(ants, moving, affine), type_of_transform="SyNOnly",
            initial_transform="Identity", outprefix=str(folder / "found"), reg_iterations=tuple(iterations),
            grad_step=step, flow_sigma=smoothing, total_sigma=0, syn_metric="mattes", syn_sampling=32,
        )  # fmt: skip
        (path,) = (name for name in found["fwdtransforms"] if name.endswith("Warp.nii.gz"))
        field = np.asarray(nibabel.load(regular_file(path)).dataobj, dtype=np.float32)
    return np.ascontiguousarray(field.reshape(*fixed.shape, 3) * TO_LPS)


def segment(
    voxels: Volume, affine: Affine, mask: NDArray[np.bool_], priors: Sequence[Volume], *, iterations: int,
    prior_weight: float, smoothness: float,
) -> list[Volume]:  # fmt: skip
    """Segment a volume by Atropos; return the probability (D, H, W) of each class of ``priors``, 0 outside the mask."""
    with _session(1) as (ants, _):
        found = ants.atropos(
            a=_image(ants, voxels, affine), x=_image(ants, mask, affine),
            i=[_image(ants, prior, affine) for prior in priors], priorweight=prior_weight,
            m=f"[{smoothness:g},1x1x1]", c=f"[{iterations},0]", r=0,
        )  # fmt: skip
        return [np.array(image.numpy(), np.float32) for image in found["probabilityimages"]]


def itk_transform(ras: Affine) -> str:
    """Return an affine map of points (RAS, mm) as the text of an ITK transform file (LPS), which ANTs and Slicer read."""
    lps = FLIP @ ras @ FLIP
    numbers = " ".join(f"{value:.9g}" for value in (*lps[:3, :3].ravel(), *lps[:3, 3]))
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )


def _from_itk(parameters: NDArray[np.float64], centre: NDArray[np.float64]) -> Affine:
    """The map of points in RAS of an ITK affine transform: matrix, translation, and the centre of rotation."""
    lps = np.eye(4)
    lps[:3, :3] = parameters[:9].reshape(3, 3)
    lps[:3, 3] = parameters[9:12] + centre - lps[:3, :3] @ centre
    ras: Affine = FLIP @ lps @ FLIP
    return ras
