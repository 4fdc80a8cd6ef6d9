"""Errors that end a command with one line on stderr and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One clear line: the file or field, the value found, what is allowed, the fix.

    The command prints the text after ``yaware: error:`` and exits with status 2, without a traceback.
    """


class LoaderError(UserError):
    """The shards or the processes that read them fail, so the run stops.

    It may concern one rank alone, so every rank that raises it prints it.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the allowed word nearest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
