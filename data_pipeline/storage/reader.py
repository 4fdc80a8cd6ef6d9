"""Reads single scans out of shards, local ones by one pread, remote ones through ``data_pipeline.storage.remote``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.volume.decoders import decode

if TYPE_CHECKING:
    from data_pipeline.storage.remote import ShardStore

MOST_OPEN = 256  # shards open at once in a process; many systems allow 1024 files


class OpenFiles:
    """Read-only descriptors by number, opened when first needed; at most ``MOST_OPEN``, none carried to other processes."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def get(self, number: int, path: Callable[[], str | Path | None]) -> int | None:
        """The descriptor; ``path()`` is asked where it is not open yet, and None from it is passed on."""
        if number not in self._descriptors:
            place = path()
            if place is None:
                return None
            if len(self._descriptors) >= MOST_OPEN:
                self.close(next(iter(self._descriptors)))
            self._descriptors[number] = os.open(place, os.O_RDONLY)
        return self._descriptors[number]

    def close(self, number: int) -> None:
        """Close one, if it is open."""
        if number in self._descriptors:
            os.close(self._descriptors.pop(number))

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclass
class VolumeReader:
    """Reads single scans: bytes, checksum, decode. Small enough to be sent to worker processes.

    ``root`` is the folder or URL of the shards ``names``; ``shard``, ``offset``, ``size`` and ``crc32c`` have a value per
    scan, ``codecs`` one per shard. ``table`` is the local scans.parquet, from which an error takes the scan's key.
    """

    root: str
    names: list[str]
    shard: NDArray[Any]
    offset: NDArray[Any]
    size: NDArray[Any]
    crc32c: NDArray[Any]
    codecs: list[str]
    table: str
    orientation: str = "RAS"  # of arrays without a header, as they are stored
    store: ShardStore | None = None  # how remote shards are read; None: local ones
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False)

    def read(self, row: int) -> NDArray[np.float16]:
        """(D, H, W) float16. OSError naming shard and key where the bytes are not those that the manifest lists."""
        number, offset, size = int(self.shard[row]), int(self.offset[row]), int(self.size[row])
        if self.store is None:
            descriptor = self._open.get(number, lambda: Path(self.root) / self.names[number])
            assert descriptor is not None
            payload = os.pread(descriptor, size, offset)
            fault = self._fault(row, payload)
            if fault:
                raise OSError(f"{self._name(row)} {fault}; run `yaware shards verify {self.root}`")
        else:
            payload = self.store.read(number, offset, size, partial(self._fault, row), partial(self._name, row))
        return decode(payload, self.codecs[number], self.orientation)

    def _fault(self, row: int, payload: bytes) -> str | None:
        """What is wrong with a scan's bytes, if anything."""
        if len(payload) != self.size[row]:
            return "is cut short"
        return None if google_crc32c.value(payload) == self.crc32c[row] else "fails its checksum"

    def _name(self, row: int) -> str:
        key = str(pd.read_parquet(self.table, columns=["key"])["key"].iloc[row])
        return f"shard {self.names[int(self.shard[row])]}, scan {key}"
