"""Ranks that a killed job has left on this host, found by the notes in the run's folder."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from infra.processes.words import words_of
from infra.watchdog.exit_note import read_notes

WAIT_SECONDS = 60.0  # a rank has so long to finish its step and its checkpoint


def end_orphans(run_folder: Path, seconds: float = WAIT_SECONDS) -> list[int]:
    """End the ranks on this host that still train in ``run_folder`` although what started them has ended; say so.

    They are asked to save and end, and killed after ``seconds``. Return their process ids.
    """
    orphans = []
    for note in read_notes(run_folder):
        if note.host != socket.gethostname():
            continue
        with suppress(psutil.Error, ValueError):
            process = psutil.Process(note.pid)
            if _is_rank(process) and not _has_launcher(process):
                orphans.append((note.rank, process))
    for rank, process in orphans:
        print(f"ending rank {rank} (process {process.pid}), left by a job that was killed", file=sys.stderr, flush=True)
        with suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs([process for _, process in orphans], timeout=seconds)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return [process.pid for _, process in orphans]


def _is_rank(process: psutil.Process) -> bool:
    return any(word.startswith("--local_rank") for word in words_of(process))


def _has_launcher(process: psutil.Process) -> bool:
    """Whether the launcher is still the parent; False once the rank has been re-parented."""
    parent = process.parent()
    return parent is not None and any("local_ranks" in word or "deepspeed" in word for word in words_of(parent))
