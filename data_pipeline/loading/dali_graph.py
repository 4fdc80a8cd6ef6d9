"""The augmentation graph, and DALI's own shard reader.

The graph z-scores each scan once and applies to each of its two views the steps of ``data_pipeline.loading.augment``. Steps
that the settings never use are left out of the graph; a step that is not drawn for a view is skipped for that view. The same
graph runs on the CPU and on a GPU; one operator, which torch has faster on the CPU, calls torch there (``augmentations.warp``).
nvidia.dali is imported only here and inside the operators' ``apply`` functions.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.augment import Augmentation, array_kinds
from data_pipeline.loading.augmentations.operator import GraphContext, Step


class AugmentPipeline:
    """Runs the graph.

    Args:
        source: ``source(iteration)`` returns B scans. Each is a list: the (D, H, W, 1) float16 voxels, then the arrays of
            both views (``augment.view_arrays``). It is called in this process, up to ``prefetch`` batches before ``run``
            returns the batch; an exception that it raises comes out of ``run`` unchanged.
        settings: the operators' settings.
        shape: (D, H, W).
        batch: B, scans in a batch.
        device: ``cpu``, or ``gpu`` for the current CUDA device.
        threads: DALI's CPU threads.
        prefetch: batches that DALI prepares ahead.
    """

    def __init__(
        self, source: Callable[[int], Sequence[Sequence[Any]]], settings: Augmentation, *, shape: Sequence[int],
        batch: int, device: str, threads: int, prefetch: int,
    ) -> None:  # fmt: skip
        from nvidia.dali import pipeline_def

        gpu = device == "gpu"
        self._pool = ThreadPoolExecutor(threads) if threads > 1 and not gpu else None
        definition = pipeline_def(
            batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=prefetch, seed=0, enable_conditionals=True,
        )  # fmt: skip
        self._pipeline = definition(_graph)(
            lambda iteration: list(zip(*source(iteration), strict=True)), settings, shape, gpu, self._pool
        )
        self._pipeline.build()
        _remove_generated_sources()
        self._gpu = gpu

    def run(self) -> torch.Tensor:
        """Return the next batch's views, (2, B, 1, D, H, W) float32, in memory of their own."""
        views = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in self._pipeline.run()]
        batch_2B1DHW = torch.stack(views).movedim(-1, 2).contiguous()
        if self._gpu:
            torch.cuda.current_stream().synchronize()  # DALI overwrites its buffers; the copy must be done before that
        return batch_2B1DHW

    def close(self) -> None:
        """Free the graph's memory."""
        self._pipeline = None  # waits for the batches that are on their way
        if self._pool is not None:
            self._pool.shutdown(wait=False)


def _remove_generated_sources() -> None:
    """Remove the source files in TMPDIR that DALI has made of the graph's conditions, and has loaded.

    DALI removes them at the end of the process, so they would stay behind a process that is killed or ends by ``os._exit``.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file") and module.__file__:
            compiled = importlib.util.cache_from_source(module.__file__)
            for path in (Path(module.__file__), Path(compiled)):
                path.unlink(missing_ok=True)


def _graph(
    source: Any, settings: Augmentation, shape: Sequence[int], gpu: bool, pool: Executor | None
) -> tuple[Any, Any]:  # fmt: skip
    from nvidia.dali import fn, types

    view_kinds, steps = array_kinds(settings), list(settings.steps)
    kinds = [("FLOAT16", 4), *view_kinds, *view_kinds]
    inputs = fn.external_source(
        source=source, num_outputs=len(kinds), batch=True, dtype=[getattr(types, kind) for kind, _ in kinds],
        ndim=[dimensions for _, dimensions in kinds],
    )  # fmt: skip
    count = len(view_kinds)
    volume, first, second = inputs[0], inputs[1 : 1 + count], inputs[1 + count :]
    volume = fn.reinterpret(volume.gpu() if gpu else volume, layout="DHWC")
    # One z-score for both views, in float32: every operator is six times slower in float16 (measured).
    scored = fn.normalize(fn.cast(volume, dtype=types.FLOAT), epsilon=1e-16)
    low = span = None
    if any(step.uses_range for step in steps):
        # The range of the whole scan serves both views: resampling and blur are averages and stay within it.
        low = fn.reductions.min(scored)
        span = fn.reductions.max(scored) - low
    context = GraphContext([float(n) for n in shape], low, span, gpu, pool)
    return _augment(scored, steps, first, context), _augment(scored, steps, second, context)


def _augment(view: Any, steps: list[Step], arrays: Any, context: GraphContext) -> Any:
    """Apply the steps to a view; ``arrays`` holds what ``augment.view_arrays`` returns."""
    from nvidia.dali import fn

    if not steps:
        return fn.copy(view)
    flag = 0
    place = 1 if any(not step.always for step in steps) else 0
    for step in steps:
        own = arrays[place : place + len(step.kinds)]
        place += len(step.kinds)
        if step.always:
            view = step.apply(view, own, context)
        else:
            view = _apply_if(arrays[0][flag], step, view, own, context)
            flag += 1
    return view


def _apply_if(flag: Any, step: Step, view: Any, arrays: Any, context: GraphContext) -> Any:
    if flag == 1:
        changed = step.apply(view, arrays, context)
    else:
        changed = view
    return changed


def read_members(
    archives: Sequence[str], indexes: Sequence[str], extension: str, buffer: int, seed: int
) -> Iterator[tuple[str, Any]]:
    """Yield every indexed member of some tars once, as ("path:offset:name", (bytes,) uint8), with ``fn.readers.webdataset``.

    Args:
        archives: the tars, in the order of reading.
        indexes: an index file for each tar, in DALI's text format v1.2. Only the members that they list are read.
        extension: of the members.
        buffer: number of members held for shuffling; the next one is chosen from them at random.
        seed: of the shuffling.

    Raises RuntimeError if DALI cannot read a tar; the reader cannot be used after that.
    """
    from nvidia.dali import fn, pipeline_def

    count = sum(int(open(index).readline().split()[1]) for index in indexes)  # noqa: SIM115

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=2, seed=0)  # type: ignore[untyped-decorator]
    def members() -> tuple[Any, Any]:
        """Read one member: its bytes, and where they come from."""
        payload = fn.readers.webdataset(
            paths=list(archives), index_paths=list(indexes), ext=[extension], missing_component_behavior="error",
            random_shuffle=buffer > 1, initial_fill=buffer, seed=seed,
            dont_use_mmap=True,  # if a memory-mapped file is truncated, the process dies without a message
        )  # fmt: skip
        return payload, fn.get_property(payload, key="source_info")

    pipeline = members()
    pipeline.build()
    for _ in range(count):
        payload, origin = pipeline.run()
        yield bytes(origin.at(0)).decode(), payload.at(0)
