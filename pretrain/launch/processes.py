"""The processes of a started job: its ranks on this host, how they are asked to stop, and which of them died first."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LOOK_SECONDS, SEARCH_SECONDS = 0.1, 1.0


@dataclass(frozen=True)
class Death:
    """The end of a rank's process as seen from outside.

    Attributes:
        rank: its global rank.
        look: number of the look that found it dead; deaths of one look have no order.
        signal_name: the signal that ended it, as "SIGKILL"; empty if it exited or if this is not known.
    """

    rank: int
    look: int
    signal_name: str = ""


@dataclass
class RankObserver:
    """Watches the ranks below a launcher's process, so that the first to die can be named afterwards."""

    launcher: int  # process id
    deaths: list[Death] = field(default_factory=list)
    _alive: dict[int, psutil.Process] = field(default_factory=dict)  # by rank
    _seen: set[int] = field(default_factory=set)  # process ids
    _looks: int = 0
    _next_search: float = 0.0

    def look(self) -> None:
        """Find new ranks and note the dead ones. Cheap enough to be called every ``LOOK_SECONDS``."""
        self._looks += 1
        if time.monotonic() >= self._next_search:
            self._next_search = time.monotonic() + SEARCH_SECONDS
            for process in local_ranks(self.launcher):
                if process.pid not in self._seen:
                    self._seen.add(process.pid)
                    self._alive[_rank_of(process)] = process
        for rank, process in list(self._alive.items()):
            dead, signal_name = _state(process)
            if dead:
                self.deaths.append(Death(rank, self._looks, signal_name))
                del self._alive[rank]

    @property
    def running(self) -> str:
        """The ranks that were alive at the last look, with their process ids; empty if there are none."""
        return ", ".join(f"rank {rank} (process {process.pid})" for rank, process in sorted(self._alive.items()))


def local_ranks(launcher: int) -> list[psutil.Process]:
    """Return the training processes below a launcher's process."""
    return [p for p in _below(launcher) if any(word.startswith("--local_rank") for word in _words(p))]


def stop_local_ranks(launcher: subprocess.Popen[bytes]) -> None:
    """Ask the ranks below ``launcher`` to save and end; before any has started, end everything below it.

    The ranks get SIGUSR1 themselves: on SIGTERM, DeepSpeed's launcher would kill them after 30 s.
    """
    if not _ask_local_ranks(launcher):
        for process in _below(launcher.pid):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _terminate(launcher)


def stop_over_pdsh(launcher: subprocess.Popen[bytes]) -> None:
    """End the ranks on all hosts by DeepSpeed's own handler of SIGTERM, which needs its pdsh process alive.

    A hostfile with a single host starts its ranks here, without pdsh: these are asked to save.
    """
    if any(Path(word).name == "pdsh" for process in _below(launcher.pid) for word in _words(process)[:2]):
        _terminate(launcher)
    else:
        stop_local_ranks(launcher)


def _ask_local_ranks(launcher: subprocess.Popen[bytes]) -> bool:
    ranks = local_ranks(launcher.pid)
    for process in ranks:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    return bool(ranks)


def _terminate(launcher: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        launcher.send_signal(signal.SIGTERM)


def _below(launcher: int) -> list[psutil.Process]:
    """Return all processes that a launcher's process has started; none if it has ended."""
    try:
        return list(psutil.Process(launcher).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _words(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it has ended."""
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _rank_of(process: psutil.Process) -> int:
    """Return a training process's global rank, or its rank on this host if its environment cannot be read."""
    with suppress(psutil.Error, OSError, KeyError, ValueError):
        return int(process.environ()["RANK"])
    numbers = [word.partition("=")[2] for word in _words(process) if word.startswith("--local_rank")]
    return int(numbers[0]) if numbers and numbers[0].isdigit() else 0


def _state(process: psutil.Process) -> tuple[bool, str]:
    """Return whether a process has ended, and the signal that ended it if its parent has not collected it yet."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return False, ""
        # The last field is the wait status; its low seven bits are the signal.
        status = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(None, 1)[1])
        return True, signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ""
    except (psutil.Error, OSError, ValueError, IndexError):
        return True, ""


def signal_name(number: Any) -> str:
    """Return a signal's name, as "SIGKILL"; empty if there is no such signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""
