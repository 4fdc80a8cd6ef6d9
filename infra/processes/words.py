"""The command lines of other processes."""

from __future__ import annotations

import psutil


def words_of(process: psutil.Process) -> list[str]:
    """Return the words of a process's command line; empty if it has ended or is another user's."""
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie is a NoSuchProcess
        return []
