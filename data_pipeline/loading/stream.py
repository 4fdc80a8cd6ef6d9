"""Sequential readers: ``data.reader: stream`` (the webdataset library) and ``dali`` (DALI's own webdataset reader).

They read whole shards from front to back, while the indexed reader seeks to every scan; this suits disks and networks with
slow seeks. In return, scans are mixed only by the build, which shuffles them over the shards, and by a buffer of ``buffer``
scans; the order depends on the number of ranks, so a run can be resumed only on as many ranks as it began with; and balanced
orders are not available. The batches have the same contents: views, proxies from the manifest, row numbers.

For each epoch the shards are put in random order. The chosen scans in them, in file order, are divided among the ranks in
contiguous parts whose sizes differ by at most one, so each rank sees its part once and all ranks together see every scan
once. Resuming at a step reads the rank's part of that epoch from its start up to the step, and is exact.

Every scan is compared with its checksum in the manifest. Neither reader looks at the other bytes of a tar (headers, .json
members, padding); ``yaware shards verify`` does.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data_pipeline.loading.augment import Augmentation
from data_pipeline.loading.order import rank_slice
from data_pipeline.loading.source import (
    MAX_REPLACEMENTS,
    Sample,
    ViewSampler,
    check_voxels,
    read_or_reason,
    too_many_unreadable,
)
from data_pipeline.shards.tar import CODECS, decode
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.reader import VolumeReader
from data_pipeline.storage.remote import is_remote
from infra.errors import UserError
from infra.processes.scratch import scratch_folder
from infra.random_streams import SHARD_ORDER, buffer_seed, generator


class StreamedMember(NamedTuple):
    """The payload of a scan in a tar: its file name, its offset and its size in bytes."""

    name: str
    offset: int
    size: int


# A shard's path, and those of its members that a rank reads, in file order.
ShardPart = tuple[str, list[StreamedMember]]


@dataclass(kw_only=True)
class StreamSource:
    """A rank's samples from a sequential reader, step after step; a jump to another step starts that epoch's part again.

    ``keys``, ``rows``, ``shard``, ``offset``, ``size`` and ``crc32c`` have a value for each chosen scan.
    """

    kind: str  # a key of SEQUENTIAL
    root: str
    shards: list[str]
    keys: list[str]
    rows: NDArray[np.int64]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    codec: str
    reader: VolumeReader  # the indexed reader, for replacements
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
        return {**self.__dict__, "_position": -1, "_scans": None}  # another process starts from the beginning

    @cached_property
    def view_sampler(self) -> ViewSampler:
        """Draws the augmentation parameters."""
        return ViewSampler(self.settings, self.shape, self.seed)

    def count(self) -> int:
        """Return the number of scans in a step of this rank."""
        own = rank_slice(self.batch, self.rank, self.world_size)
        return int(own.stop - own.start)

    @property
    def scans_per_epoch(self) -> int:
        """Number of scans that this rank reads in an epoch."""
        own = rank_slice(len(self.rows), self.rank, self.world_size)
        return int(own.stop - own.start)

    def sequence(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices (n,) into ``rows`` of this rank's part of an epoch, in the order in which they are read."""
        position = generator(self.seed, SHARD_ORDER, (0, epoch, 0, 0)).permutation(len(self.shards))
        order: NDArray[np.int64] = np.lexsort((self.offset, position[self.shard]))
        return order[rank_slice(len(self.rows), self.rank, self.world_size)]

    def samples(self, step: int, positions: Sequence[int]) -> list[Sample]:
        """Return all samples of a step; ``positions`` must be all of them.

        An unreadable scan is replaced by the next scan of this rank's part that is not in the batch. Raises LoaderError if
        ``MAX_REPLACEMENTS`` of them are unreadable too.
        """
        assert list(positions) == list(range(self.count())), "several processes cannot share a sequential reader"
        first = step * self.count()
        scans = [self._next(first + position) for position in positions]
        in_batch = {row for row, _, _ in scans}
        samples = []
        for row, epoch, voxels in scans:
            bad: list[tuple[int, str]] = []
            if isinstance(voxels, str):
                bad.append((row, voxels))
                row, voxels = self._replacement(step, row, epoch, in_batch, bad)
            samples.append(Sample(row, bad, epoch, self.view_sampler.arrays(voxels, row, epoch)))
        return samples

    def _next(self, position: int) -> tuple[int, int, Any]:
        """Return row, epoch, and voxels or the reason of the scan at a position of this rank's endless stream."""
        epoch, place = divmod(position, self.scans_per_epoch)
        if position != self._position or place == 0:
            self._scans = self._payloads(epoch)
            for _ in range(place):
                next(self._scans)
        self._position = position + 1
        index, payload = next(self._scans)
        return int(self.rows[index]), epoch, payload if isinstance(payload, str) else self._decoded(index, payload)

    def _payloads(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """Yield every scan of an epoch's part once: index into ``rows``, and stored bytes or the reason for their absence.

        Scans that the reader did not return come last.
        """
        parts: list[ShardPart] = []
        missing: dict[str, int] = {}
        for index in self.sequence(epoch).tolist():
            path = f"{self.root}/{self.shards[int(self.shard[index])]}"
            name = f"{self.keys[index]}.{CODECS[self.codec]}"
            missing[name] = index
            if not parts or parts[-1][0] != path:
                parts.append((path, []))
            parts[-1][1].append(StreamedMember(name, int(self.offset[index]), int(self.size[index])))
        reason = "is not in its shard, or the shard is damaged before it"
        read, seed = SEQUENTIAL[self.kind], buffer_seed(self.seed, epoch)
        try:
            for name, payload in read(parts, CODECS[self.codec], self.buffer, seed):
                if name in missing:
                    yield missing.pop(name), payload
        except (OSError, RuntimeError) as error:
            # After one error DALI's reader is unusable. The remaining scans count as unreadable, which soon stops the run.
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = f"was not read: data.reader={self.kind} failed: {lines[-1] if lines else error}"
        for index in list(missing.values()):
            yield index, f"{self._name(index)} {reason}"

    def _name(self, index: int) -> str:
        return f"shard {self.shards[int(self.shard[index])]}, scan {self.keys[index]}"

    def _decoded(self, index: int, payload: Any) -> Any:
        content = bytes(payload)
        if len(content) != self.size[index] or google_crc32c.value(content) != self.crc32c[index]:
            return f"{self._name(index)} fails its checksum"
        return check_voxels(decode(content, self.codec, self.reader.orientation, self.reader.voxels), self.shape)

    def _replacement(
        self, step: int, row: int, epoch: int, in_batch: set[int], bad: list[tuple[int, str]]
    ) -> tuple[int, Any]:
        """Return row and voxels of the scan that replaces ``row``; unreadable candidates are added to ``bad``."""
        rows = self.rows[self.sequence(epoch)]
        following = np.roll(rows, -1 - int(np.flatnonzero(rows == row)[0])).tolist()
        for candidate in [r for r in following if r not in in_batch][:MAX_REPLACEMENTS]:
            voxels = read_or_reason(self.reader, candidate, self.shape)
            if not isinstance(voxels, str):
                in_batch.add(candidate)
                return candidate, voxels
            bad.append((candidate, voxels))
        raise too_many_unreadable(step, bad)


def _by_webdataset(parts: list[ShardPart], extension: str, buffer: int, seed: int) -> Iterator[tuple[str, Any]]:
    from webdataset import DataPipeline, SimpleShardList, shuffle
    from webdataset.tariterators import group_by_keys, url_opener

    wanted = {member.name: member.size for _, members in parts for member in members}

    def skip(_: Exception) -> bool:
        """Skip the rest of a damaged shard; the caller notices which scans are missing."""
        return True

    pipeline = DataPipeline(
        SimpleShardList([path for path, _ in parts]), lambda paths: url_opener(paths, handler=skip),
        lambda tars: _wanted_members(tars, wanted), lambda members: group_by_keys(members, handler=skip),
        shuffle(buffer, initial=buffer, rng=random.Random(seed)),
    )  # fmt: skip
    for sample in pipeline:
        if extension in sample:
            yield f"{sample['__key__']}.{extension}", sample[extension]


def _wanted_members(tars: Iterable[dict[str, Any]], wanted: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield name and bytes of the wanted members (name -> size) of some opened tars; an empty one ends each tar.

    The library's own stage reads whatever size a member's header claims, also a sparse one of a terabyte.
    """
    for opened in tars:
        with suppress(tarfile.TarError, EOFError, OSError), tarfile.open(fileobj=opened["stream"], mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise the headers of the whole tar are kept
                if member.isreg() and not member.issparse() and member.size == wanted.get(member.name):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield {"fname": member.name, "data": content.read(), "__url__": opened["url"]}
        yield {}


def _by_dali(parts: list[ShardPart], extension: str, buffer: int, seed: int) -> Iterator[tuple[str, Any]]:
    from data_pipeline.loading.dali_graph import read_members

    with scratch_folder("index") as folder:
        indexes = []
        for number, (_, members) in enumerate(parts):
            lines = [f"{extension} {member.offset} {member.size} {member.name}\n" for member in members]
            indexes.append(f"{folder}/{number}.idx")
            Path(indexes[-1]).write_text(f"v1.2 {len(members)}\n" + "".join(lines))
        archives = [path for path, _ in parts]
        for origin, payload in read_members(archives, indexes, extension, buffer, seed % (1 << 31)):
            yield origin.rsplit(":", 1)[1], payload


SEQUENTIAL: dict[str, Callable[[list[ShardPart], str, int, int], Iterator[tuple[str, Any]]]] = {
    "stream": _by_webdataset, "dali": _by_dali,
}  # fmt: skip
"""``data.reader`` -> ``read(parts, extension, buffer, seed)``, which yields member name and stored bytes."""


def open_stream(
    manifest: Manifest, rows: NDArray[np.int64], kind: str, settings: Augmentation, *,
    seed: int, batch: int, rank: int, world_size: int, buffer: int,
) -> StreamSource:  # fmt: skip
    """Return a rank's sequential source of the scans ``rows``.

    Args:
        manifest: the data set.
        rows: row numbers of the scans, (n,).
        kind: ``stream`` or ``dali``.
        settings: the augmentation.
        seed: of the run.
        batch: the global batch.
        rank: of this process.
        world_size: number of ranks.
        buffer: number of scans held for shuffling.

    Raises:
        UserError: if the shards' codec is not supported, the shards are remote, scans are to be kept unpacked, or there are
            fewer scans than ranks.
    """
    codec = str(manifest.settings["codec"])
    if codec not in CODECS:
        raise UserError(
            f"data.reader={kind} reads shards of codec {', '.join(CODECS)}; these have {codec}: set data.reader=index"
        )
    if is_remote(manifest.shards_root):
        raise UserError(
            f"data.reader={kind} reads local shards; these are at {manifest.shards_root}: set data.reader=index"
        )
    if manifest.access.unpacked is not None:
        raise UserError(
            f"data.cache_unpacked needs data.reader: index, found {kind}, which reads whole shards; leave it out"
        )
    if len(rows) < world_size:
        raise UserError(
            f"data.reader={kind}: {len(rows)} scans cannot be divided among {world_size} ranks; set data.reader=index"
        )
    scans = manifest.scans.iloc[rows]
    shard, offset, size, crc = (scans[name].to_numpy(dtype=np.int64) for name in ("shard", "offset", "size", "crc32c"))
    d, h, w = (int(n) for n in manifest.grid["shape"])
    return StreamSource(
        kind=kind, root=manifest.shards_root, shards=[str(row["name"]) for row in manifest.shards],
        keys=[str(key) for key in scans["key"]], rows=rows, shard=shard, offset=offset, size=size, crc32c=crc, codec=codec,
        reader=manifest.reader(), shape=(d, h, w), settings=settings, seed=seed, batch=batch, rank=rank,
        world_size=world_size, buffer=buffer,
    )  # fmt: skip
