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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest_file import FORMAT, check_content, is_simulated, read_checked
from data_pipeline.storage.manifest_file import MANIFEST as MANIFEST
from data_pipeline.storage.manifest_file import SCANS as SCANS
from data_pipeline.storage.manifest_file import digest_of as digest_of
from data_pipeline.storage.reader import VolumeReader as VolumeReader
from data_pipeline.storage.remote import Access, ShardStore, is_remote, join, read_whole, with_retries
from data_pipeline.volume.grid import Grid
from infra.errors import LoaderError, UserError, nearest
from infra.files import atomic_write, flush_folder, sha256_of, write_json


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
        self.table = root / str(content["scans"]["name"])
        self.scans = scans

    @classmethod
    def load(cls, url: str | Path, access: Access | None = None) -> Manifest:
        """Read and check ``manifest.json`` and ``scans.parquet`` of a folder of shards; UserError where they disagree.

        ``url`` is a path, ``s3://bucket/prefix``, ``http(s)://host/prefix`` or whatever else fsspec knows; ``access``
        says how remote shards are read.
        """
        url, access = str(url), access or Access()
        root = fetch(url, access) if is_remote(url) else Path(url)
        content, table = read_checked(root)
        return cls(root, content, pd.read_parquet(io.BytesIO(table)), url, access)

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

    def proxies(
        self, names: Sequence[str], rows: NDArray[np.int_] | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
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
        turn = str(self.settings.get("orientation", "RAS"))
        return VolumeReader(self.shards_root, names, shard, offset, size, crc, codecs, str(self.table), turn, store)

    @cached_property
    def _reader(self) -> VolumeReader:
        return self.reader()

    def read_volume(self, row: int) -> NDArray[np.float16]:
        """One scan's (D, H, W) float16 voxels, checksum verified."""
        return self._reader.read(row)

    @property
    def simulated(self) -> bool:
        """Whether scans come from the simulator."""
        return is_simulated(self.settings)


def check_shards(manifest: Manifest, rows: NDArray[np.int_]) -> None:
    """LoaderError where local shards that hold these scans are missing or cut short; looks at names and sizes alone."""
    if is_remote(manifest.shards_root):
        return
    wrong = []
    used = sorted({int(shard) for shard in manifest.scans["shard"].to_numpy()[rows]})
    for row in (manifest.shards[number] for number in used):
        path = Path(manifest.shard_place(str(row["name"])))
        if not path.is_file():
            wrong.append(f"{row['name']} is missing")
        elif path.stat().st_size != int(row["bytes"]):
            wrong.append(f"{row['name']} has {path.stat().st_size} bytes, not {row['bytes']}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LoaderError(
            f"{len(wrong)} of {len(used)} shards in {manifest.shards_root} cannot be used ({', '.join(wrong[:3])}{more}); "
            f"bring them back, or build them again: yaware shards verify {manifest.url} --repair COHORT"
        )


def fetch(url: str, access: Access) -> Path:
    """A local folder with copies of a remote manifest.json, fetched anew each time, and of the scan table it names."""

    def manifest() -> tuple[bytes, dict[str, Any]]:
        text = read_whole(join(url, MANIFEST), access)
        return text, check_content(text, join(url, MANIFEST))

    def scans() -> bytes:
        found = read_whole(table, access)
        if hashlib.sha256(found).hexdigest() != content["scans"]["sha256"]:
            raise UserError(f"{table} differs from manifest.json; build the shards again")
        return found

    try:
        text, content = with_retries(manifest, lambda: join(url, MANIFEST), access)
        name = str(content["scans"]["name"])
        table = join(url, name)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(access.cache) if access.cache else Path(home) / "yaware"
        folder = base / "manifests" / str(content["digest"])[:32]
        if not (folder / name).is_file() or sha256_of(folder / name) != content["scans"]["sha256"]:
            fetched = with_retries(scans, lambda: table, access)
            with atomic_write(folder / name) as stream:
                stream.write(fetched)
    except OSError as error:
        raise UserError(f"shards {url} cannot be read: {error}") from None
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(text)
    return folder


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
