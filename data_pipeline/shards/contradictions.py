"""Where the scan table and the tars contradict each other, although every file has the checksum that the manifest names.

A build cannot make such a data set, but a manifest that somebody else wrote can be wrong in every number.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import google_crc32c

from data_pipeline.shards.damage import Stored
from data_pipeline.storage.hashing import HashingStream
from data_pipeline.volume.decoders import ENDINGS
from infra.files import open_file, regular_file

BLOCK = 1 << 22
FAULTS = (tarfile.TarError, EOFError, ValueError)
Member = tuple[str, int, int, int]  # name, offset, size, crc32c


def members_of(path: Path) -> tuple[list[Member], str]:
    """Return the files of a local tar with the checksums of their content, and what is wrong with the tar after them."""
    places, fault = list[tuple[str, int, int]](), ""
    try:
        with tarfile.open(regular_file(path), "r:") as tar:
            places += ((m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse())
    except FAULTS as error:
        fault = f"is not a whole tar: {error}"
    with open_file(path) as stream:
        return [(name, offset, size, _checksum(stream, offset, size)) for name, offset, size in places], fault


def members_of_stream(stream: HashingStream) -> tuple[list[Member], str]:
    """As ``members_of``, for a tar that is read once from its beginning to its end."""
    members, fault = list[Member](), ""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.isreg() and not member.issparse():
                    checksum, content = google_crc32c.Checksum(), tar.extractfile(member)
                    while content is not None and (block := content.read(BLOCK)):
                        checksum.update(block)
                    crc = int.from_bytes(checksum.digest(), "big")
                    members.append((member.name, member.offset_data, member.size, crc))
    except FAULTS as error:
        fault = f"is not a whole tar: {error}"
    while stream.read(BLOCK):
        pass
    return members, fault


def _checksum(stream: IO[bytes], offset: int, size: int) -> int:
    """Return the crc32c of a range, read block by block; a range that ends after the file has the crc32c of what is there."""
    checksum, done = google_crc32c.Checksum(), 0
    while done < size and (block := os.pread(stream.fileno(), min(BLOCK, size - done), offset + done)):
        checksum.update(block)
        done += len(block)
    return int.from_bytes(checksum.digest(), "big")


def contradictions(members: list[Member], scans: list[Stored], indexed: bool) -> list[str]:
    """Return one line for each scan whose row differs from the tar, and for each volume of the tar without a row.

    Args:
        members: the files of the tar.
        scans: the rows of the table for this shard.
        indexed: whether the tar was made elsewhere: keys may then be named otherwise, and some volumes may be left out.
    """
    volumes = {offset: (name, size, crc) for name, offset, size, crc in members if _is_volume(name)}
    return [*_wrong_rows(volumes, scans, indexed), *([] if indexed else _unlisted(volumes, scans))]


def _wrong_rows(volumes: dict[int, tuple[str, int, int]], scans: list[Stored], indexed: bool) -> Iterator[str]:
    seen: set[int] = set()
    for scan in scans:
        name, size, crc = volumes.get(scan.offset, ("", 0, 0))
        if not name:
            yield f"scan {scan.key}: no volume begins at offset {scan.offset}"
        elif scan.offset in seen:
            yield f"scan {scan.key}: another row has the same offset {scan.offset}"
        elif not indexed and name.partition(".")[0] != scan.key:
            yield f"scan {scan.key}: the volume at offset {scan.offset} is {name}"
        elif size != scan.size:
            yield f"scan {scan.key}: size {scan.size}, the tar has {size}"
        elif crc != scan.crc32c:
            yield f"scan {scan.key}: crc32c {scan.crc32c}, the tar's content has {crc}"
        seen.add(scan.offset)


def _unlisted(volumes: dict[int, tuple[str, int, int]], scans: list[Stored]) -> Iterator[str]:
    listed = {scan.offset for scan in scans}
    yield from (f"{name} is not in the scan table" for offset, (name, _, _) in volumes.items() if offset not in listed)


def _is_volume(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in ENDINGS
