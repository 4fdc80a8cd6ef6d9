"""Exceptions that end a command with one line and no traceback, and a check of arguments that raises them."""

from __future__ import annotations

import difflib
import errno
import numbers
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """What an argument may be: its types, and the same in words."""

    types: tuple[type, ...]
    words: str


WHOLE = Kind((numbers.Integral,), "a whole number")
OPTIONAL_WHOLE = Kind((numbers.Integral, type(None)), "a whole number or None")
NUMBER = Kind((numbers.Real,), "a number")
TEXT = Kind((str,), "a text")
OPTIONAL_TEXT = Kind((str, type(None)), "a text or None")
PATH = Kind((str, os.PathLike), "a path")
OPTIONAL_PATH = Kind((str, os.PathLike, type(None)), "a path or None")


def check_arguments(kind: Kind, **arguments: Any) -> None:
    """Raise UserError, naming the argument, unless each argument is of a kind; True and False are no numbers."""
    for name, value in arguments.items():
        is_number = not isinstance(value, bool) or bool in kind.types
        if not (is_number and isinstance(value, kind.types)):
            raise UserError(f"{name}={value!r:.80} is of type {type(value).__name__}; allowed: {kind.words}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the allowed word closest to ``word``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
