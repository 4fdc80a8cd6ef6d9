"""Batches: two augmented views of each scan of this rank's share of the global batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from data_pipeline.loading.augment import Augmentation, load_augmentation
from data_pipeline.loading.order import EveryScan, Order
from data_pipeline.loading.reader_processes import ReaderProcesses
from data_pipeline.loading.source import IndexSource, Sample, Source
from data_pipeline.loading.stream import SEQUENTIAL, open_stream
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.intensity import zscore
from infra.errors import LoaderError, UserError, nearest

Rows = np.ndarray[Any, np.dtype[np.int64]]
READERS = ("index", *SEQUENTIAL)
FEW_BAD = 3  # so many bad scans never stop a run, however small the data set


class TwoViewLoader:
    """Endless batches of one rank.

    Each is a dict: ``views`` (2, B, 1, D, H, W) float32 on ``device``, z-scored and augmented; ``proxies`` (B, P) float32,
    NaN where missing; ``scan`` (B,) int64 row numbers of scans.parquet. B is this rank's share of ``global_batch``.

    With ``reader="index"`` which scans a step sees and what happens to them depends on (seed, step) alone: the ranks'
    batches together are the same for every world size, and ``start_step`` or ``load_state_dict`` continue as if nothing
    had been interrupted. ``stream`` and ``dali`` (data_pipeline.loading.stream) read shards from front to back; they continue
    exactly too, but only on as many ranks.

    A scan that cannot be read (checksum, short read) is named on stderr, counted in ``bad_scans``, and replaced by the
    next in order; ``scan`` and ``proxies`` name the one delivered. LoaderError where bad scans are more than a few (3)
    and more than ``max_bad_share`` of those that this rank has seen.

    ``wait_seconds`` is how long the last ``next`` took: the time that training stood still for data.

    Where DALI augments on the CPU and reader processes read, a thread takes the next batch over from DALI while the
    training is at this one; it holds one batch more.

    Memory: reader processes hold ``prefetch + 1`` steps in shared memory (``shared_bytes``: a scan's float16 voxels, and
    as much for the noise of each view, that is 12.7 MB a scan at 121 x 145 x 121); DALI holds ``prefetch`` batches of
    inputs and views.

    Args:
        rows: the scans to draw from, as ``Manifest.rows`` gives them.
        augmentation: a preset's name, a recipe's section, or an ``Augmentation``.
        device: where DALI augments, ``cpu`` or ``gpu`` (the current CUDA device).
        workers: processes that read, check and decode ahead; 0 reads in this process. The sequential readers use one.
        prefetch: steps that are read, and batches that are augmented, ahead of the training.
        order: an order over places in ``rows`` (data_pipeline.loading.balance); default: every scan once an epoch. Index only.
        buffer: scans held for shuffling by the sequential readers.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rows: Rows,
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
    ) -> None:
        _check(rows, device, reader, order)
        settings = augmentation if isinstance(augmentation, Augmentation) else load_augmentation(augmentation)
        d, h, w = (int(n) for n in manifest.grid["shape"])
        self._source: Source
        if reader == "index":
            order = order or EveryScan(len(rows), seed, global_batch)
            self._source = IndexSource(
                manifest.reader(), rows, order, (d, h, w), settings, seed, global_batch, rank, world_size
            )
        else:
            self._source = open_stream(
                manifest, rows, reader, settings, seed=seed, batch=global_batch, rank=rank, world_size=world_size,
                buffer=buffer,
            )  # fmt: skip
        self._fixed = {"seed": seed, "global_batch": global_batch, "scans": len(rows), "reader": reader}
        self._fixed |= {"positions": order.length} if order else {"world_size": world_size, "buffer": buffer}
        self._proxies = manifest.proxies(proxies)
        self._bad = BadScans(manifest, max_bad_share, len(rows), rank)
        self._options: dict[str, Any] = {
            "batch": self._source.count(), "device": device, "threads": threads, "prefetch": prefetch,
        }  # fmt: skip
        self._workers = workers if reader == "index" else min(workers, 1)
        self._readers: Readers | None = None
        self._pipeline: Any = None
        # On a GPU DALI works ahead by itself, on a stream of its own; without reader processes a thread would read.
        self._threaded = device == "cpu" and self._workers > 0
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Future[torch.Tensor] | None = None
        self._delivered: dict[int, Rows] = {}
        self.step = start_step
        self.wait_seconds = 0.0

    @property
    def bad_scans(self) -> int:
        """Scans of this rank that could not be read since the loader was made; each is counted once."""
        return len(self._bad.rows)

    @property
    def shared_bytes(self) -> int:
        """Shared memory between this process and its readers; 0 where there are none or they have not started."""
        return self._readers.bytes if isinstance(self._readers, ReaderProcesses) else 0

    @property
    def reader_pids(self) -> list[int]:
        """Process ids of the readers."""
        return self._readers.pids if isinstance(self._readers, ReaderProcesses) else []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if self._pipeline is None:
            self._open()
        if self._thread is None:
            views = self._pipeline.run()
        else:
            views = (self._coming or self._thread.submit(self._pipeline.run)).result()
            self._coming = self._thread.submit(self._pipeline.run)
        rows = self._delivered.pop(self.step)
        self.step += 1
        self.wait_seconds = time.perf_counter() - started
        return {
            "views": views,
            "proxies": torch.from_numpy(self._proxies[rows]),
            "scan": torch.from_numpy(rows.copy()),
        }

    def _open(self) -> None:
        from data_pipeline.loading.dali_graph import AugmentPipeline

        first, source = self.step, self._source
        if self._workers:
            self._readers = ReaderProcesses(
                source, workers=self._workers, first_step=first, depth=self._options["prefetch"]
            )
        else:
            self._readers = Here(source)
        self._pipeline = AugmentPipeline(
            lambda iteration: self._read(first + iteration), source.settings, shape=source.shape, **self._options
        )
        if self._threaded:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def _read(self, step: int) -> list[list[Any]]:
        """What the graph takes for a step; DALI asks for it some steps before it gives the batch."""
        assert self._readers is not None
        samples = self._readers.get(step)
        self._bad.see(step, samples)
        self._delivered[step] = np.array([sample.row for sample in samples], dtype=np.int64)
        return [sample.arrays for sample in samples]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the next step, and what together with it decides all that follows."""
        return {"step": self.step, **self._fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step that ``state_dict`` named; the indexed reader on any world size.

        UserError where something is different that decides the order (seed, global batch, number of scans, reader; for
        the sequential readers the number of ranks and the buffer too).
        """
        for key, mine in self._fixed.items():
            if state.get(key, mine) != mine:
                why = ": a sequential reader's order depends on it" if key in ("world_size", "buffer") else ""
                raise UserError(
                    f"loader state has {key}={state[key]}, this loader {mine}{why}; resume with the old value"
                )
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Stop reader processes and free DALI's buffers; the next batch starts them again."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)  # nobody may be at the graph when it goes
        self._thread = self._coming = None
        if self._pipeline is not None:
            self._pipeline.close()
        if self._readers is not None:
            self._readers.close()
        self._pipeline = self._readers = None
        self._delivered.clear()


class Readers(Protocol):
    """What reads steps one after the other: reader processes, or this process itself."""

    def get(self, step: int) -> list[Sample]:
        """The samples of the next step."""

    def close(self) -> None:
        """Stop."""


class Here:
    """Reads in this process, when asked."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def get(self, step: int) -> list[Sample]:
        """The samples of a step."""
        return list(self._source.samples(step, range(self._source.count())))

    def close(self) -> None:
        """Nothing to stop."""


class BadScans:
    """Names, counts and bounds the scans that cannot be read."""

    def __init__(self, manifest: Manifest, share: float, scans: int, rank: int) -> None:
        self.rows: set[int] = set()
        self._manifest, self._share, self._scans, self._rank = manifest, share, scans, rank
        self._seen = 0

    def see(self, step: int, samples: Sequence[Sample]) -> None:
        """Take note of a step; LoaderError once bad scans are too many."""
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
        if len(self.rows) > max(FEW_BAD, self._share * seen):
            raise LoaderError(
                f"{len(self.rows)} of the first {seen} scans cannot be read, more than data.max_bad_share="
                f"{self._share:g} allows; run `yaware shards verify {self._manifest.root}`"
            )

    def _name(self, row: int, reason: str) -> str:
        scan = self._manifest.scans.iloc[row]
        if str(scan["key"]) in reason:
            return reason
        return f"shard {self._manifest.shards[int(scan['shard'])]['name']}, scan {scan['key']}: {reason}"


def _check(rows: Rows, device: str, reader: str, order: Order | None) -> None:
    if device not in ("cpu", "gpu") or (device == "gpu" and not torch.cuda.is_available()):
        raise UserError(f"device={device!r} cannot be used here; allowed: cpu" + ", gpu" * torch.cuda.is_available())
    if len(rows) == 0:
        raise UserError("no scan to load; choose splits or a query that leave some")
    if reader not in READERS:
        raise UserError(f"data.reader={reader!r} is not known{nearest(reader, READERS)}; allowed: {', '.join(READERS)}")
    if order is not None and not isinstance(order, EveryScan) and reader != "index":
        raise UserError(f"data.balance needs data.reader: index, found {reader}: a sequential reader has no such order")


def volumes(manifest: Manifest, rows: Rows, batch_size: int) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Scans without augmentation, z-scored as in training: (rows (B,), (B, 1, D, H, W) float32) until all are given."""
    reader = manifest.reader()
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        yield part, torch.from_numpy(np.stack([zscore(reader.read(int(row)))[None] for row in part]))
