"""``python -m infra.processes.guard PID``: when stdin closes, end the processes of the local Ray cluster of process PID.

The starting process holds the other end of the pipe. The kernel closes it when that process ends, however it ends, so a
killed driver leaves none of the processes of its local Ray cluster. Ray's agents rename themselves and get another parent
when theirs dies, so the guard notes them while the driver runs: the driver's children with the name of a Ray session in
their command line, and everything below them. It starts before the cluster, whose start takes seconds.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from infra.processes.words import words_of

SESSION = re.compile(r"session_\d{4}-[\w-]+")
LOOK_SECONDS = 2.0  # between two looks for new processes
SOON_SECONDS = 0.25  # the same while the cluster starts: until no process was new for START_SECONDS
START_SECONDS = 20.0
WAIT_SECONDS = 10.0  # that the processes have to end by themselves, as most do


def guard_session() -> subprocess.Popen[bytes]:
    """Start the guard of the local Ray cluster that this process starts next.

    Close its ``stdin`` once the cluster has been shut down.
    """
    command = [sys.executable, "-m", "infra.processes.guard", str(os.getpid())]
    # A session of its own: a signal to the process group (Ctrl-C) must not end the guard before its charges.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def watch(driver: int) -> list[psutil.Process]:
    """Note the processes of a driver's Ray cluster until stdin closes, and return them."""
    noted: set[psutil.Process] = set()
    newest = time.monotonic()
    while True:
        ended = bool(select.select([0], [], [], 0)[0] and not os.read(0, 1))
        # When the driver has ended, its children have another parent, but still their own children.
        found = _below(noted) if ended else _below({child for child in _children(driver) if _of_ray(child)})
        if found - noted:
            newest = time.monotonic()
        noted |= found
        if ended:
            return list(noted)
        starting = time.monotonic() - newest < START_SECONDS
        select.select([0], [], [], SOON_SECONDS if starting else LOOK_SECONDS)


def _children(process: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process).children())
    except psutil.NoSuchProcess:
        return []


def _of_ray(process: psutil.Process) -> bool:
    return process.pid != os.getpid() and any(SESSION.search(text) for text in words_of(process))


def _below(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Return some processes and everything below them."""
    found = set(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= set(process.children(recursive=True))
    return found


def end_all(processes: list[psutil.Process], seconds: float = WAIT_SECONDS) -> list[int]:
    """Wait until the processes have ended, and end those that still run. Return the ids of these."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):  # also raised if another process has its number now
            process.kill()
    return [process.pid for process in left]


if __name__ == "__main__":
    end_all(watch(int(sys.argv[1])))
