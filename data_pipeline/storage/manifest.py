"""The manifest: the only description of a data set that readers trust.

``manifest.json`` holds the grid, the build settings, a row per shard with its SHA-256, and a digest of its whole content.
``scans.parquet`` holds a row per scan: the location of its bytes, their checksum, and every column of the participants' table.
Proxies and labels are read from this table and are not part of the shards, so a new proxy needs no rebuild.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.licences import licences_in
from data_pipeline.storage.manifest_file import FORMAT, check_content, is_simulated, read_checked, table_path
from data_pipeline.storage.manifest_file import MANIFEST as MANIFEST
from data_pipeline.storage.manifest_file import SCANS as SCANS
from data_pipeline.storage.manifest_file import digest_of as digest_of
from data_pipeline.storage.reader import VolumeReader as VolumeReader
from data_pipeline.storage.remote import Access, ShardStore, is_remote, join, read_whole, with_retries
from data_pipeline.storage.table_schema import read_table
from data_pipeline.storage.unpacked import UnpackedScans
from data_pipeline.volume.grid import Grid
from infra.errors import PATH, LoaderError, UserError, check_arguments, nearest
from infra.files import atomic_write, flush_folder, other_kind, sha256_of, writable_folder, write_json


class Manifest:
    """A built data set.

    Attributes:
        scans: the scan table, a row per scan. The row number identifies a scan everywhere.
        shards: a dict per shard: ``name``, ``bytes``, ``sha256``, ``scans``.
        grid: ``shape``, ``spacing`` in mm and ``affine`` of all volumes.
        settings: the settings of the build, and what was appended and annotated later.
        digest: SHA-256 of the manifest's content.
        url: folder or URL from which the manifest was read.
        root: local folder that holds manifest.json and the scan table, or copies of them.
        table: path of the scan table.
        access: how remote shards are read.
    """

    def __init__(
        self,
        root: Path,
        content: dict[str, Any],
        scans: pd.DataFrame,
        url: str | None = None,
        access: Access | None = None,
    ) -> None:
        self.root = root
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
        """Read and check ``manifest.json`` and the scan table of a data set.

        Args:
            url: a path, ``s3://bucket/prefix``, ``http(s)://host/prefix``, or any other URL that fsspec knows.
            access: how remote shards are read; None for the defaults.

        Raises:
            UserError: if a file is missing, cannot be read, or was changed, or if a key or column has an impossible value.
        """
        check_arguments(PATH, url=url)
        url, access = str(url), access or Access()
        root = fetch(url, access) if is_remote(url) else Path(url)
        content, table = read_checked(root)
        scans = read_table(table, content, str(table_path(root, content)))
        return cls(root, content, scans, url, access)

    def __repr__(self) -> str:
        """Name the folder and count the scans."""
        shape = "x".join(map(str, self.grid.get("shape", ())))
        return f"Manifest({self.url!r}: {len(self.scans)} scans, grid {shape})"

    @property
    def shards_root(self) -> str:
        """Folder or URL of the shards: that of the manifest, unless the manifest is an index of shards made elsewhere."""
        return join(self.url, str(self.settings.get("root", ".")))

    def shard_url(self, name: str) -> str:
        """Return the path or URL of a shard."""
        return join(self.shards_root, name)

    def rows(self, split: str | Sequence[str] | None = None, query: str | None = None) -> NDArray[np.int64]:
        """Return the row numbers (n,) of the scans in some splits that match a query, ascending.

        Args:
            split: name or names of splits; None for all scans.
            query: expression of ``pandas.DataFrame.query`` over the columns, as in ``"age >= 18"``.

        Raises:
            UserError: if a split is not in the data set or the query fails.
        """
        scans = self.scans
        chosen = np.arange(len(scans)) if split is None else np.flatnonzero(self._in_splits(split))
        if query:
            scans = scans if split is None else scans.iloc[chosen]
            try:
                chosen = chosen[np.asarray(fulfilling(scans, query), dtype=bool)]
            except Exception as error:  # pandas raises many types of errors for malformed queries
                raise UserError(f"query {query!r} fails on {SCANS}: {' '.join(str(error).split())}") from None
        return chosen.astype(np.int64, copy=False)

    def _in_splits(self, split: str | Sequence[str]) -> NDArray[np.bool_]:
        """Whether each scan is in one of the splits. Raises UserError if a split has no scan."""
        column, found = self.scans["split"], np.zeros(len(self.scans), dtype=bool)
        for name in [split] if isinstance(split, str) else list(split):
            members = (column == name).to_numpy(dtype=bool)
            if not members.any():
                existing = sorted(column.unique())
                raise UserError(
                    f"split {name!r} is not in {self.url}{nearest(name, existing)}; available: {', '.join(existing)}"
                )
            found |= members
        return found

    def proxies(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return columns of the scan table as (N, P) float32, NaN where missing.

        The values of a text column become codes 0, 1, ... in sorted order.

        Args:
            names: P names of columns.
            rows: N row numbers; None for all scans.

        Raises:
            UserError: if a column does not exist.
        """
        columns = []
        for name in names:
            if name not in self.scans.columns:
                columns_there = [str(column) for column in self.scans.columns]
                raise UserError(
                    f"proxy {name!r} is not a column of {join(self.url, SCANS)}{nearest(name, columns_there)}"
                )
            column = self.scans[name]
            if pd.api.types.is_numeric_dtype(column):
                values = column.to_numpy(dtype=np.float32, na_value=np.nan)
            else:
                codes = pd.Categorical(column.replace("", None)).codes
                values = np.where(codes < 0, np.nan, codes).astype(np.float32)
            columns.append(values if rows is None else values[rows])
        return np.stack(columns, axis=1)

    def subjects(self) -> NDArray[np.int64]:
        """Return a number for the participant of every scan, (N,)."""
        people = self.scans["dataset"].astype(str) + "/" + self.scans["participant_id"].astype(str)
        return pd.Categorical(people).codes.astype(np.int64)

    def reader(self) -> VolumeReader:
        """Return a reader of the scans' voxels, which can be pickled to worker processes."""
        shard, offset, size, crc = (
            self.scans[name].to_numpy(dtype=np.int64) for name in ("shard", "offset", "size", "crc32c")
        )
        names = [str(row["name"]) for row in self.shards]
        store = None
        if is_remote(self.shards_root):
            sizes, digests = [int(row["bytes"]) for row in self.shards], [str(row["sha256"]) for row in self.shards]
            store = ShardStore(self.shards_root, names, sizes, digests, self.access)
        codecs = [str(row.get("codec", self.settings["codec"])) for row in self.shards]
        return VolumeReader(
            root=self.shards_root, names=names, shard=shard, offset=offset, size=size, crc32c=crc, codecs=codecs,
            table=str(self.table), orientation=str(self.settings.get("orientation", "RAS")), store=store,
            voxels=prod(self.grid["shape"]), unpacked=self._unpacked(),
        )  # fmt: skip

    def _unpacked(self) -> UnpackedScans | None:
        """The file that keeps unpacked scans, if there is to be one. Raises UserError if its folder cannot be written."""
        if self.access.unpacked is None:
            return None
        folder = writable_folder("unpacked", self.access.unpacked, "data.cache_unpacked")
        limit = self.access.unpacked_gb
        unpacked = UnpackedScans(
            path=folder / f"{self.digest[:32]}.scans", shape=self.grid["shape"], scans=len(self.scans),
            limit=None if limit is None else int(limit * 1e9),
        )  # fmt: skip
        if not unpacked.kept:
            raise UserError(
                f"data.cache_unpacked_gb={limit} holds no scan: each takes {unpacked.place_bytes / 1e9:.6f}"
            )
        return unpacked

    @cached_property
    def _reader(self) -> VolumeReader:
        return self.reader()

    def read_volume(self, row: int) -> NDArray[np.float16]:
        """Return a scan's voxels, (D, H, W) float16.

        Raises OSError if they are missing or fail their checksum, UserError if a pipe or folder is in place of the shard.
        """
        return self._reader.read(row)

    def licences(self, rows: NDArray[np.integer[Any]] | None = None) -> dict[str, list[str]]:
        """Return the licences of the data sets of the scans ``rows``, in the data sets' own words; None is all scans.

        A data set whose licence nobody stated has an empty list. Several licences mean that scans were appended under another.
        """
        names = self.scans["dataset"] if rows is None else self.scans["dataset"].iloc[rows]
        return licences_in(self.settings, names.astype(str).unique())

    @property
    def simulated(self) -> bool:
        """Whether any scan comes from the simulator."""
        return is_simulated(self.settings)


def check_shards(manifest: Manifest, rows: NDArray[np.int64]) -> None:
    """Raise LoaderError if local shards that hold the scans ``rows`` are missing or have the wrong size.

    Only file names and sizes are looked at. Remote shards are not checked.
    """
    if is_remote(manifest.shards_root):
        return
    wrong = []
    used = sorted({int(shard) for shard in manifest.scans["shard"].to_numpy()[rows]})
    for row in (manifest.shards[number] for number in used):
        path = Path(manifest.shard_url(str(row["name"])))
        if kind := other_kind(path):
            wrong.append(f"{row['name']} is {kind}, not a file")
        elif not path.exists():
            wrong.append(f"{row['name']} is missing")
        elif path.stat().st_size != int(row["bytes"]):
            wrong.append(f"{row['name']} has {path.stat().st_size} bytes, not {row['bytes']}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        again = (
            ""
            if manifest.settings.get("indexed")
            else (f", or build them again: yaware shards verify {manifest.url} --repair COHORT")
        )
        raise LoaderError(
            f"{len(wrong)} of {len(used)} shards in {manifest.shards_root} cannot be used ({', '.join(wrong[:3])}{more}); "
            f"restore them{again}"
        )


def fetch(url: str, access: Access) -> Path:
    """Download a remote manifest and return the local folder with the copies.

    manifest.json is downloaded every time, the scan table only if there is no intact copy of it. Raises UserError if one of
    them cannot be read or is damaged.
    """

    def read_manifest() -> tuple[bytes, dict[str, Any]]:
        """Read manifest.json: its bytes and its content."""
        text = read_whole(join(url, MANIFEST), access)
        return text, check_content(text, join(url, MANIFEST))

    def read_scans() -> bytes:
        """Read the scan table. Raises UserError if it differs from its checksum."""
        downloaded = read_whole(table, access)
        if hashlib.sha256(downloaded).hexdigest() != content["scans"]["sha256"]:
            raise UserError(f"{table} differs from manifest.json; build the shards again")
        return downloaded

    try:
        text, content = with_retries(read_manifest, lambda: join(url, MANIFEST), access)
        name = str(content["scans"]["name"])
        table = join(url, name)
        cache = Path(access.cache) / "manifests" if access.cache else None
        folder = writable_folder("manifests", cache, "data.cache") / str(content["digest"])[:32]
        if not (folder / name).exists() or sha256_of(folder / name) != content["scans"]["sha256"]:
            downloaded = with_retries(read_scans, lambda: table, access)
            with atomic_write(folder / name) as stream:
                stream.write(downloaded)
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
    """Write the scan table, then manifest.json, which makes the folder a data set; return the manifest.

    Args:
        root: the folder of the manifest.
        grid: of all volumes.
        settings: of the build.
        shards: a dict per shard.
        scans: the scan table.
        replaces: the folder holds a manifest that other processes may be reading. The new table is then named after its
            checksum, and the old one is removed only after the new manifest has replaced the old.
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
    """Remove all scan tables but ``name``, which the manifest names."""
    for path in (root / SCANS, *root.glob("scans-????????.parquet")):
        if path.name != name:
            path.unlink(missing_ok=True)


def fulfilling(scans: pd.DataFrame, query: str) -> NDArray[np.bool_]:
    """Return which scans fulfil a pandas query: (N,) bool. Raises TypeError if it is not a condition, else as pandas does."""
    chosen = scans.eval(query)
    if not isinstance(chosen, pd.Series) or not pd.api.types.is_bool_dtype(chosen):
        raise TypeError("it gives no yes or no for each scan; write a condition, as in age >= 18")
    return chosen.fillna(False).to_numpy(dtype=bool)
