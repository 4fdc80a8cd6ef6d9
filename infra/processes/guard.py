"""``python -m infra.processes.guard WORD``: end the processes that have WORD in their command line when stdin closes.

The starting process holds the other end of the pipe. The kernel closes it when that process ends, however it ends, so a
killed driver leaves none of the processes of its local Ray cluster, which all name its session.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress

import psutil

WAIT_SECONDS = 10.0  # that the processes have to end by themselves, as most do


def guard_session() -> subprocess.Popen[bytes] | None:
    """Start the guard of the Ray session whose processes this process has started; None if there is no session.

    Close its ``stdin`` once the session has been shut down.
    """
    names = {
        match[0]
        for process in psutil.Process().children(recursive=True)
        for match in re.finditer(r"session_\d{4}-[\w-]+", " ".join(_words(process)))
    }
    if len(names) != 1:
        return None
    command = [sys.executable, "-m", "infra.processes.guard", names.pop()]
    # A session of its own: a signal to the process group (Ctrl-C) must not end the guard before its charges.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end_all(word: str, seconds: float = WAIT_SECONDS) -> list[int]:
    """Wait until no process has ``word`` in its command line; end those that still run. Return their process ids."""
    _, left = psutil.wait_procs(_with_word(word), timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return [process.pid for process in left]


def _with_word(word: str) -> list[psutil.Process]:
    own = {os.getpid(), os.getppid()}
    found = [p for p in psutil.process_iter() if p.pid not in own and any(word in text for text in _words(p))]
    below = []
    for process in found:
        with suppress(psutil.NoSuchProcess):
            below += process.children(recursive=True)  # Ray's workers rename themselves
    return list({process.pid: process for process in (*found, *below)}.values())


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


if __name__ == "__main__":
    while os.read(0, 1):
        pass
    end_all(sys.argv[1])
