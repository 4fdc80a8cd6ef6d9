"""Flip, affine and crop: one fused resampling.

Each operator draws its part of an affine transformation; the step multiplies the parts to one matrix, so a view is
interpolated once. Coordinates: axes (D, H, W), voxel units, origin at the volume's corner.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.loading.augmentations.operator import STRICT, GraphContext, Operator, Probability, Step, ViewContext

if TYPE_CHECKING:  # a reader process draws parameters without torch
    import torch

# How a view is resampled, the cheapest way that its matrix allows. At 121 x 145 x 121 on a CPU a copy (identity, mirror)
# takes next to nothing, resampling along the axes 14 ms, and the general warp 50 ms.
IDENTITY, MIRROR, ALONG_AXES, GENERAL = range(4)


@dataclass(frozen=True, config=STRICT)
class Flip:
    """Mirrors left and right."""

    p: float = Probability


@dataclass(frozen=True, config=STRICT)
class Affine:
    """Rotates about each axis, zooms all axes by one factor, and shifts along each axis.

    Each is uniform between minus and plus its setting: ``degrees``, ``zoom`` (0.05: factor 0.95 to 1.05) and ``shift``
    (share of a side).
    """

    p: float = Probability
    degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    zoom: float = Field(default=0.0, ge=0.0, lt=1.0)
    shift: float = Field(default=0.0, ge=0.0, le=0.5)


@dataclass(frozen=True, config=STRICT)
class Crop:
    """Cuts out a box with ``side`` (share) of each side at a random position and resizes it to the full grid."""

    p: float = Probability
    side: float = Field(default=0.75, gt=0.0, le=1.0)


class CropPart(NamedTuple):
    """A crop as a map from output to input voxels: a scale about the volume's centre, then a shift."""

    side: float
    shift: NDArray[np.float64]  # (3,) voxels


class AffinePart(NamedTuple):
    """An affine transformation from output to input voxels: rotation and zoom about the volume's centre, then a shift."""

    rotation: NDArray[np.float64]  # (3, 3)
    zoom: float
    shift: NDArray[np.float64]  # (3,) voxels


def _draw_crop(settings: Crop, u: NDArray[np.float64], shape: tuple[int, ...]) -> CropPart:
    return CropPart(settings.side, (u[:3] - 0.5) * (1.0 - settings.side) * np.asarray(shape, np.float64))


def _draw_affine(settings: Affine, u: NDArray[np.float64], shape: tuple[int, ...]) -> AffinePart:
    rotation = _rotation(np.deg2rad((2.0 * u[:3] - 1.0) * settings.degrees))
    zoom = 1.0 + (2.0 * u[3] - 1.0) * settings.zoom
    return AffinePart(rotation, zoom, (2.0 * u[4:7] - 1.0) * settings.shift * np.asarray(shape, np.float64))


def _draw_flip(settings: Flip, u: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    return True


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    (sa, sb, sc), (ca, cb, cc) = np.sin(angles), np.cos(angles)
    about_d = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_h = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_w = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    rotation: NDArray[np.float64] = about_w @ about_h @ about_d
    return rotation


def warp_matrix(
    shape: tuple[int, ...], crop: CropPart | None, affine: AffinePart | None, flip: bool | None
) -> NDArray[np.float32]:
    """Return the (3, 4) matrix from output to input voxels for what the three operators drew."""
    sides = np.asarray(shape, dtype=np.float64)
    linear, centre, offset = np.eye(3), sides / 2.0, np.zeros(3)
    if crop is not None:
        linear *= crop.side
        offset += crop.shift
    if affine is not None:
        linear = affine.rotation @ linear * affine.zoom
        offset += affine.shift
    if flip:
        linear[:, 0] *= -1.0
    return np.concatenate([linear, (centre + offset - linear @ centre)[:, None]], axis=1).astype(np.float32)


def resampling(matrix: NDArray[np.float32], shape: tuple[int, ...]) -> int:
    """Return the cheapest way to apply a matrix: ``IDENTITY``, ``MIRROR``, ``ALONG_AXES`` or ``GENERAL``."""
    linear, offset = matrix[:, :3], matrix[:, 3]
    if np.any(linear[~np.eye(3, dtype=bool)] != 0):
        return GENERAL
    if np.any(np.abs(np.diag(linear)) != 1) or np.any(offset[1:] != 0) or np.any(np.diag(linear)[1:] != 1):
        return ALONG_AXES
    start = 0 if linear[0, 0] > 0 else shape[0]
    return ALONG_AXES if offset[0] != start else (IDENTITY if start == 0 else MIRROR)


def _arrays(
    context: ViewContext, crop: CropPart | None, affine: AffinePart | None, flip: bool | None
) -> list[NDArray[Any]]:
    matrix = warp_matrix(context.shape, crop, affine, flip)
    method = resampling(matrix, context.shape)
    # DALI's resize takes the box by two corners: the input positions of the output volume's two ends.
    low = matrix[:, 3]
    high = matrix[:, :3].astype(np.float64) @ np.array(context.shape, np.float64) + low
    along_axes = method == ALONG_AXES
    return [
        np.array(method, np.int32),
        np.ascontiguousarray(matrix[::-1][:, [2, 1, 0, 3]]),  # DALI's warp orders the axes (x, y, z) = (W, H, D)
        np.ascontiguousarray(low if along_axes else low * 0),
        (high if along_axes else np.ones(3)).astype(np.float32),
    ]


def _apply(view: Any, arrays: Any, context: GraphContext) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import do_not_convert

    method, matrix, start, end = arrays
    # Beyond the edge the nearest voxel is repeated: the background, whatever value the z-score gave it.
    if method == GENERAL:
        if context.gpu:
            warped = fn.warp_affine(view, matrix=matrix, inverse_map=True, interp_type=types.INTERP_LINEAR)
        else:  # DALI's own operator takes 2.5 times as long on a CPU
            warped = fn.dl_tensor_python_function(
                view, matrix, function=do_not_convert(_batch_warp)(context.pool), batch_processing=True,
                output_layouts="DHWC", synchronize_stream=False,
            )  # fmt: skip
    elif method == ALONG_AXES:
        # The same linear interpolation, axis by axis; a start beyond the end mirrors the axis.
        warped = fn.resize(
            view, size=context.shape, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=False
        )
    elif method == MIRROR:
        warped = fn.flip(view, depthwise=1, horizontal=0)
    else:
        warped = view
    return warped


def _batch_warp(pool: Executor | None) -> Callable[[list[Any], list[Any]], list[Any]]:
    """Return a function that warps a batch of volumes (D, H, W, 1), given and returned as DLPack capsules."""

    def warp_batch(volumes: list[Any], matrices: list[Any]) -> list[Any]:
        from torch.utils.dlpack import from_dlpack

        def warp_one(volume: Any, matrix: Any) -> Any:
            warped = warp_on_cpu(from_dlpack(volume)[..., 0], from_dlpack(matrix).numpy())
            return warped[..., None].__dlpack__()

        return list((pool.map if pool else map)(warp_one, volumes, matrices))

    return warp_batch


def warp_on_cpu(volume_DHW: torch.Tensor, matrix: NDArray[np.float32]) -> torch.Tensor:
    """Return a float32 volume (D, H, W), linearly interpolated at the positions to which a matrix maps its voxels.

    Args:
        volume_DHW: on the CPU. Beyond its edge the nearest voxel is repeated.
        matrix: (3, 4), from output to input positions in DALI's order of axes (W, H, D).
    """
    import torch

    sides = volume_DHW.shape[::-1]
    # grid_sample counts from -1 at a side's start to 1 at its end.
    scaled = matrix.astype(np.float64) * (2.0 / np.array(sides))[:, None]
    along_w, along_h, along_d = (np.outer(np.arange(side) + 0.5, scaled[:, axis]) for axis, side in enumerate(sides))
    plane_DH3 = along_d[:, None] + along_h + (scaled[:, 3] - 1.0)
    # By NumPy, in this thread: torch would start as many threads as there are cores in each of DALI's.
    positions_DHW3 = plane_DH3[:, :, None].astype(np.float32) + along_w.astype(np.float32)
    warped: torch.Tensor = torch.nn.functional.grid_sample(
        volume_DHW[None, None], torch.from_numpy(positions_DHW3)[None], padding_mode="border", align_corners=False
    )[0, 0]
    return warped


WARP = Step(
    arrays=_arrays, kinds=(("INT32", 0), ("FLOAT", 2), ("FLOAT", 1), ("FLOAT", 1)), apply=_apply,
    always=True,  # _apply itself leaves a view as it is where the matrix is the identity
)  # fmt: skip
CROP = Operator(Crop, range(12, 16), _draw_crop, WARP)
AFFINE = Operator(Affine, range(16, 24), _draw_affine, WARP)
FLIP = Operator(Flip, range(24, 25), _draw_flip, WARP)
