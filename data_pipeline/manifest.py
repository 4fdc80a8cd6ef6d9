"""The manifest: the one thing that readers of a data set trust.

``manifest.json`` holds the grid, the build settings, a row per shard with its SHA-256, and a digest of the whole;
``scans.parquet`` holds a row per scan: where its bytes lie, their checksum, and every column of the participants' table.
Proxies and labels are looked up here and never baked into the tensors, so a new proxy needs no rebuild.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd

from data_pipeline.manifest_file import FORMAT, is_simulated, read_checked, read_content
from data_pipeline.manifest_file import MANIFEST as MANIFEST
from data_pipeline.manifest_file import SCANS as SCANS
from data_pipeline.manifest_file import digest_of as digest_of
from data_pipeline.shard import decode
from data_pipeline.volume import Array, Grid
from infra.errors import UserError, nearest
from infra.files import atomic_write, flush_folder, write_json

MOST_OPEN = 256  # shards open at once in a process; many systems allow 1024 files


class Manifest:
    """A built data set: ``scans`` (a row per scan; the row number is the scan's index everywhere) and its shards."""

    def __init__(self, root: Path, content: dict[str, Any], scans: pd.DataFrame) -> None:
        self.root = root
        self.digest: str = content["digest"]
        self.grid: dict[str, Any] = content["grid"]
        self.settings: dict[str, Any] = content["settings"]
        self.shards: list[dict[str, Any]] = content["shards"]
        self.scans = scans

    @classmethod
    def load(cls, url: str | Path) -> Manifest:
        """Read and check ``manifest.json`` and ``scans.parquet`` of a folder of shards; UserError where they disagree."""
        content, table = read_checked(url)
        return cls(Path(url), content, pd.read_parquet(io.BytesIO(table)))

    def rows(
        self, split: str | Sequence[str] | None = None, query: str | None = None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Row numbers of the scans in some splits that fulfil a pandas query over the columns, ascending."""
        scans = self.scans
        if split is not None:
            wanted = [split] if isinstance(split, str) else list(split)
            known = sorted(set(scans["split"]))
            for name in wanted:
                if name not in known:
                    raise UserError(
                        f"split {name!r} is not in {self.root}{nearest(name, known)}; there: {', '.join(known)}"
                    )
            scans = scans[scans["split"].isin(wanted)]
        if query:
            try:
                scans = scans.query(query)
            except Exception as error:  # pandas passes on whatever its parser or the columns raise
                raise UserError(f"query {query!r} does not work on {SCANS}: {' '.join(str(error).split())}") from None
        return scans.index.to_numpy(dtype=np.int64)

    def proxies(self, names: Sequence[str], rows: Array | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Columns as (N, P) float32, NaN where missing; text columns become codes in the sorted order of their values."""
        columns = []
        for name in names:
            if name not in self.scans.columns:
                known = [str(c) for c in self.scans.columns]
                raise UserError(f"proxy {name!r} is no column of {self.root / SCANS}{nearest(name, known)}")
            column = self.scans[name]
            if pd.api.types.is_numeric_dtype(column):
                values = column.to_numpy(dtype=np.float32, na_value=np.nan)
            else:
                codes = pd.Categorical(column.replace("", None)).codes
                values = np.where(codes < 0, np.nan, codes).astype(np.float32)
            columns.append(values if rows is None else values[rows])
        return np.stack(columns, axis=1)

    def subjects(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A number for the participant of every scan, (N,)."""
        people = self.scans["dataset"].astype(str) + "/" + self.scans["participant_id"].astype(str)
        return pd.Categorical(people).codes.astype(np.int64)

    def reader(self) -> VolumeReader:
        """What reads the scans' voxels, small enough to be sent to worker processes."""
        shard, offset, size, crc = (
            self.scans[name].to_numpy(dtype=np.int64) for name in ("shard", "offset", "size", "crc32c")
        )
        names = [str(row["name"]) for row in self.shards]
        return VolumeReader(str(self.root), names, shard, offset, size, crc, self.settings["codec"])

    @cached_property
    def _reader(self) -> VolumeReader:
        return self.reader()

    def read_volume(self, row: int) -> Array:
        """One scan's (D, H, W) float16 voxels, checksum verified."""
        return self._reader.read(row)

    @property
    def simulated(self) -> bool:
        """Whether scans come from the simulator."""
        return is_simulated(self.settings)


@dataclass
class VolumeReader:
    """Reads single scans out of shards: one pread, checksum, decode."""

    root: str
    names: list[str]
    shard: Array
    offset: Array
    size: Array
    crc32c: Array
    codec: str

    def read(self, row: int) -> Array:
        """(D, H, W) float16. OSError naming shard and key where the bytes are not those that the build wrote."""
        number, size = int(self.shard[row]), int(self.size[row])
        payload = os.pread(self._descriptor(number), size, int(self.offset[row]))
        if len(payload) != size or google_crc32c.value(payload) != self.crc32c[row]:
            found = "is cut short" if len(payload) != size else "fails its checksum"
            table = Path(self.root) / str(read_content(self.root)["scans"]["name"])
            key = str(pd.read_parquet(table, columns=["key"])["key"].iloc[row])
            raise OSError(f"shard {self.names[number]}, scan {key} {found}; run `yaware shards verify {self.root}`")
        return decode(payload, self.codec)

    @cached_property
    def _descriptors(self) -> dict[int, int]:
        return {}

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            if len(self._descriptors) >= MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[number] = os.open(Path(self.root) / self.names[number], os.O_RDONLY)
        return self._descriptors[number]

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors stay in their process; a worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_descriptors"}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def write_manifest(
    root: Path,
    grid: Grid,
    settings: dict[str, Any],
    shards: list[dict[str, Any]],
    scans: pd.DataFrame,
    *,
    replaces: bool = False,
) -> Manifest:
    """Write the scan table, then manifest.json, which alone makes the folder a data set.

    ``replaces``: the folder holds a manifest that others may be reading. The table then gets a name of its own, made of
    its checksum, and the old one goes only after the new manifest has taken its place.
    """
    stream = io.BytesIO()
    scans.to_parquet(stream, index=False)
    sha256 = hashlib.sha256(stream.getbuffer()).hexdigest()
    name = f"scans-{sha256[:8]}.parquet" if replaces else SCANS
    with atomic_write(root / name) as target:
        target.write(stream.getbuffer())
    content: dict[str, Any] = {
        "format": FORMAT,
        "grid": grid.to_dict(),
        "dtype": "float16",
        "settings": settings,
        "shards": shards,
        "scans": {"name": name, "rows": len(scans), "sha256": sha256},
    }
    flush_folder(root)
    write_json(root / MANIFEST, {**content, "digest": digest_of(content)})
    flush_folder(root)
    remove_old_tables(root, name)
    return Manifest.load(root)


def remove_old_tables(root: Path, name: str) -> None:
    """Remove the scan tables that no manifest names any more."""
    for path in (root / SCANS, *root.glob("scans-????????.parquet")):
        if path.name != name:
            path.unlink(missing_ok=True)
