"""Write files atomically, lock them, and compute their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# What flock raises on file systems without locks: some mounts of NFS, Lustre without -o flock, some FUSE file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; after the block, flush it to disk and rename it to ``path``.

    If the block raises, ``path`` is not created, and an older file at ``path`` stays unchanged.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp creates private files; give shards and reports the permissions that open() would give.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON with sorted keys, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.write("\n")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_folder(path: str | os.PathLike[str]) -> None:
    """Flush a directory to disk, so that a rename inside it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int | IO[Any], *, wait: bool = True) -> bool:
    """Take the exclusive lock of an open file or folder and return True; False if its file system has no locks.

    The kernel releases the lock when the process ends, however it ends. Without locks the caller goes on: the user must
    then not start two commands at a time. Raises BlockingIOError if another process holds the lock and ``wait`` is False.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno == errno.EACCES:
            raise BlockingIOError(error.errno, error.strerror) from None
        raise
    return True


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of the file ``path`` inside the block; the file is made, and stays."""
    with path.open("ab") as stream:
        lock(stream)
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
