"""What a killed build leaves behind, and how the next one knows which of it to keep.

While a folder is being built it holds, beside the shards,

- ``.unfinished-<8 hex>/``: the tars that workers are writing, one folder a run; a finished tar is renamed out of it. A
  new run removes it first, so that a worker which outlived its driver cannot rename anything into the new run's shards.
- ``.unfinished-<shard>.json``: a record of a finished shard: what it holds, its SHA-256, and a fingerprint of all that
  its bytes depend on. It is written before the tar is renamed, so no tar of ours is ever without one.

- ``.coarse-<shard>.npy``: what the quality rules that compare scans need of that shard's scans.

All go once the manifest is written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from infra.files import sha256_of

UNFINISHED = ".unfinished-"
Result = tuple[dict[str, Any], list[dict[str, Any]], list[Removal]]

# Another release of these may resample, round or compress otherwise; one data set is written by one of each.
WRITTEN_BY = {
    "nibabel": nibabel.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
    "zstandard": zstandard.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
}  # fmt: skip


def fingerprint(scans: Sequence[Scan], settings: dict[str, Any]) -> str:
    """SHA-256 of what a shard's bytes depend on: settings, libraries, every scan's table row, and its file's stamps.

    A file that was written to in between has another size, modification or change time (which no tool can set back).
    """
    inputs = [[repr(scan), *_stamps(scan.path)] for scan in scans]
    text = json.dumps([WRITTEN_BY, settings, inputs], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamps(path: Path) -> tuple[int, int, int] | tuple[()]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def record_of(folder: Path, name: str) -> Path:
    """Where the record of the shard ``name`` lies."""
    return folder / f"{UNFINISHED}{name}.json"


def finished(folder: Path, name: str, mark: str) -> Result | None:
    """What an earlier run wrote under ``name``, if it is what this run would write; its bytes are read to be sure."""
    try:
        record = json.loads(record_of(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if record["fingerprint"] != mark:
        return None
    shard, path = record["shard"], folder / name
    if shard and not (path.is_file() and path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]):
        return None
    if shard and not coarse_path(folder, name).is_file():
        return None
    return _result(record)


def finish(folder: Path, temporary: Path, name: str, mark: str, result: Result) -> Result:
    """Put a shard written at ``temporary`` in its place, its record first; what the caller shall return."""
    shard, rows, bad = result
    text = json.dumps({"fingerprint": mark, "shard": shard, "rows": rows, "quarantined": [r.to_dict() for r in bad]})
    record = temporary.with_name(f"{temporary.name}.json")
    for path, content in ((temporary, None), (record, text)):
        with path.open("r+b" if content is None else "wb") as stream:
            stream.write(content.encode() if content else b"")
            stream.flush()
            os.fsync(stream.fileno())
    record.replace(record_of(folder, name))
    if shard:
        temporary.replace(folder / name)
    else:
        temporary.unlink()
        (folder / name).unlink(missing_ok=True)
    # As a later run would read it, so that both end with the same manifest to the last byte.
    return _result(json.loads(text))


def _result(record: dict[str, Any]) -> Result:
    return record["shard"], record["rows"], [Removal.from_dict(fields) for fields in record["quarantined"]]


@contextmanager
def building(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder in ``folder`` for unfinished shards, to be called ``names``; the caller holds the lock.

    What an earlier run left and this one cannot use is removed.
    """
    clear(folder, keep=names)
    with private_folder(folder) as private:
        yield private


@contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, on the same disk, so that files can be renamed out of it; it goes at the end.

    Those of earlier runs go first: the caller holds the lock.
    """
    for left in folder.glob(f"{UNFINISHED}????????"):
        shutil.rmtree(left, ignore_errors=True)
    private = folder / f"{UNFINISHED}{uuid.uuid4().hex[:8]}"
    private.mkdir()
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def tidy(folder: Path, listed: Sequence[str]) -> None:
    """Remove the records of shards that the manifest lists: their build was killed just after it wrote that."""
    for path in folder.glob(f"{UNFINISHED}*.json"):
        if path.name in {record_of(folder, name).name for name in listed}:
            path.unlink(missing_ok=True)


def clear(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove unfinished tars, and finished ones that no manifest lists, with their records; not those called ``keep``."""
    coarse = {coarse_path(folder, name).name for name in keep}
    for path in (*folder.glob(f"{COARSE_PREFIX}*"), *folder.glob(f".{COARSE_PREFIX}*.tmp")):
        if path.name not in coarse:
            path.unlink(missing_ok=True)
    listed = set()
    if (folder / MANIFEST).is_file():
        listed = {str(row["name"]) for row in read_content(folder)["shards"]}
    kept = {record_of(folder, name).name for name in keep}
    for written in ("manifest.json", "quarantine.tsv", "scans*.parquet"):
        for path in folder.glob(f".{written}.*.tmp"):  # atomic_write's, of a process that was killed
            path.unlink(missing_ok=True)
    for path in list(folder.glob(f"{UNFINISHED}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            name = path.name.removeprefix(UNFINISHED).removesuffix(".json")
            if name.endswith(".tar") and name not in listed:
                (folder / name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else builds, appends or repairs in ``folder`` meanwhile; the lock goes with its process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems lock no folder; there the user must see to it.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{folder} is being written by another command; wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
