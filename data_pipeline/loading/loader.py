"""Batches: two augmented views of each scan in this rank's share of the global batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.augment import Augmentation, load_augmentation
from data_pipeline.loading.order import EveryScan, Order
from data_pipeline.loading.reader_processes import ReaderProcesses
from data_pipeline.loading.source import IndexSource, Sample, Source
from data_pipeline.loading.stream import SEQUENTIAL, open_stream
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from infra.errors import LoaderError, UserError, nearest

READERS = ("index", *SEQUENTIAL)
# (row numbers (B,), how often each scan was shown before (B,)) -> arrays by name
Details = Callable[[NDArray[np.int64], NDArray[np.int64]], dict[str, NDArray[Any]]]
TOLERATED_BAD_SCANS = 3  # this many unreadable scans never stop a run, however small the data set


class TwoViewLoader:
    """Endless batches of one rank.

    Each batch is a dict:

    - ``views`` (2, B, 1, D, H, W) float32 on ``device``, z-scored and augmented;
    - ``proxies`` (B, P) float32, NaN where missing;
    - ``scan`` (B,) int64, row numbers of scans.parquet.

    and what ``details`` adds. B is this rank's share of ``global_batch``.

    With ``reader="index"``, which scans a step sees and how they are augmented depends only on (seed, step): the ranks'
    batches together are the same for every number of ranks, and ``start_step`` or ``load_state_dict`` continue exactly where
    a run was interrupted. ``stream`` and ``dali`` (``data_pipeline.loading.stream``) read shards from front to back; they
    continue exactly too, but only on the same number of ranks.

    A scan that cannot be read (checksum, truncated shard) is named on stderr, counted in ``bad_scans`` and replaced by the
    next in order; ``scan`` and ``proxies`` describe the replacement. LoaderError is raised if the unreadable scans are more
    than 3 and more than ``max_bad_share`` of the scans that this rank has seen.

    ``wait_seconds`` is the duration of the last ``next``: the time for which training waited for data.

    Use it in a ``with`` block, or call ``close`` at the end.

    If DALI augments on the CPU and reader processes read, a thread fetches the next batch from DALI during the training
    step, which holds one batch more in memory.

    Memory: reader processes hold ``prefetch + 1`` steps in shared memory (``shared_bytes``): a scan's float16 voxels, and as
    much for the noise of each view, together 12.7 MB per scan at 121 x 145 x 121. DALI holds ``prefetch`` batches of inputs
    and views.

    Args:
        manifest: the data set.
        rows: row numbers of the scans to draw from, as ``Manifest.rows`` returns them.
        global_batch: scans per step over all ranks.
        rank: of this process.
        world_size: number of ranks.
        seed: of the order and of the augmentation.
        augmentation: a preset's name, a recipe's section, or an ``Augmentation``.
        proxies: columns of the scan table.
        device: where DALI augments, ``cpu`` or ``gpu`` (the current CUDA device).
        start_step: first step.
        workers: processes that read, check and decode ahead; 0 reads in this process. Sequential readers use at most one.
        threads: DALI's CPU threads.
        prefetch: number of steps that are read, and of batches that are augmented, ahead of the training.
        reader: ``index``, ``stream`` or ``dali``.
        order: an order over places in ``rows`` (``data_pipeline.loading.balance``), for ``reader="index"`` only; None shows
            every scan once per epoch.
        buffer: number of scans that a sequential reader holds for shuffling.
        max_bad_share: largest share of unreadable scans.
        details: called with the batch's row numbers (B,) and how often each scan was shown before (B,); the arrays that it
            returns are added to the batch (``data_pipeline.loading.view_details``).

    Raises:
        UserError: if an argument is invalid.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rows: NDArray[np.int64],
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        augmentation: Augmentation | dict[str, Any] | str = "default",
        proxies: Sequence[str] = ("age",),
        device: str = "cpu",
        start_step: int = 0,
        workers: int = 0,
        threads: int = 1,
        prefetch: int = 2,
        reader: str = "index",
        order: Order | None = None,
        buffer: int = 256,
        max_bad_share: float = 0.001,
        details: Details | None = None,
    ) -> None:
        _check(rows, device, reader, order)
        settings = augmentation if isinstance(augmentation, Augmentation) else load_augmentation(augmentation)
        if reader == "index":
            order = order or EveryScan(len(rows), seed, global_batch)
        self._source = _open_source(
            manifest, rows, reader, settings, order,
            seed=seed, batch=global_batch, rank=rank, world_size=world_size, buffer=buffer,
        )  # fmt: skip
        self._decisive = {"seed": seed, "global_batch": global_batch, "scans": len(rows), "reader": reader}
        self._decisive |= {"positions": order.length} if order else {"world_size": world_size, "buffer": buffer}
        self._proxies = manifest.proxies(proxies)
        self._bad = BadScans(manifest, max_bad_share, len(rows), rank)
        self._pipeline_options: dict[str, Any] = {
            "batch": self._source.count(), "device": device, "threads": threads, "prefetch": prefetch,
        }  # fmt: skip
        self._workers = workers if reader == "index" else min(workers, 1)
        self._readers: Readers | None = None
        self._pipeline: Any = None
        # On a GPU, DALI works ahead on a stream of its own; without reader processes the thread would do the reading.
        self._threaded = device == "cpu" and self._workers > 0
        self._thread: ThreadPoolExecutor | None = None
        self._next_views: Future[torch.Tensor] | None = None
        self._details = details
        self._delivered: dict[
            int, tuple[NDArray[np.int64], NDArray[np.int64]]
        ] = {}  # step -> rows, and how often shown
        self.step = start_step
        self.wait_seconds = 0.0

    @property
    def bad_scans(self) -> int:
        """Number of scans that this rank could not read since the loader was created; each is counted once."""
        return len(self._bad.rows)

    @property
    def shared_bytes(self) -> int:
        """Bytes of memory shared with the reader processes; 0 if there are none or they have not started."""
        return self._readers.bytes if isinstance(self._readers, ReaderProcesses) else 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if self._pipeline is None:
            self._open()
        if self._thread is None:
            views = self._pipeline.run()
        else:
            views = (self._next_views or self._thread.submit(self._pipeline.run)).result()
            self._next_views = self._thread.submit(self._pipeline.run)
        rows, shown = self._delivered.pop(self.step)
        self.step += 1
        details = self._details(rows, shown) if self._details else {}
        self.wait_seconds = time.perf_counter() - started
        return {
            "views": views,
            "proxies": torch.from_numpy(self._proxies[rows]),
            "scan": torch.from_numpy(rows.copy()),
            **{name: torch.from_numpy(array) for name, array in details.items()},
        }

    def _open(self) -> None:
        from data_pipeline.loading.dali_graph import AugmentPipeline

        first, source = self.step, self._source
        if self._workers:
            self._readers = ReaderProcesses(
                source, workers=self._workers, first_step=first, depth=self._pipeline_options["prefetch"]
            )
        else:
            self._readers = InProcessReader(source)
        self._pipeline = AugmentPipeline(
            lambda iteration: self._read(first + iteration),
            source.settings,
            shape=source.shape,
            **self._pipeline_options,
        )
        if self._threaded:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def _read(self, step: int) -> list[list[Any]]:
        """Return the graph's inputs for a step; DALI calls this some steps before it returns the batch."""
        assert self._readers is not None
        samples = self._readers.get(step)
        self._bad.see(step, samples)
        rows = np.array([(sample.row, sample.shown) for sample in samples], dtype=np.int64).reshape(-1, 2)
        self._delivered[step] = rows[:, 0], rows[:, 1]
        return [sample.arrays for sample in samples]

    def state_dict(self) -> dict[str, Any]:
        """Return the next step and the values that decide, with it, all following batches."""
        return {"step": self.step, **self._decisive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a ``state_dict``; with the indexed reader also on another number of ranks.

        Raises UserError if a value that decides the order differs: seed, global batch, number of scans, reader; for the
        sequential readers also the number of ranks and the buffer.
        """
        for key, value in self._decisive.items():
            if state.get(key, value) != value:
                reason = ": a sequential reader's order depends on it" if key in ("world_size", "buffer") else ""
                raise UserError(
                    f"loader state has {key}={state[key]}, this loader {value}{reason}; resume with the old value"
                )
        self.close()
        self.step = int(state["step"])

    def __enter__(self) -> TwoViewLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reader processes and free DALI's memory; the next batch starts them again."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)  # the graph must not be running when it is freed
        self._thread = self._next_views = None
        if self._pipeline is not None:
            self._pipeline.close()
        if self._readers is not None:
            self._readers.close()
        self._pipeline = self._readers = None
        self._delivered.clear()


class Readers(Protocol):
    """Reads steps one after the other: in reader processes, or in this process."""

    def get(self, step: int) -> list[Sample]:
        """Return the samples of the next step."""

    def close(self) -> None:
        """Stop reading and free the resources."""


class InProcessReader:
    """Reads in this process, on demand."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def get(self, step: int) -> list[Sample]:
        """Return the samples of a step."""
        return list(self._source.samples(step, range(self._source.count())))

    def close(self) -> None:
        """Do nothing; this reader holds no resources."""


class BadScans:
    """Counts the unreadable scans, reports each on stderr, and stops the run if there are too many."""

    def __init__(self, manifest: Manifest, share: float, scans: int, rank: int) -> None:
        self.rows: set[int] = set()
        self._manifest, self._share, self._scans, self._rank = manifest, share, scans, rank
        self._seen = 0

    def see(self, step: int, samples: Sequence[Sample]) -> None:
        """Record the samples of a step. Raises LoaderError if there are too many unreadable scans."""
        self._seen += sum(1 + len(sample.bad) for sample in samples)
        for sample in samples:
            for row, reason in sample.bad:
                self.rows.add(row)
                print(
                    f"data: rank {self._rank}, step {step}: {self._name(row, reason)}; replaced by scan "
                    f"{self._manifest.scans['key'].iloc[sample.row]} ({len(self.rows)} bad so far)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        seen = min(self._seen, self._scans)
        if len(self.rows) > max(TOLERATED_BAD_SCANS, self._share * seen):
            raise LoaderError(
                f"{len(self.rows)} of the first {seen} scans cannot be read, more than data.max_bad_share="
                f"{self._share:g} allows; run `yaware shards verify {self._manifest.url}`"
            )

    def _name(self, row: int, reason: str) -> str:
        scan = self._manifest.scans.iloc[row]
        if str(scan["key"]) in reason:
            return reason
        return f"shard {self._manifest.shards[int(scan['shard'])]['name']}, scan {scan['key']}: {reason}"


def _open_source(
    manifest: Manifest, rows: NDArray[np.int64], reader: str, settings: Augmentation, order: Order | None, *,
    seed: int, batch: int, rank: int, world_size: int, buffer: int,
) -> Source:  # fmt: skip
    if reader != "index":
        return open_stream(
            manifest, rows, reader, settings, seed=seed, batch=batch, rank=rank, world_size=world_size, buffer=buffer
        )
    assert order is not None
    d, h, w = (int(n) for n in manifest.grid["shape"])
    return IndexSource(
        reader=manifest.reader(), rows=rows, order=order, shape=(d, h, w), settings=settings, seed=seed, batch=batch,
        rank=rank, world_size=world_size,
    )  # fmt: skip


def _check(rows: NDArray[np.int64], device: str, reader: str, order: Order | None) -> None:
    if device not in ("cpu", "gpu") or (device == "gpu" and not torch.cuda.is_available()):
        allowed = "cpu" + ", gpu" * torch.cuda.is_available()
        raise UserError(f"device={device!r} is not available on this machine; allowed: {allowed}")
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise UserError(f"rows={rows!r:.80} is no array of row numbers (n,); give what Manifest.rows returns")
    if len(rows) == 0:
        raise UserError("no scan is selected; choose other splits or another query")
    if reader not in READERS:
        raise UserError(f"data.reader={reader!r} is not known{nearest(reader, READERS)}; allowed: {', '.join(READERS)}")
    if order is not None and not isinstance(order, EveryScan) and reader != "index":
        raise UserError(f"data.balance needs data.reader: index, found {reader}: sequential readers have no such order")


def volumes(
    manifest: Manifest, rows: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Yield scans without augmentation, z-scored as in training: rows (B,) and volumes (B, 1, D, H, W) float32.

    Args:
        manifest: the data set.
        rows: row numbers of the scans.
        batch_size: B; the last batch may be smaller.

    Raises OSError if a scan cannot be read.
    """
    reader = manifest.reader()
    for first in range(0, len(rows), batch_size):
        batch_rows = rows[first : first + batch_size]
        yield batch_rows, torch.from_numpy(np.stack([zscore(reader.read(int(row)))[None] for row in batch_rows]))
