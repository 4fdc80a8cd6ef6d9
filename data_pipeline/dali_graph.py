"""The augmentation graph. The only module that imports DALI.

Per scan: the z-score; per view: one fused warp (flip, affine, crop), Gaussian blur, noise, cutout. Operators that the
settings never apply are left out of the graph. The same graph runs on the CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import Augmentation, View

# DALI counts axes as (x, y, z) = (W, H, D).
_REVERSED = [2, 1, 0]


def view_arrays(settings: Augmentation, view: View, noise: Any) -> tuple[Any, ...]:
    """What the graph's source hands over for one view, in the order in which ``_augment`` takes it."""
    arrays: list[Any] = []
    if settings.warps:
        matrix = view.matrix
        arrays.append(np.ascontiguousarray(matrix[_REVERSED][:, [*_REVERSED, 3]]))
    if settings.blur.p > 0:
        arrays.append(np.array([view.blur], np.float32))
    if settings.noise.p > 0:
        arrays += [np.array(view.noise * view.noise_sign, np.float32), noise]
    if settings.cutout.p > 0:
        arrays += [view.cutout_from, np.full(3, view.cutout_side, np.float32)]
    return tuple(arrays)


class AugmentPipeline:
    """Runs the graph: ``run()`` gives the next batch's views, (2, B, 1, D, H, W) float32.

    ``source(sample_info)`` returns one scan's (D, H, W, 1) float16 voxels and both views' arrays (``view_arrays``).
    ``workers`` > 0 calls it in that many processes (spawned), ahead of time.
    """

    def __init__(
        self, source: Callable[[Any], tuple[Any, ...]], settings: Augmentation, *, batch: int, device: str,
        threads: int, workers: int, prefetch: int,
    ) -> None:  # fmt: skip
        from nvidia.dali import pipeline_def

        gpu = device == "gpu"
        definition = pipeline_def(
            batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=prefetch, py_num_workers=max(1, workers), py_start_method="spawn", seed=0,
        )  # fmt: skip
        self._pipeline = definition(_graph)(source, settings, gpu, workers > 0)
        if workers:
            self._pipeline.start_py_workers()
        self._pipeline.build()
        self._gpu = gpu

    def run(self) -> torch.Tensor:
        """The next batch; a tensor of its own, DALI's buffers are used again."""
        views = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in self._pipeline.run()]
        batch_21BDHW = torch.stack(views).movedim(-1, 2).contiguous()
        if self._gpu:
            torch.cuda.current_stream().synchronize()  # the copy is done before DALI writes the buffers anew
        return batch_21BDHW

    def close(self) -> None:
        """Stop the workers and free the graph."""
        pool = getattr(self._pipeline, "_py_pool", None)
        self._pipeline = None  # the graph goes first: it may still be waiting for its workers
        if pool is not None:
            pool.close()


def _graph(source: Any, settings: Augmentation, gpu: bool, parallel: bool) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    kinds, ranks = [types.FLOAT16], [4]
    for _ in range(2):
        if settings.warps:
            kinds, ranks = [*kinds, types.FLOAT], [*ranks, 2]
        if settings.blur.p > 0:
            kinds, ranks = [*kinds, types.FLOAT], [*ranks, 1]
        if settings.noise.p > 0:
            kinds, ranks = [*kinds, types.FLOAT, types.FLOAT16], [*ranks, 0, 4]
        if settings.cutout.p > 0:
            kinds, ranks = [*kinds, types.FLOAT, types.FLOAT], [*ranks, 1, 1]
    fed = fn.external_source(
        source=source, num_outputs=len(kinds), batch=False, parallel=parallel, dtype=kinds, ndim=ranks
    )
    volume, *arrays = fed
    volume = fn.reinterpret(volume.gpu() if gpu else volume, layout="DHWC")
    # One z-score for both views. float16 would be six times slower in every operator that follows (measured).
    scored = fn.normalize(fn.cast(volume, dtype=types.FLOAT), epsilon=1e-16)
    half = len(arrays) // 2
    first, second = (_augment(scored, settings, part, gpu) for part in (arrays[:half], arrays[half:]))
    return first, second


def _augment(view: Any, settings: Augmentation, arrays: list[Any], gpu: bool) -> Any:
    from nvidia.dali import fn, types

    given = iter(arrays)
    if settings.warps:
        # Beyond the edge the nearest voxel goes on: the background, whatever value the z-score gave it.
        view = fn.warp_affine(view, matrix=next(given), inverse_map=True, interp_type=types.INTERP_LINEAR)
    if settings.blur.p > 0:
        view = fn.gaussian_blur(view, sigma=next(given))
    if settings.noise.p > 0:
        strength, noise = next(given), next(given)
        view = view + strength * fn.cast(noise.gpu() if gpu else noise, dtype=types.FLOAT)
    if settings.cutout.p > 0:
        anchor, shape = next(given), next(given)
        view = fn.erase(view, anchor=anchor, shape=shape, axis_names="DHW", normalized=True, fill_value=0.0)
    return view if settings.warps or settings.blur.p or settings.noise.p or settings.cutout.p else fn.copy(view)
