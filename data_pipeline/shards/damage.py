"""Finds which bytes of a shard differ from those that the build wrote: a scan's voxels, description, header or padding."""

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
from infra.files import open_descriptor

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Stored:
    """A scan as the scan table describes it: the location of its voxels in the shard, and its row."""

    key: str
    offset: int
    size: int
    crc32c: int
    row: dict[str, Any]


def find_damage(path: Path, size: int, scans: list[Stored], codec: str) -> list[str]:
    """Return a description of each damaged place in a shard, in the order of its bytes.

    Nothing in the file is trusted: tar headers are made again from the scan table and compared byte by byte, voxels are
    checked with their crc32c, descriptions against the table.

    Args:
        path: the shard.
        size: the size that it should have, in bytes.
        scans: its scans, in the order of their bytes.
        codec: of the shard.

    Raises OSError if the file cannot be read.
    """
    damages = []
    actual = path.stat().st_size
    if actual != size:
        damages.append(f"{actual} bytes, the manifest says {size}")
    handle = open_descriptor(path)
    try:
        end = 0
        for scan in scans:
            parts = [part for part, intact in _check_scan(handle, end, scan, codec) if not intact]
            if parts:
                cut = ", cut off" if scan.offset + scan.size > actual else ""
                damages.append(f"scan {scan.key} ({', '.join(parts)} in bytes {end} to {_end(scan)}{cut})")
            end = _end(scan)
        tail = os.pread(handle, max(0, actual - end), end)
        if actual >= size and any(tail):
            damages.append(f"the archive's end (bytes {end} to {actual})")
    finally:
        os.close(handle)
    return damages


def _check_scan(handle: int, start: int, scan: Stored, codec: str) -> Iterator[tuple[str, bool]]:
    """Yield each part of a scan's two tar members, and whether it is intact, in the order of the bytes."""
    header = _header(f"{scan.key}.{CODECS[codec]}", scan.size)
    before = os.pread(handle, scan.offset - start, start)
    description, actual_header = before[: -len(header)], before[-len(header) :]
    length = len(_header(f"{scan.key}.json", 0))
    text = description[length:].rstrip(b"\0")
    yield "header of its description", description[:length] == _header(f"{scan.key}.json", len(text))
    yield "description", _is_description(text, scan.row)
    yield "header of its voxels", actual_header == header
    payload = os.pread(handle, scan.size, scan.offset)
    yield "voxels", len(payload) == scan.size and google_crc32c.value(payload) == scan.crc32c
    padding = _end(scan) - scan.offset - scan.size
    yield "padding", os.pread(handle, padding, scan.offset + scan.size) == bytes(padding)


def _end(scan: Stored) -> int:
    """Return where the next member starts: tar pads every member to whole blocks."""
    return -(-(scan.offset + scan.size) // BLOCK) * BLOCK


def _header(name: str, size: int) -> bytes:
    """Return the tar header that ``write_shard`` makes for a member."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode, member.uname, member.gname = size, 0, 0o644, "root", "root"
    return member.tobuf(tarfile.DEFAULT_FORMAT, tarfile.ENCODING, "surrogateescape")


def _is_description(text: bytes, row: dict[str, Any]) -> bool:
    """Return whether ``text`` is JSON as the build writes it and agrees with the scan's row."""
    try:
        described = json.loads(text)
    except ValueError:
        return False
    if not isinstance(described, dict) or json.dumps(described, sort_keys=True).encode() != text:
        return False
    # The build assigns the table's split; a split in the description comes from the participants' table.
    return all(name == "split" or (name in row and same_value(value, row[name])) for name, value in described.items())


def same_value(first: Any, second: Any) -> bool:
    """Return whether two values are equal; None, NaN and an empty text all mean missing and are equal."""
    missing = [value is None or value == "" or value != value for value in (first, second)]
    return all(missing) or (not any(missing) and first == second)
