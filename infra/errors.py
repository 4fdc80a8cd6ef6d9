"""Exceptions that end a command with one line and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong user input. The message is one line: file or field, value found, what is allowed, how to fix it.

    The command ``yaware`` prints it after ``yaware: error:`` and exits with status 2, without a traceback.
    """


class LoaderError(UserError):
    """The shards or the processes that read them fail, so the run stops.

    It may concern one rank alone, so every rank that raises it prints it.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the allowed word closest to ``word``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
