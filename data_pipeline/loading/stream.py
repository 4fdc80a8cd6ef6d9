"""Sequential readers: ``data.reader: stream`` (the webdataset library) and ``dali`` (DALI's own webdataset reader).

They read whole shards from front to back, where the indexed reader seeks to every scan: kinder to discs and networks
that are slow to seek. The price: scans mix only as far as the shards (shuffled at build) and a buffer of ``buffer`` scans
mix them; the order depends on the number of ranks, so a run goes on only on as many ranks as it began with; and balanced
orders are not to be had. The batch's contract is the same: views, proxies from the manifest, row numbers.

An epoch's shards are put in an order drawn for the epoch; the chosen scans in them, in file order, are cut between the
ranks in parts that differ by at most one. So every rank sees its part once, all ranks together every scan once. Going on
at a step reads the rank's part of that epoch from its start up to the step, and is exact.

The manifest's checksum is compared for every scan. What it cannot tell: bytes of the tar outside the chosen scans (headers,
.json members, padding) are not looked at by either reader; `yaware shards verify` does that.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipeline.loading.augment import Augmentation
from data_pipeline.loading.order import Indices, rank_slice
from data_pipeline.loading.source import Sample, ViewSampler, check_voxels, read_or_reason
from data_pipeline.shards.tar import CODECS, decode
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import is_remote
from infra.errors import LoaderError, UserError
from infra.random_streams import SHARD_ORDER, generator

# (shard's path, [(row, member's name, offset, size)] in file order) for each shard of a rank's part.
Part = list[tuple[str, list[tuple[int, str, int, int]]]]


@dataclass
class StreamSource:
    """A rank's samples of a sequential reader, one step after the other; another step starts the epoch's part again."""

    kind: str
    root: str
    shards: list[str]
    keys: list[str]  # of the chosen scans, as the next four
    rows: Indices
    shard: Indices
    offset: Indices
    size: Indices
    crc32c: Indices
    codec: str
    reader: Any  # the indexed reader, for stand-ins
    shape: tuple[int, int, int]
    settings: Augmentation
    seed: int
    batch: int
    rank: int
    world_size: int
    buffer: int

    def __post_init__(self) -> None:
        self._position = -1
        self._scans: Iterator[tuple[int, Any]] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_position": -1, "_scans": None}  # a process of its own begins anew

    @cached_property
    def views(self) -> ViewSampler:
        """Draws parameters."""
        return ViewSampler(self.settings, self.shape, self.seed)

    def count(self) -> int:
        """Scans of a step on this rank."""
        part = rank_slice(self.batch, self.rank, self.world_size)
        return int(part.stop - part.start)

    @property
    def part_length(self) -> int:
        """Scans of this rank in an epoch."""
        part = rank_slice(len(self.rows), self.rank, self.world_size)
        return int(part.stop - part.start)

    def sequence(self, epoch: int) -> Indices:
        """Places in ``rows`` of this rank's part of an epoch, in the order in which they lie in the shards."""
        turn = generator(self.seed, SHARD_ORDER, (0, epoch, 0, 0)).permutation(len(self.shards))
        order = np.lexsort((self.offset, turn[self.shard]))
        return order[rank_slice(len(self.rows), self.rank, self.world_size)]

    def samples(self, step: int, places: Sequence[int]) -> list[Sample]:
        """All samples of a step (``places`` must be all); a bad scan's place is taken by one of this rank's part that
        is not in the batch: the first after the bad one in the shards."""
        assert list(places) == list(range(self.count())), "a sequential reader cannot be shared by processes"
        first = step * self.count()
        found = [self._next(first + place) for place in places]
        taken = {row for row, _, _ in found}
        samples = []
        for row, epoch, voxels in found:
            bad: list[tuple[int, str]] = []
            if isinstance(voxels, str):
                bad.append((row, voxels))
                row, voxels = self._stand_in(step, row, epoch, taken, bad)
            samples.append(Sample(row, bad, self.views.arrays(voxels, row, epoch)))
        return samples

    def _next(self, position: int) -> tuple[int, int, Any]:
        epoch, place = divmod(position, self.part_length)
        if position != self._position or place == 0:
            self._scans = self._payloads(epoch)
            for _ in range(place):
                next(self._scans)
        self._position = position + 1
        index, payload = next(self._scans)
        return int(self.rows[index]), epoch, payload if isinstance(payload, str) else self._decoded(index, payload)

    def _payloads(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """Every scan of an epoch's part once: (place in ``rows``, stored bytes), or, last, why it did not come."""
        part: Part = []
        known: dict[str, int] = {}
        for index in self.sequence(epoch).tolist():
            path = f"{self.root}/{self.shards[int(self.shard[index])]}"
            name = f"{self.keys[index]}.{CODECS[self.codec]}"
            known[name] = index
            if not part or part[-1][0] != path:
                part.append((path, []))
            part[-1][1].append((index, name, int(self.offset[index]), int(self.size[index])))
        reason = "is not in its shard, or what lies before it there is damaged"
        try:
            for name, payload in SEQUENTIAL[self.kind](
                part, CODECS[self.codec], self.buffer, (self.seed << 20) + epoch
            ):
                if name in known:
                    yield known.pop(name), payload
        except (OSError, RuntimeError) as error:
            # DALI's reader is beyond use after one error. What has not come yet counts as bad, which soon ends the run.
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = f"was not read: data.reader={self.kind} failed: {lines[-1] if lines else error}"
        for index in list(known.values()):
            yield index, f"shard {self.shards[int(self.shard[index])]}, scan {self.keys[index]} {reason}"

    def _decoded(self, index: int, payload: Any) -> Any:
        where = f"shard {self.shards[int(self.shard[index])]}, scan {self.keys[index]}"
        content = bytes(payload)
        if len(content) != self.size[index] or google_crc32c.value(content) != self.crc32c[index]:
            return f"{where} fails its checksum"
        return check_voxels(decode(content, self.codec, self.reader.orientation), self.shape)

    def _stand_in(
        self, step: int, row: int, epoch: int, taken: set[int], bad: list[tuple[int, str]]
    ) -> tuple[int, Any]:
        rows = self.rows[self.sequence(epoch)]
        after = np.roll(rows, -1 - int(np.flatnonzero(rows == row)[0])).tolist()
        for other in [r for r in after if r not in taken][:20]:
            voxels = read_or_reason(self.reader, other, self.shape)
            if not isinstance(voxels, str):
                taken.add(other)
                return other, voxels
            bad.append((other, voxels))
        raise LoaderError(f"step {step}: {len(bad)} scans one after the other cannot be read: {bad[0][1]}")


def _by_webdataset(part: Part, extension: str, buffer: int, seed: int) -> Iterator[tuple[str, Any]]:
    import webdataset

    wanted = {name for _, members in part for _, name, _, _ in members}
    # A shard that breaks off is left at the break; the caller finds what did not come.
    dataset = webdataset.WebDataset(
        [path for path, _ in part], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False,
        handler=lambda error: True, select_files=lambda name: name in wanted,
    ).shuffle(buffer, initial=buffer, rng=random.Random(seed))  # fmt: skip
    for sample in dataset:
        if extension in sample:
            yield f"{sample['__key__']}.{extension}", sample[extension]


def _by_dali(part: Part, extension: str, buffer: int, seed: int) -> Iterator[tuple[str, Any]]:
    from data_pipeline.loading.dali_graph import read_members

    with tempfile.TemporaryDirectory(prefix="yaware-index-") as folder:
        indexes = []
        for number, (_, members) in enumerate(part):
            lines = [f"{extension} {offset} {size} {name}\n" for _, name, offset, size in members]
            indexes.append(f"{folder}/{number}.idx")
            Path(indexes[-1]).write_text(f"v1.2 {len(members)}\n" + "".join(lines))
        archives = [path for path, _ in part]
        for origin, payload in read_members(archives, indexes, extension, buffer, seed % (1 << 31)):
            yield origin.rsplit(":", 1)[1], payload


SEQUENTIAL: dict[str, Callable[[Part, str, int, int], Iterator[tuple[str, Any]]]] = {
    "stream": _by_webdataset, "dali": _by_dali,
}  # fmt: skip


def open_stream(
    manifest: Manifest, rows: Indices, kind: str, settings: Augmentation, *,
    seed: int, batch: int, rank: int, world_size: int, buffer: int,
) -> StreamSource:  # fmt: skip
    """A rank's sequential source of the chosen scans; UserError where the shards are not of a codec that it decodes."""
    codec = str(manifest.settings["codec"])
    if codec not in CODECS:
        raise UserError(f"data.reader={kind} reads shards of codec {', '.join(CODECS)}; these are {codec}: use index")
    if is_remote(manifest.shards_root):
        raise UserError(f"data.reader={kind} reads local shards; these are at {manifest.shards_root}: use index")
    if len(rows) < world_size:
        raise UserError(f"data.reader={kind}: {len(rows)} scans cannot be cut between {world_size} ranks; use index")
    scans = manifest.scans.iloc[rows]
    shard, offset, size, crc = (scans[name].to_numpy(dtype=np.int64) for name in ("shard", "offset", "size", "crc32c"))
    d, h, w = (int(n) for n in manifest.grid["shape"])
    return StreamSource(
        kind, manifest.shards_root, [str(row["name"]) for row in manifest.shards], [str(key) for key in scans["key"]],
        rows, shard, offset, size, crc, codec, manifest.reader(), (d, h, w), settings, seed, batch, rank, world_size, buffer,
    )  # fmt: skip
