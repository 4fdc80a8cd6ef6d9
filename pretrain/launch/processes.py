"""The processes of a started job: its ranks on this host, how they are asked to stop, and which of them died first."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.files import read_text
from infra.processes.words import words_of

LOOK_SECONDS = 0.1
# Between two searches for new ranks, which read the table of processes: at first, and long after the last new rank.
SEARCH_SECONDS, RARE_SEARCH_SECONDS = 0.5, 5.0


@dataclass(frozen=True)
class Death:
    """The end of a rank's process as seen from outside.

    Attributes:
        rank: its global rank.
        order: increases from one death to the next; equal numbers have no known order.
        signal_name: the signal that ended it, as "SIGKILL"; empty if it exited or if this is not known.
    """

    rank: int
    order: int
    signal_name: str = ""


class RankObserver:
    """Watches the ranks below a launcher's process, so that the first to die can be named afterwards.

    On Linux it waits for process file descriptors with epoll, which reports events in the order in which they happened,
    even if this process could not look in between. Elsewhere, deaths between two looks have no order.
    """

    def __init__(self, launcher: int) -> None:
        self.deaths: list[Death] = []
        self._launcher = launcher
        self._ranks: dict[int, int] = {}  # process id -> rank, of all processes ever seen
        self._alive: dict[int, psutil.Process] = {}  # by process id
        self._descriptors: dict[int, int] = {}  # pidfd -> process id
        self._epoll = select.epoll() if hasattr(os, "pidfd_open") and hasattr(select, "epoll") else None
        self._order, self._next_search, self._search_seconds = 0, 0.0, SEARCH_SECONDS

    def look(self) -> None:
        """Find new ranks and note the dead ones. Cheap enough to be called every ``LOOK_SECONDS``."""
        if time.monotonic() >= self._next_search:
            known = len(self._ranks)
            for process in local_ranks(self._launcher):
                if process.pid not in self._ranks:
                    self._add(process)
            settled = self._ranks and len(self._ranks) == known
            self._search_seconds = min(1.5 * self._search_seconds, RARE_SEARCH_SECONDS) if settled else SEARCH_SECONDS
            self._next_search = time.monotonic() + self._search_seconds
        for descriptor, _ in self._epoll.poll(0) if self._epoll else []:
            self._order += 1
            self._note_death(self._descriptors.pop(descriptor))
            os.close(descriptor)  # also removes it from the epoll
        self._order += 1
        for pid in set(self._alive) - set(self._descriptors.values()):
            if _ended(self._alive[pid]):
                self._note_death(pid)

    @property
    def running(self) -> str:
        """The ranks that were alive at the last look, with their process ids; empty if there are none."""
        return ", ".join(
            f"rank {rank} (process {pid})" for rank, pid in sorted((self._ranks[p], p) for p in self._alive)
        )

    def close(self) -> None:
        """Close the file descriptors."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        if self._epoll:
            self._epoll.close()

    def _add(self, process: psutil.Process) -> None:
        if (rank := _rank_of(process)) is None:
            return  # it is found again by the next search
        self._ranks[process.pid], self._alive[process.pid] = rank, process
        if self._epoll:
            with suppress(OSError):  # ended already, or an old kernel: `look` asks for its state instead
                descriptor = os.pidfd_open(process.pid)
                self._epoll.register(descriptor, select.EPOLLIN)
                self._descriptors[descriptor] = process.pid

    def _note_death(self, pid: int) -> None:
        self.deaths.append(Death(self._ranks[pid], self._order, _ending_signal(self._alive.pop(pid))))


def local_ranks(launcher: int) -> list[psutil.Process]:
    """Return the training processes below a launcher's process, without processes that they have forked."""
    ranks = {p.pid: p for p in _below(launcher) if any(word.startswith("--local_rank") for word in words_of(p))}
    return [process for process in ranks.values() if _parent(process) not in ranks]


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
    if any(Path(word).name == "pdsh" for process in _below(launcher.pid) for word in words_of(process)[:2]):
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


def _parent(process: psutil.Process) -> int:
    """Return the process id of a process's parent; 0 if it has ended."""
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return 0


def _rank_of(process: psutil.Process) -> int | None:
    """Return a training process's global rank, or its rank on this host if its environment cannot be read.

    None if the process has just been started: for a moment its environment is empty.
    """
    with suppress(psutil.Error, OSError, KeyError, ValueError):
        environment = process.environ()
        if not environment:
            return None
        return int(environment["RANK"])
    numbers = [word.partition("=")[2] for word in words_of(process) if word.startswith("--local_rank")]
    return int(numbers[0]) if numbers and numbers[0].isdigit() else 0


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _ending_signal(process: psutil.Process) -> str:
    """Return the signal that ended a process, if its parent has not collected it yet; else an empty string."""
    try:
        # The last field is the wait status; its low seven bits are the signal.
        status = int(read_text(Path(f"/proc/{process.pid}/stat")).rsplit(None, 1)[1])
        return signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ""
    except (OSError, ValueError, IndexError):
        return ""


def signal_name(number: Any) -> str:
    """Return a signal's name, as "SIGKILL"; empty if there is no such signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""
