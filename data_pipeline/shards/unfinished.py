"""What a killed build leaves in its folder, and which of it the next build keeps.

While a folder is being built it holds, beside the shards:

- ``.unfinished-<8 hex>/``: one folder per run for the tars that workers are writing. A finished tar is renamed out of it.
  A new run removes the folders of earlier runs first, so that a worker that outlives its driver cannot rename a tar into
  the new run's shards.
- ``.unfinished-<shard>.json``: a record of a finished shard: its content, its SHA-256, and a fingerprint of everything
  that its bytes depend on. It is written before the tar is renamed, so every tar of an unfinished build has one.
- ``.coarse-<shard>.npy``: coarse volumes of that shard's scans, which the rules that compare scans need.

All of them are removed once the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import scipy
import zstandard

from data_pipeline.cohort.scan import Scan
from data_pipeline.quality.outliers import COARSE_PREFIX, coarse_path
from data_pipeline.quality.rules import Removal
from data_pipeline.storage.manifest_file import MANIFEST, read_content
from infra.errors import UserError
from infra.files import lock, read_text, sha256_of

UNFINISHED = ".unfinished-"

# Another release of one of these may resample, round or compress differently, so a data set is written with one of each.
LIBRARIES = {
    "nibabel": nibabel.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
    "zstandard": zstandard.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
}  # fmt: skip


@dataclass(frozen=True)
class WrittenShard:
    """One finished shard.

    Attributes:
        shard: its row for the manifest; empty if every scan was refused and no tar was kept.
        scans: a row for each of its scans, in the order of its bytes.
        removals: the scans that were refused.
    """

    shard: dict[str, Any]
    scans: list[dict[str, Any]]
    removals: list[Removal]

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON can hold it."""
        removals = [removal.to_dict() for removal in self.removals]
        return {"shard": self.shard, "rows": self.scans, "quarantined": removals}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> WrittenShard:
        """Read what ``to_json`` returned."""
        return cls(content["shard"], content["rows"], [Removal.from_dict(fields) for fields in content["quarantined"]])


def fingerprint(scans: Sequence[Scan], settings: dict[str, Any]) -> str:
    """Return the SHA-256 of everything that a shard's bytes depend on.

    This covers the settings, the versions of the libraries, and each scan's table row and file stamps: size, modification
    time and change time. No tool can set the change time back, so a file that was written to always has other stamps.
    """
    inputs = [[repr(scan), *_stamps(scan.path)] for scan in scans]
    text = json.dumps([LIBRARIES, settings, inputs], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamps(path: Path) -> tuple[int, int, int] | tuple[()]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the record of the shard ``name``."""
    return folder / f"{UNFINISHED}{name}.json"


def read_finished(folder: Path, name: str, expected: str) -> WrittenShard | None:
    """Return the shard ``name`` that an earlier run finished, or None if it must be written again.

    Args:
        folder: the folder of the shards.
        name: the shard's file name.
        expected: the fingerprint that the shard would have if it were written now.

    The tar's bytes are read and compared with its SHA-256.
    """
    try:
        record = json.loads(read_text(record_path(folder, name)))
    except (OSError, ValueError):
        return None
    if record["fingerprint"] != expected:
        return None
    shard, path = record["shard"], folder / name
    if shard and not (path.is_file() and path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]):
        return None
    if shard and not coarse_path(folder, name).is_file():
        return None
    return WrittenShard.from_json(record)


def finish(folder: Path, temporary: Path, name: str, mark: str, written: WrittenShard) -> WrittenShard:
    """Rename a tar from ``temporary`` to ``folder / name`` after writing its record; return the shard as recorded.

    Args:
        folder: the folder of the shards.
        temporary: the finished tar. It is removed if ``written`` has no scan.
        name: the shard's file name.
        mark: the shard's fingerprint.
        written: what the tar holds.
    """
    text = json.dumps({"fingerprint": mark, **written.to_json()})
    record = temporary.with_name(f"{temporary.name}.json")
    for path, content in ((temporary, None), (record, text)):
        with path.open("r+b" if content is None else "wb") as stream:
            stream.write(content.encode() if content else b"")
            stream.flush()
            os.fsync(stream.fileno())
    record.replace(record_path(folder, name))
    if written.shard:
        temporary.replace(folder / name)
    else:
        temporary.unlink()
        (folder / name).unlink(missing_ok=True)
    # Through JSON, as a later run reads it, so that both write the same manifest to the last byte.
    return WrittenShard.from_json(json.loads(text))


@contextmanager
def build_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a new folder for unfinished tars after removing what earlier runs left, except the shards ``names``.

    The caller must hold the lock.
    """
    remove_leftovers(folder, keep=names)
    with private_folder(folder) as private:
        yield private


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder in ``folder``, on the same disk so that files can be renamed out of it; remove it at the end.

    The folders of earlier runs are removed first. The caller must hold the lock.
    """
    for leftover in folder.glob(f"{UNFINISHED}????????"):
        shutil.rmtree(leftover, ignore_errors=True)
    private = folder / f"{UNFINISHED}{uuid.uuid4().hex[:8]}"
    private.mkdir()
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def remove_records(folder: Path, listed: Sequence[str]) -> None:
    """Remove what a build left that was killed just after it wrote the manifest: records and coarse volumes; say so.

    The coarse volumes of shards that the manifest does not list go only if no other command works in the folder.
    """
    names = {record_path(folder, name).name for name in listed} | {coarse_path(folder, name).name for name in listed}
    left = [path for path in folder.glob(f"{UNFINISHED}*.json") if path.name in names]
    coarse = [*folder.glob(f"{COARSE_PREFIX}*"), *_half_written(folder, COARSE_PREFIX)]
    left += [path for path in coarse if path.name in names]
    others = [path for path in coarse if path.name not in names]
    if others:
        with suppress(UserError), locked(folder):
            # An append that was killed continues with the coarse volumes of its records.
            begun = {
                path.name.removeprefix(UNFINISHED).removesuffix(".json") for path in folder.glob(f"{UNFINISHED}*.json")
            }
            kept = {coarse_path(folder, name).name for name in begun}
            unknown = [path for path in others if path.name not in kept]
            for path in unknown:
                path.unlink(missing_ok=True)
            left += unknown
    for path in left:
        path.unlink(missing_ok=True)
    if left:
        print(f"shards: removed {len(left)} files that a killed build left in {folder}", file=sys.stderr, flush=True)


def _half_written(folder: Path, pattern: str) -> list[Path]:
    """Return the temporary files of ``atomic_write`` for a pattern of names; ``.new`` is one that was not yet locked."""
    return [path for ending in ("tmp", "new") for path in folder.glob(f".{pattern}*.{ending}")]


def remove_leftovers(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove unfinished tars, finished tars that no manifest lists, and their records; keep the shards named ``keep``."""
    coarse = {coarse_path(folder, name).name for name in keep}
    for path in (*folder.glob(f"{COARSE_PREFIX}*"), *_half_written(folder, COARSE_PREFIX)):
        if path.name not in coarse:
            path.unlink(missing_ok=True)
    listed = set()
    if (folder / MANIFEST).exists():
        listed = {str(row["name"]) for row in read_content(folder)["shards"]}
    records = {record_path(folder, name).name for name in keep}
    for written in ("manifest.json", "quarantine.tsv", "scans*.parquet"):
        for path in _half_written(folder, f"{written}."):
            path.unlink(missing_ok=True)
    for path in list(folder.glob(f"{UNFINISHED}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in records:
            name = path.name.removeprefix(UNFINISHED).removesuffix(".json")
            if name.endswith(".tar") and name not in listed:
                (folder / name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no other process builds, appends or repairs in it.

    The kernel releases the lock when the process ends, however it ends. Raises UserError if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            # Some network file systems cannot lock a folder; there the user must start one command at a time.
            lock(handle, wait=False)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being written by another yaware command; wait until it ends, or stop it"
            ) from None
        yield
    finally:
        os.close(handle)
