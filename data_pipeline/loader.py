"""Batches: two augmented views of each scan of this rank's share of the global batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import Augmentation, draw_view, load_augmentation, noise_bank
from data_pipeline.manifest import Manifest, VolumeReader
from data_pipeline.order import global_batch, rank_slice
from data_pipeline.volume import zscore
from infra.errors import UserError

Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class ViewSource:
    """DALI's source of one scan and both views' parameters: a pure function of the sample's place in the run.

    It is pickled into worker processes, so it holds arrays and a reader rather than the manifest's table.
    """

    reader: VolumeReader
    rows: Rows
    shape: tuple[int, int, int]
    settings: Augmentation
    seed: int
    batch: int
    rank: int
    world_size: int
    first_step: int

    @cached_property
    def bank(self) -> Any:
        """The noise, made once in each process."""
        return noise_bank(self.shape, self.seed)[..., None]

    def __call__(self, sample: Any) -> tuple[Any, ...]:
        from data_pipeline.dali_graph import view_arrays

        numbers, epochs = self.scans(self.first_step + sample.iteration)
        row, epoch = int(numbers[sample.idx_in_batch]), int(epochs[sample.idx_in_batch])
        out: list[Any] = [self.reader.read(row)[..., None]]
        for number in range(2):
            view = draw_view(self.settings, self.shape, self.seed, epoch, row, number)
            noise = None
            if self.settings.noise.p > 0:
                (d, h, w), (nd, nh, nw) = view.noise_from, self.shape
                noise = np.ascontiguousarray(self.bank[d : d + nd, h : h + nh, w : w + nw])
            out += view_arrays(self.settings, view, noise)
        return tuple(out)

    def scans(self, step: int) -> tuple[Rows, Rows]:
        """This rank's row numbers of scans.parquet at a step, and their epochs."""
        numbers, epochs = global_batch(len(self.rows), self.seed, step, self.batch)
        part = rank_slice(self.batch, self.rank, self.world_size)
        return self.rows[numbers[part]], epochs[part]


class TwoViewLoader:
    """Endless batches of one rank.

    Each is a dict: ``views`` (2, B, 1, D, H, W) float32 on ``device``, z-scored and augmented; ``proxies`` (B, P) float32,
    NaN where missing; ``scan`` (B,) int64 row numbers of scans.parquet. B is this rank's share of ``global_batch``.

    Which scans a step sees and what happens to them depends on (seed, step) alone: the ranks' batches together are the
    same for every world size, and ``start_step`` or ``load_state_dict`` continue as if nothing had been interrupted.

    Args:
        rows: the scans to draw from, as ``Manifest.rows`` gives them.
        augmentation: a preset's name, a recipe's section, or an ``Augmentation``.
        device: where DALI augments, ``cpu`` or ``gpu`` (the current CUDA device).
        workers: processes that read and decode ahead; 0 reads in this process.
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
    ) -> None:
        if device not in ("cpu", "gpu") or (device == "gpu" and not torch.cuda.is_available()):
            raise UserError(
                f"device={device!r} cannot be used here; allowed: cpu" + ", gpu" * torch.cuda.is_available()
            )
        if len(rows) == 0:
            raise UserError("no scan to load; choose splits or a query that leave some")
        settings = augmentation if isinstance(augmentation, Augmentation) else load_augmentation(augmentation)
        d, h, w = (int(n) for n in manifest.grid["shape"])
        self._source = ViewSource(
            manifest.reader(), rows, (d, h, w), settings, seed, global_batch, rank, world_size, start_step
        )
        self._proxies = manifest.proxies(proxies)
        self._graph_settings: dict[str, Any] = {
            "batch": len(self._source.scans(0)[0]), "device": device, "threads": threads, "workers": workers,
            "prefetch": prefetch,
        }  # fmt: skip
        self._pipeline: Any = None
        self.step = start_step
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if self._pipeline is None:
            from data_pipeline.dali_graph import AugmentPipeline

            self._source.first_step = self.step
            self._pipeline = AugmentPipeline(self._source, self._source.settings, **self._graph_settings)
        views = self._pipeline.run()
        rows, _ = self._source.scans(self.step)
        self.step += 1
        self.wait_seconds = time.perf_counter() - started
        return {
            "views": views,
            "proxies": torch.from_numpy(self._proxies[rows]),
            "scan": torch.from_numpy(rows.copy()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the next step, and what together with it decides all that follows."""
        source = self._source
        return {"step": self.step, "seed": source.seed, "global_batch": source.batch, "scans": len(source.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step that ``state_dict`` named, on whatever world size this loader has.

        UserError where seed, global batch or number of scans are others: the order would be another one.
        """
        for key, mine in self.state_dict().items():
            if key != "step" and state.get(key, mine) != mine:
                raise UserError(f"loader state has {key}={state[key]}, this loader {mine}; resume with the old value")
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Stop worker processes and free DALI's buffers; the next batch starts them again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None


def volumes(manifest: Manifest, rows: Rows, batch_size: int) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Scans without augmentation, z-scored as in training: (rows (B,), (B, 1, D, H, W) float32) until all are given."""
    reader = manifest.reader()
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        yield part, torch.from_numpy(np.stack([zscore(reader.read(int(row)))[None] for row in part]))
