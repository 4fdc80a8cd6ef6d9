"""``python -m infra.processes.with_parent PID COMMAND ...`` becomes COMMAND, which gets SIGTERM when process PID ends.

A killed process (kill -9, out of memory) cannot end what it has started. On Linux the kernel does it (PR_SET_PDEATHSIG); the
setting is kept when the process becomes another program. Elsewhere COMMAND runs without it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def end_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to send this process SIGTERM when its parent ends. Does nothing outside Linux.

    Args:
        parent: the process that should be the parent; if it has ended already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def command_with_parent(command: Sequence[str]) -> list[str]:
    """Return the command line that runs ``command`` so that it ends with this process."""
    return [sys.executable, "-m", "infra.processes.with_parent", str(os.getpid()), *command]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
