"""The error for what a user gave and is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One clear line: the file or field, the value found, what is allowed, the fix.

    The command prints the text after ``yaware: error:`` and exits with status 2, without a traceback.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the allowed word nearest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
