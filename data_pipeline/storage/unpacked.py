"""A file of a local disk that keeps scans unpacked, so that further reads cost a read and a checksum.

Every scan of a data set has a place of whole pages: its float16 voxels, and their crc32c. The file has holes for the scans that
nobody has read yet. Any number of processes may read and fill it at the same time, without a lock and without a temporary
name: all of them write the same bytes to a place, and a place that is empty, half written or damaged fails its checksum. Its
scan is then read from the shards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.pieces import read_into
from infra.files import open_for_update

PAGE = 4096
CRC = np.dtype("<u4")


@dataclass(kw_only=True)
class UnpackedScans:
    """The unpacked scans of a data set. It is small and can be pickled to worker processes, which open the file anew.

    Attributes:
        path: of the file; it is made at the first use. Its name must tell the data set.
        shape: of every volume, (D, H, W).
        scans: rows of the scan table.
        limit: bytes that the file may take on the disk; None for no limit. Scans of the rows that do not fit are not kept.
    """

    path: Path
    shape: Sequence[int]
    scans: int
    limit: int | None = None
    _descriptor: int | None = field(default=None, repr=False)
    _full: bool = field(default=False, repr=False)  # nothing more is kept
    _broken: bool = field(default=False, repr=False)  # nothing more is read

    @property
    def place_bytes(self) -> int:
        """Bytes of a scan's place."""
        return -(-(self._voxel_bytes + CRC.itemsize) // PAGE) * PAGE

    @property
    def kept(self) -> int:
        """How many scans the file may hold: those of the first rows."""
        return self.scans if self.limit is None else min(self.scans, self.limit // self.place_bytes)

    @property
    def _voxel_bytes(self) -> int:
        return 2 * prod(self.shape)

    def read(self, row: int) -> NDArray[np.float16] | None:
        """Return a scan's voxels, (D, H, W) float16, if the file holds them intact; None if not, or if its disk fails."""
        if row >= self.kept or self._broken:
            return None
        place = np.empty(self._voxel_bytes + CRC.itemsize, np.uint8)
        try:
            crc = read_into(self._file(), row * self.place_bytes, place, self._voxel_bytes)
        except OSError as error:  # a fault of this disk is none of the scan
            self._broken = True
            self._give_up(f"cannot be read ({error.strerror})")
            return None
        if crc != int(place[self._voxel_bytes :].view(CRC)[0]):
            return None
        return place[: self._voxel_bytes].view(np.float16).reshape(tuple(self.shape))

    def keep(self, row: int, voxels: NDArray[np.float16]) -> None:
        """Keep a scan's voxels, (D, H, W) float16; do nothing if they do not fit.

        If the disk is full, this process says so once and keeps no further scan.
        """
        if row >= self.kept or self._full or voxels.shape != tuple(self.shape):
            return
        content = np.ascontiguousarray(voxels).view(np.uint8).reshape(-1)
        crc = np.array([google_crc32c.value(content)], CRC)
        reason = "the disk is full"
        try:
            written = os.pwritev(self._file(), [content.data, crc.data], row * self.place_bytes)
            if written == content.nbytes + CRC.itemsize:
                return
        except OSError as error:
            reason = str(error.strerror)
        self._give_up(f"takes no further scan ({reason})")

    def _give_up(self, fault: str) -> None:
        """Keep no further scan in this process, and say why, once."""
        if not self._full:
            print(f"data: {self.path} {fault}; scans are read from the shards", file=sys.stderr, flush=True)
        self._full = True

    def _file(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_for_update(self.path)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
