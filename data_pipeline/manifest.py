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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.reader import VolumeReader as VolumeReader
from data_pipeline.remote import Access, ShardStore, is_remote, join, read_whole, with_retries
from data_pipeline.volume import Array, Grid
from infra.errors import UserError, nearest
from infra.files import atomic_write, sha256_of, write_json

FORMAT = 1
MANIFEST, SCANS = "manifest.json", "scans.parquet"


class Manifest:
    """A built data set: ``scans`` (a row per scan; the row number is the scan's index everywhere) and its shards."""

    def __init__(
        self,
        root: Path,
        content: dict[str, Any],
        scans: pd.DataFrame,
        url: str | None = None,
        access: Access | None = None,
    ) -> None:
        self.root = root  # the local folder that holds manifest.json and scans.parquet, or copies of them
        self.url = url or str(root)
        self.access = access or Access()
        self.digest: str = content["digest"]
        self.grid: dict[str, Any] = content["grid"]
        self.settings: dict[str, Any] = content["settings"]
        self.shards: list[dict[str, Any]] = content["shards"]
        self.scans = scans

    @classmethod
    def load(cls, url: str | Path, access: Access | None = None) -> Manifest:
        """Read and check ``manifest.json`` and ``scans.parquet`` of a folder of shards; UserError where they disagree.

        ``url`` is a path, ``s3://bucket/prefix``, ``http(s)://host/prefix`` or whatever else fsspec knows; ``access``
        says how remote shards are read.
        """
        url, access = str(url), access or Access()
        root = _fetch(url, access) if is_remote(url) else Path(url)
        path = root / MANIFEST
        if not path.is_file():
            raise UserError(f"{path} is missing; give a folder made by `yaware shards build`")
        content = _check_content(path.read_bytes(), join(url, MANIFEST))
        if not (root / SCANS).is_file() or sha256_of(root / SCANS) != content["scans"]["sha256"]:
            raise UserError(f"{root / SCANS} is missing or differs from manifest.json; build the shards again")
        return cls(root, content, pd.read_parquet(root / SCANS), url, access)

    @property
    def shards_root(self) -> str:
        """The folder or URL that the shards' names are relative to: the manifest's own, unless they were indexed."""
        return join(self.url, str(self.settings.get("root", ".")))

    def shard_place(self, name: str) -> str:
        """Path or URL of a shard."""
        return join(self.shards_root, name)

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
                        f"split {name!r} is not in {self.url}{nearest(name, known)}; there: {', '.join(known)}"
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
                raise UserError(f"proxy {name!r} is no column of {join(self.url, SCANS)}{nearest(name, known)}")
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
        store = None
        if is_remote(self.shards_root):
            sizes, sums = [int(row["bytes"]) for row in self.shards], [str(row["sha256"]) for row in self.shards]
            store = ShardStore(self.shards_root, names, sizes, sums, self.access)
        codecs = [str(row.get("codec", self.settings["codec"])) for row in self.shards]
        return VolumeReader(self.shards_root, names, shard, offset, size, crc, codecs, str(self.root / SCANS), store)

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


def _check_content(text: bytes, name: str) -> dict[str, Any]:
    """What manifest.json says; UserError where it is not one of this format, or was edited."""
    try:
        content: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON ({error}); build the shards again") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{name} has format {content.get('format')!r}, this version reads {FORMAT}; build again")
    if content["digest"] != digest_of(content):
        raise UserError(f"{name} was edited: its digest does not fit its content; build the shards again")
    return content


def _fetch(url: str, access: Access) -> Path:
    """A local folder with copies of a remote manifest.json, fetched anew each time, and of its scans.parquet."""
    sources = {name: join(url, name) for name in (MANIFEST, SCANS)}

    def manifest() -> tuple[bytes, dict[str, Any]]:
        text = read_whole(sources[MANIFEST], access)
        return text, _check_content(text, sources[MANIFEST])

    def scans() -> bytes:
        table = read_whole(sources[SCANS], access)
        if hashlib.sha256(table).hexdigest() != content["scans"]["sha256"]:
            raise UserError(f"{sources[SCANS]} differs from manifest.json; build the shards again")
        return table

    try:
        text, content = with_retries(manifest, lambda: sources[MANIFEST], access)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(access.cache) if access.cache else Path(home) / "yaware"
        folder = base / "manifests" / str(content["digest"])[:32]
        if not (folder / SCANS).is_file() or sha256_of(folder / SCANS) != content["scans"]["sha256"]:
            table = with_retries(scans, lambda: sources[SCANS], access)
            with atomic_write(folder / SCANS) as stream:
                stream.write(table)
    except OSError as error:
        raise UserError(f"shards {url} cannot be read: {error}") from None
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(text)
    return folder


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
