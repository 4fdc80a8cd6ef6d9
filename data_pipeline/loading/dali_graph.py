"""The augmentation graph and DALI's own reader. The only module that imports DALI.

Per scan: the z-score; per view: one resampling (flip, affine, crop), Gaussian blur, gamma, bias field, noise, cutout.
Operators that the settings never apply are left out of the graph; what a single view does not draw is skipped for it.
The same graph runs on the CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from data_pipeline.loading.augment import BOX, MIRRORED, TURNED, Augmentation

# DALI type and rank of what augment.OPERATOR_ARRAYS hands over.
_ARRAYS: dict[str, list[tuple[str, int]]] = {
    "warp": [("FLOAT", 2), ("FLOAT", 1), ("FLOAT", 1)],
    "blur": [("FLOAT", 1)],
    "gamma": [("FLOAT", 0)],
    "bias": [("FLOAT", 4), ("FLOAT", 4), ("FLOAT", 4)],
    "noise": [("FLOAT", 0), ("FLOAT16", 4)],
    "cutout": [("FLOAT", 1), ("FLOAT", 1)],
}
# Places in the flags that lead a view's arrays (augment.view_arrays).
_MOVE, _BLUR, _GAMMA, _BIAS, _NOISE = range(5)


class Frame(NamedTuple):
    """What all views of a graph share: (D, H, W), the scan's minimum and range (where an operator asks), the device."""

    shape: list[float]
    low: Any
    span: Any
    gpu: bool


class AugmentPipeline:
    """Runs the graph: ``run()`` gives the next batch's views, (2, B, 1, D, H, W) float32.

    ``source(iteration)`` returns B scans, each a list: (D, H, W, 1) float16 voxels, then both views' arrays
    (``augment.view_arrays``). It is called in this process, up to ``prefetch`` batches before ``run`` gives the batch;
    what it raises comes out of ``run`` unchanged.
    """

    def __init__(
        self, source: Callable[[int], Sequence[Sequence[Any]]], settings: Augmentation, *, shape: Sequence[int],
        batch: int, device: str, threads: int, prefetch: int,
    ) -> None:  # fmt: skip
        from nvidia.dali import pipeline_def

        gpu = device == "gpu"
        definition = pipeline_def(
            batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=prefetch, seed=0, enable_conditionals=True,
        )  # fmt: skip
        self._pipeline = definition(_graph)(
            lambda iteration: list(zip(*source(iteration), strict=True)), settings, shape, gpu
        )
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
        """Free the graph."""
        self._pipeline = None


def _graph(source: Any, settings: Augmentation, shape: Sequence[int], gpu: bool) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    own = [("INT32", 1)] if settings.flagged else []
    for operator in settings.operators:
        own += _ARRAYS[operator]
    kinds = [("FLOAT16", 4), *own, *own]
    fed = fn.external_source(
        source=source, num_outputs=len(kinds), batch=True, dtype=[getattr(types, kind) for kind, _ in kinds],
        ndim=[rank for _, rank in kinds],
    )  # fmt: skip
    volume, first, second = fed[0], fed[1 : 1 + len(own)], fed[1 + len(own) :]
    volume = fn.reinterpret(volume.gpu() if gpu else volume, layout="DHWC")
    # One z-score for both views. float16 would be six times slower in every operator that follows (measured).
    scored = fn.normalize(fn.cast(volume, dtype=types.FLOAT), epsilon=1e-16)
    low = span = None
    if "gamma" in settings.operators or "bias" in settings.operators:
        # Of the whole scan, for both views: resampling and blur are averages and stay within.
        low = fn.reductions.min(scored)
        span = fn.reductions.max(scored) - low
    frame = Frame([float(n) for n in shape], low, span, gpu)
    return _augment(scored, settings, first, frame), _augment(scored, settings, second, frame)


def _augment(view: Any, settings: Augmentation, arrays: Any, frame: Frame) -> Any:
    from nvidia.dali import fn

    flags, place = arrays[0] if settings.flagged else None, int(settings.flagged)
    for operator in settings.operators:
        count = len(_ARRAYS[operator])
        view = _OPERATORS[operator](view, flags, arrays[place : place + count], frame)
        place += count
    return view if settings.operators else fn.copy(view)


def _warp(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    from nvidia.dali import fn, types

    matrix, start, end = given
    # Beyond the edge the nearest voxel goes on: the background, whatever value the z-score gave it.
    if flags[_MOVE] == TURNED:
        moved = fn.warp_affine(view, matrix=matrix, inverse_map=True, interp_type=types.INTERP_LINEAR)
    elif flags[_MOVE] == BOX:
        # The same linear interpolation, one axis after the other; a start beyond the end turns the axis round.
        moved = fn.resize(
            view, size=frame.shape, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=False
        )
    elif flags[_MOVE] == MIRRORED:
        moved = fn.flip(view, depthwise=1, horizontal=0)
    else:
        moved = view
    return moved


def _blur(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    from nvidia.dali import fn

    if flags[_BLUR] == 1:
        blurred = fn.gaussian_blur(view, sigma=given[0])
    else:
        blurred = view
    return blurred


def _gamma(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    from nvidia.dali import math

    if flags[_GAMMA] == 1:
        # The clamp is for rounding alone: a hair below 0 would make the power NaN.
        unit = math.clamp((view - frame.low) / frame.span, 0.0, 1.0)
        changed = frame.low + frame.span * math.pow(unit, given[0])
    else:
        changed = view
    return changed


def _bias(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    if flags[_BIAS] == 1:
        along_d, along_h, along_w = (part.gpu() if frame.gpu else part for part in given)
        changed = frame.low + (view - frame.low) * (along_d * (along_h * along_w))
    else:
        changed = view
    return changed


def _noise(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    from nvidia.dali import fn, types

    strength, noise = given
    if flags[_NOISE] == 1:
        noisy = view + strength * fn.cast(noise.gpu() if frame.gpu else noise, dtype=types.FLOAT)
    else:
        noisy = view
    return noisy


def _cutout(view: Any, flags: Any, given: Any, frame: Frame) -> Any:
    from nvidia.dali import fn

    anchor, shape = given
    return fn.erase(view, anchor=anchor, shape=shape, axis_names="DHW", normalized=True, fill_value=0.0)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "warp": _warp, "blur": _blur, "gamma": _gamma, "bias": _bias, "noise": _noise, "cutout": _cutout,
}  # fmt: skip


def read_members(
    archives: Sequence[str], indexes: Sequence[str], extension: str, buffer: int, seed: int
) -> Iterator[tuple[str, Any]]:
    """Every indexed member of some tars once, by ``fn.readers.webdataset``: ("path:offset:name", uint8 bytes).

    Tars are read in the order given; ``buffer`` members are held, of which a random one is given next. The indexes
    (DALI's v1.2 text form) say which members exist, so that no tar is searched and none but those is given.
    """
    from nvidia.dali import fn, pipeline_def

    count = sum(int(open(index).readline().split()[1]) for index in indexes)  # noqa: SIM115

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=2, seed=0)  # type: ignore[untyped-decorator]
    def members() -> tuple[Any, Any]:
        payload = fn.readers.webdataset(
            paths=list(archives), index_paths=list(indexes), ext=[extension], missing_component_behavior="error",
            random_shuffle=buffer > 1, initial_fill=buffer, seed=seed,
            dont_use_mmap=True,  # a mapped file that is cut short kills the process without a word
        )  # fmt: skip
        return payload, fn.get_property(payload, key="source_info")

    pipeline = members()
    pipeline.build()
    for _ in range(count):
        payload, origin = pipeline.run()
        yield bytes(origin.at(0)).decode(), payload.at(0)
