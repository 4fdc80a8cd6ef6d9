"""Advisory file locks that also work where the file system has none."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# What flock raises on file systems without locks: some mounts of NFS, Lustre without -o flock, some FUSE file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


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
