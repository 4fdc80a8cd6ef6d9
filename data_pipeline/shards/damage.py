"""Where in a shard bytes differ from those that the build wrote: which scan's voxels, description, header or padding."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from data_pipeline.shards.tar import CODECS

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Stored:
    """A scan as the table has it: where its voxels lie in the shard, and what is known about it."""

    key: str
    offset: int
    size: int
    crc32c: int
    row: dict[str, Any]


def find_damage(path: Path, size: int, scans: list[Stored], codec: str) -> list[str]:
    """What is damaged in a shard that should have ``size`` bytes and these scans, in the order of its bytes.

    Nothing is taken from the file itself: tar headers are made again from the scan table and compared byte by byte, voxels
    are checked by their crc32c, descriptions against the table.
    """
    found = []
    actual = path.stat().st_size
    if actual != size:
        found.append(f"{actual} bytes, the manifest says {size}")
    handle = os.open(path, os.O_RDONLY)
    try:
        end = 0
        for scan in scans:
            parts = [part for part, fine in _check_scan(handle, end, scan, codec) if not fine]
            if parts:
                cut = ", cut off" if scan.offset + scan.size > actual else ""
                found.append(f"scan {scan.key} ({', '.join(parts)} in bytes {end} to {_end(scan)}{cut})")
            end = _end(scan)
        tail = os.pread(handle, max(0, actual - end), end)
        if actual >= size and any(tail):
            found.append(f"the archive's end (bytes {end} to {actual})")
    finally:
        os.close(handle)
    return found


def _check_scan(handle: int, start: int, scan: Stored, codec: str) -> Iterator[tuple[str, bool]]:
    """Each part of a scan's two members with whether it is as it was: header, description, header, voxels, padding."""
    header = _header(f"{scan.key}.{CODECS[codec]}", scan.size)
    before = os.pread(handle, scan.offset - start, start)
    described, found_header = before[: -len(header)], before[-len(header) :]
    length = len(_header(f"{scan.key}.json", 0))
    text = described[length:].rstrip(b"\0")
    yield "header of its description", described[:length] == _header(f"{scan.key}.json", len(text))
    yield "description", _fits(text, scan.row)
    yield "header of its voxels", found_header == header
    payload = os.pread(handle, scan.size, scan.offset)
    yield "voxels", len(payload) == scan.size and google_crc32c.value(payload) == scan.crc32c
    padding = _end(scan) - scan.offset - scan.size
    yield "padding", os.pread(handle, padding, scan.offset + scan.size) == bytes(padding)


def _end(scan: Stored) -> int:
    return -(-(scan.offset + scan.size) // BLOCK) * BLOCK


def _header(name: str, size: int) -> bytes:
    """The tar header that ``write_shard`` makes for a member."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode, member.uname, member.gname = size, 0, 0o644, "root", "root"
    return member.tobuf(tarfile.DEFAULT_FORMAT, tarfile.ENCODING, "surrogateescape")


def _fits(text: bytes, row: dict[str, Any]) -> bool:
    """Whether a description is JSON as the build writes it, and says what the scan table says."""
    try:
        described = json.loads(text)
    except ValueError:
        return False
    if not isinstance(described, dict) or json.dumps(described, sort_keys=True).encode() != text:
        return False
    # The table's split is the build's own; the description keeps that of the participants' table, if it has one.
    return all(name == "split" or (name in row and same_value(value, row[name])) for name, value in described.items())


def same_value(ours: Any, theirs: Any) -> bool:
    """Whether a description's value is the table's; None, NaN and an empty text all mean missing."""
    missing = [value is None or value == "" or value != value for value in (ours, theirs)]
    return all(missing) or (not any(missing) and ours == theirs)
