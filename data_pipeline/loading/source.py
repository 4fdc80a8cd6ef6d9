"""Reads the scans of a step and draws their augmentation parameters: the indexed reader, which is the default.

A source returns a rank's scans of a step as ``Sample``. The result depends only on the step, so any process may produce any
part of any step, and may do so again (``data_pipeline.loading.reader_processes``). This module does not import torch, so that
reader processes start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from data_pipeline.loading.augment import Augmentation, draw_view, view_arrays
from data_pipeline.loading.augmentations.operator import ViewContext
from data_pipeline.loading.order import Order, batch_of, rank_slice, replacements
from data_pipeline.storage.reader import VolumeReader
from infra.errors import LoaderError

# If so many replacements in a row are unreadable too, the cause is not a single scan: the shards are gone or unreadable.
MAX_REPLACEMENTS = 20


class Sample(NamedTuple):
    """One scan of a batch."""

    row: int  # row number in scans.parquet; the replacement's if the planned scan was unreadable
    bad: list[tuple[int, str]]  # row number and reason of each unreadable scan that this one replaces
    shown: int  # how often the scan was shown before: the epoch from which its views are drawn
    arrays: list[NDArray[Any]]  # the graph's inputs: voxels (D, H, W, 1) float16, then both views' arrays


class Source(Protocol):
    """Produces a rank's samples."""

    settings: Augmentation
    shape: tuple[int, int, int]

    def count(self) -> int:
        """Return the number of scans in a step of this rank."""

    def samples(self, step: int, positions: Sequence[int]) -> Iterable[Sample]:
        """Return the samples at some positions (0..count-1) of a step."""


@dataclass(frozen=True)
class ViewSampler:
    """Draws the parameters of both views of a scan."""

    settings: Augmentation
    shape: tuple[int, int, int]
    seed: int

    def arrays(self, voxels: Any, scan: int, epoch: int) -> list[Any]:
        """Return the graph's inputs for one scan: its voxels (D, H, W, 1), then both views' arrays.

        Args:
            voxels: (D, H, W) float16.
            scan: row number of the scan.
            epoch: how often the scan was shown before.
        """
        context = ViewContext(self.shape, self.seed)
        arrays: list[Any] = [voxels[..., None]]
        for number in range(2):
            view = draw_view(self.settings, self.shape, seed=self.seed, epoch=epoch, scan=scan, view=number)
            arrays += view_arrays(self.settings, view, context)
        return arrays


def sample_bytes(settings: Augmentation, shape: tuple[int, ...]) -> int:
    """Return the most bytes that a sample's arrays take: the scan, both views' volumes (noise), and small arrays."""
    volumes = 1 + 2 * sum(step.volumes for step in settings.steps)
    return volumes * 2 * int(np.prod(shape)) + 8 * sum(shape) + 8192


@dataclass(kw_only=True)
class IndexSource:
    """Reads each scan at its offset in its shard, in the order of ``order``, which is the same for every number of ranks."""

    reader: VolumeReader
    rows: NDArray[np.int64]
    order: Order
    shape: tuple[int, int, int]
    settings: Augmentation
    seed: int
    batch: int
    rank: int
    world_size: int

    @cached_property
    def view_sampler(self) -> ViewSampler:
        """Draws the augmentation parameters."""
        return ViewSampler(self.settings, self.shape, self.seed)

    def count(self) -> int:
        """Return the number of scans in a step of this rank."""
        own = rank_slice(self.batch, self.rank, self.world_size)
        return int(own.stop - own.start)

    def samples(self, step: int, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at some positions of a step; an unreadable scan is replaced by the next readable candidate.

        Raises LoaderError if ``MAX_REPLACEMENTS`` candidates are unreadable too.
        """
        numbers, shown = batch_of(self.order, step, self.batch)
        first = rank_slice(self.batch, self.rank, self.world_size).start
        for position in positions:
            place = first + position
            yield self._sample(step, place, int(numbers[place]), int(shown[place]))

    def _sample(self, step: int, place: int, planned: int, shown: int) -> Sample:
        bad: list[tuple[int, str]] = []
        row = int(self.rows[planned])
        voxels = read_or_reason(self.reader, row, self.shape)
        if isinstance(voxels, str):
            bad.append((row, voxels))
            for number in islice(replacements(self.order, step, self.batch, place), MAX_REPLACEMENTS):
                row = int(self.rows[number])
                voxels = read_or_reason(self.reader, row, self.shape)
                if not isinstance(voxels, str):
                    break
                bad.append((row, voxels))
            else:
                raise too_many_unreadable(step, bad)
        return Sample(row, bad, shown, self.view_sampler.arrays(voxels, row, shown))


def too_many_unreadable(step: int, bad: Sequence[tuple[int, str]]) -> LoaderError:
    """Return the error for a scan whose replacements are all unreadable; ``bad`` holds rows and reasons."""
    return LoaderError(f"step {step}: {len(bad)} scans in a row cannot be read; the first: {bad[0][1]}")


def read_or_reason(reader: VolumeReader, row: int, shape: tuple[int, ...]) -> Any:
    """Return a scan's (D, H, W) float16 voxels, or, as a string, the reason why it cannot be used."""
    try:
        voxels = reader.read(row)
    except (OSError, ValueError, zstandard.ZstdError) as error:
        return " ".join(str(error).split())
    return check_voxels(voxels, shape)


def check_voxels(voxels: Any, shape: tuple[int, ...]) -> Any:
    """Return ``voxels`` if they are float16 and have the grid's shape, else a string with the reason."""
    if voxels.shape != shape or voxels.dtype != np.float16:
        return f"holds {voxels.dtype} voxels of shape {voxels.shape}, not float16 {shape}"
    return voxels
