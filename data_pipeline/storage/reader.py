"""Reads single scans out of shards, local ones by one pread, remote ones through ``data_pipeline.storage.remote``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.open_files import OpenFiles
from data_pipeline.storage.remote import ShardStore
from data_pipeline.volume.decoders import decode


@dataclass
class VolumeReader:
    """Reads single scans: bytes, checksum, decode. Small enough to be sent to worker processes.

    ``root`` is the folder or URL of the shards ``names``; ``shard``, ``offset``, ``size`` and ``crc32c`` have a value per
    scan, ``codecs`` one per shard. ``table`` is the local scans.parquet, from which an error takes the scan's key.
    """

    root: str
    names: list[str]
    shard: NDArray[np.int_]
    offset: NDArray[np.int_]
    size: NDArray[np.int_]
    crc32c: NDArray[np.int_]
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
