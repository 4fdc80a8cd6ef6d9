"""``python -m infra.processes.guard PID WORD``: when stdin closes, end what process PID had started under the name WORD.

The starting process holds the other end of the pipe. The kernel closes it when that process ends, however it ends, so a
killed driver leaves none of the processes of its local Ray cluster. Ray's agents rename themselves and get another parent
when theirs dies, so the guard notes them while the driver runs: the driver's children with WORD (Ray's session) in their
command line, and everything below them.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from contextlib import suppress

import psutil

from infra.processes.words import words_of

LOOK_SECONDS = 2.0  # between two looks for new processes
WAIT_SECONDS = 10.0  # that the processes have to end by themselves, as most do


def guard_session() -> subprocess.Popen[bytes] | None:
    """Start the guard of the Ray session whose processes this process has started; None if there is no session.

    Close its ``stdin`` once the session has been shut down.
    """
    names = {
        match[0]
        for process in psutil.Process().children(recursive=True)
        for match in re.finditer(r"session_\d{4}-[\w-]+", " ".join(words_of(process)))
    }
    if len(names) != 1:
        return None
    command = [sys.executable, "-m", "infra.processes.guard", str(os.getpid()), names.pop()]
    # A session of its own: a signal to the process group (Ctrl-C) must not end the guard before its charges.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def watch(driver: int, word: str) -> list[psutil.Process]:
    """Note the processes of a driver until stdin closes, and return them."""
    noted: dict[int, psutil.Process] = {}
    while True:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(driver).children():
                if any(word in text for text in words_of(child)) and child.pid != os.getpid():
                    noted |= {process.pid: process for process in (child, *child.children(recursive=True))}
        if select.select([0], [], [], LOOK_SECONDS)[0] and not os.read(0, 1):
            return list(noted.values())


def end_all(processes: list[psutil.Process], seconds: float = WAIT_SECONDS) -> list[int]:
    """Wait until the processes have ended, and end those that still run. Return the ids of these."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):  # also raised if another process has its number now
            process.kill()
    return [process.pid for process in left]


if __name__ == "__main__":
    end_all(watch(int(sys.argv[1]), sys.argv[2]))
