"""The manifest: the one thing that readers of a data set trust.

``manifest.json`` holds the grid, the build settings, a row per shard with its SHA-256, and a digest of the whole;
``scans.parquet`` holds a row per scan: where its bytes lie, their checksum, and every column of the participants' table.
Proxies and labels are looked up here and never baked into the tensors, so a new proxy needs no rebuild.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd

from data_pipeline.shard import decode
from data_pipeline.volume import Array, Grid
from infra.errors import UserError, nearest
from infra.files import atomic_write, sha256_of, write_json

FORMAT = 1
MOST_OPEN = 256  # shards open at once in a process; many systems allow 1024 files
MANIFEST, SCANS = "manifest.json", "scans.parquet"


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
        root = Path(url)
        path = root / MANIFEST
        if not path.is_file():
            raise UserError(f"{path} is missing; give a folder made by `yaware shards build`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); build the shards again") from None
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format {content.get('format')!r}, this version reads {FORMAT}; build again")
        if content["digest"] != digest_of(content):
            raise UserError(f"{path} was edited: its digest does not fit its content; build the shards again")
        if not (root / SCANS).is_file() or sha256_of(root / SCANS) != content["scans"]["sha256"]:
            raise UserError(f"{root / SCANS} is missing or differs from manifest.json; build the shards again")
        return cls(root, content, pd.read_parquet(root / SCANS))

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
        """Whether the scans come from the simulator."""
        return bool(self.settings.get("simulated", False))


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
            key = str(pd.read_parquet(Path(self.root) / SCANS, columns=["key"])["key"].iloc[row])
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


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content without its own digest, as canonical JSON."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    root: Path, grid: Grid, settings: dict[str, Any], shards: list[dict[str, Any]], scans: pd.DataFrame
) -> Manifest:
    """Write scans.parquet, then manifest.json, which alone makes the folder a data set."""
    with atomic_write(root / SCANS) as stream:
        scans.to_parquet(stream, index=False)
    content: dict[str, Any] = {
        "format": FORMAT,
        "grid": grid.to_dict(),
        "dtype": "float16",
        "settings": settings,
        "shards": shards,
        "scans": {"name": SCANS, "rows": len(scans), "sha256": sha256_of(root / SCANS)},
    }
    write_json(root / MANIFEST, {**content, "digest": digest_of(content)})
    return Manifest.load(root)
