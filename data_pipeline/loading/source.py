"""Where a batch's voxels and augmentation parameters come from: the indexed reader, the default.

A source gives, for a step, this rank's scans as ``Sample``; what it gives is a pure function of the step, so any process
may be asked for any part of any step, again if need be (data_pipeline.loading.reader_processes). This module
needs no torch, so that reader processes start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import zstandard

from data_pipeline.loading.augment import Augmentation, draw_view, view_arrays
from data_pipeline.loading.augmentations.operator import ViewContext
from data_pipeline.loading.order import Indices, Order, batch_of, rank_slice, replacements
from infra.errors import LoaderError

# A scan so unlucky that this many stand-ins are bad too is no accident: the shards are gone or cannot be read.
MOST_STAND_INS = 20


class Sample(NamedTuple):
    """One scan as delivered."""

    row: int  # of scans.parquet; the stand-in's where the planned scan was bad
    bad: list[tuple[int, str]]  # row and reason of each scan that was to come here and could not be read
    arrays: list[Any]  # (D, H, W, 1) float16, then both views' numbers (augment.view_arrays)


class Source(Protocol):
    """What gives a rank's samples."""

    settings: Augmentation
    shape: tuple[int, int, int]

    def count(self) -> int:
        """Scans of a step on this rank."""

    def samples(self, step: int, places: Sequence[int]) -> Iterable[Sample]:
        """The samples at some places (0..count-1) of a step."""


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


@dataclass
class IndexSource:
    """Reads each scan by its place in its shard, in the order of ``order``; the same whatever the number of ranks."""

    reader: Any  # Manifest.reader()
    rows: Indices
    order: Order
    shape: tuple[int, int, int]
    settings: Augmentation
    seed: int
    batch: int
    rank: int
    world_size: int

    @cached_property
    def views(self) -> ViewSampler:
        """Draws parameters."""
        return ViewSampler(self.settings, self.shape, self.seed)

    def count(self) -> int:
        """Scans of a step on this rank."""
        part = rank_slice(self.batch, self.rank, self.world_size)
        return int(part.stop - part.start)

    def samples(self, step: int, places: Sequence[int]) -> Iterator[Sample]:
        """The samples at some places of a step; a bad scan's place is taken by the next in order that can be read."""
        numbers, shown = batch_of(self.order, step, self.batch)
        first = rank_slice(self.batch, self.rank, self.world_size).start
        for place in places:
            yield self._sample(step, first + place, int(numbers[first + place]), int(shown[first + place]))

    def _sample(self, step: int, place: int, planned: int, shown: int) -> Sample:
        bad: list[tuple[int, str]] = []
        row = int(self.rows[planned])
        voxels = read_or_reason(self.reader, row, self.shape)
        if isinstance(voxels, str):
            bad.append((row, voxels))
            for number in islice(replacements(self.order, step, self.batch, place), MOST_STAND_INS):
                row = int(self.rows[number])
                voxels = read_or_reason(self.reader, row, self.shape)
                if not isinstance(voxels, str):
                    break
                bad.append((row, voxels))
            else:
                raise LoaderError(f"step {step}: {len(bad)} scans one after the other cannot be read: {bad[0][1]}")
        return Sample(row, bad, self.views.arrays(voxels, row, shown))


def read_or_reason(reader: Any, row: int, shape: tuple[int, ...]) -> Any:
    """A scan's (D, H, W) float16 voxels, or, as a string, why it cannot be used."""
    try:
        voxels = reader.read(row)
    except (OSError, ValueError, zstandard.ZstdError) as error:
        return " ".join(str(error).split())
    return check_voxels(voxels, shape)


def check_voxels(voxels: Any, shape: tuple[int, ...]) -> Any:
    """``voxels`` if they are what the grid and the format say, else the reason why not."""
    if voxels.shape != shape or voxels.dtype != np.float16:
        return f"holds {voxels.dtype} voxels of shape {voxels.shape}, not float16 {shape}"
    return voxels
