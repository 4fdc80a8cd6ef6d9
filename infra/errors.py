"""Exceptions that end a command with one line and no traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# Errors of the file system and what to do about them; any other OSError is a bug and keeps its traceback.
STORAGE_ERRORS = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room in your quota",
    errno.EROFS: "give a folder that can be written", errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path", errno.EIO: "repair the file system",
    errno.ESTALE: "mount the file system again", errno.ENOTCONN: "mount the file system again",
    errno.ENAMETOOLONG: "give a shorter path", errno.EMFILE: "raise the limit of open files: ulimit -n",
}  # fmt: skip


class UserError(ValueError):
    """Wrong user input. The message is one line: file or field, value found, what is allowed, how to fix it.

    The command ``yaware`` prints it after ``yaware: error:`` and exits with status 2, without a traceback.
    """


class LoaderError(UserError):
    """The shards or the processes that read them fail, so the run stops.

    It may concern one rank alone, so every rank that raises it prints it.
    """


def storage_line(error: OSError) -> str:
    """Return one line that says which file the system refused, why, and what to do; empty if the error is of another kind."""
    if error.errno not in STORAGE_ERRORS or error.filename is None:
        return ""
    return f"{error.filename}: {error.strerror}; {STORAGE_ERRORS[error.errno]}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the allowed word closest to ``word``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
