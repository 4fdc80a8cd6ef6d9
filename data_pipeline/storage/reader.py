"""Reads single scans from shards: local ones with one pread, remote ones through ``data_pipeline.storage.remote``."""

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
from data_pipeline.storage.pieces import read_into
from data_pipeline.storage.remote import ShardStore
from data_pipeline.storage.unpacked import UnpackedScans
from data_pipeline.volume.decoders import decode
from data_pipeline.volume.limits import MAX_VOXELS
from infra.files import regular_file

TRUNCATED = "is truncated"


@dataclass(kw_only=True)
class VolumeReader:
    """Reads, verifies and decodes single scans. It is small and can be pickled to worker processes.

    Attributes:
        root: folder or URL of the shards.
        names: file name of each shard.
        shard: number of each scan's shard, (N,).
        offset: of each scan's payload in its shard, in bytes, (N,).
        size: of each scan's payload in bytes, (N,).
        crc32c: of each scan's payload, (N,).
        codecs: codec of each shard.
        table: path of the local scan table, from which an error message takes the scan's key.
        orientation: in which arrays without a header are stored.
        voxels: of the grid; a member that claims more is refused.
        store: reads remote shards; None for local ones.
        unpacked: keeps scans unpacked; None for none.
    """

    root: str
    names: list[str]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    codecs: list[str]
    table: str
    orientation: str = "RAS"
    voxels: int = MAX_VOXELS
    store: ShardStore | None = None
    unpacked: UnpackedScans | None = None
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False)

    def read(self, row: int) -> NDArray[np.float16]:
        """Return a scan's voxels, (D, H, W) float16.

        Raises OSError, naming shard and key, if its bytes are missing or differ from the manifest's checksum. A scan that
        is kept unpacked has a checksum of its own instead.
        """
        if self.unpacked is None:
            return self._read(row)
        voxels = self.unpacked.read(row)
        if voxels is None:
            self.unpacked.keep(row, voxels := self._read(row))
        return voxels

    def _read(self, row: int) -> NDArray[np.float16]:
        """Read a scan from its shard."""
        number, offset, size = int(self.shard[row]), int(self.offset[row]), int(self.size[row])
        if self.store is None:
            descriptor = self._open.get(number, lambda: Path(self.root) / self.names[number])
            assert descriptor is not None
            payload: bytes | NDArray[np.uint8]
            if self.codecs[number] == "npy":  # into the memory in which the voxels stay
                payload = np.empty(size, np.uint8)
                crc = read_into(descriptor, offset, payload)
                fault = TRUNCATED if crc is None else self._wrong(row, crc)
            else:
                payload = os.pread(descriptor, size, offset)
                fault = self._fault(row, payload)
            if fault:
                raise OSError(f"{self._name(row)} {fault}; run `yaware shards verify {self.root}`")
        else:
            payload = self.store.read(number, offset, size, partial(self._fault, row), partial(self._name, row))
        return decode(payload, self.codecs[number], self.orientation, self.voxels)

    def _fault(self, row: int, payload: bytes) -> str | None:
        """Return what is wrong with a scan's bytes, None if they are intact."""
        return TRUNCATED if len(payload) != self.size[row] else self._wrong(row, google_crc32c.value(payload))

    def _wrong(self, row: int, crc: int) -> str | None:
        """Return that a checksum is not that of a scan; None if it is."""
        return None if crc == self.crc32c[row] else "fails its checksum"

    def _name(self, row: int) -> str:
        key = str(pd.read_parquet(regular_file(self.table), columns=["key"])["key"].iloc[row])
        return f"shard {self.names[int(self.shard[row])]}, scan {key}"
