"""Exit notes: one small file per rank in the run's folder that says how the rank ended.

A killed process (SIGKILL, out of memory) cannot report anything, and a launcher may end the surviving ranks before one of
them has reported the loss. So every rank writes a note when it starts, rewrites it whenever it ends in a way that it can
notice, and removes it after a clean exit. A note that still says ``running`` although its process is gone belongs to a rank
that was killed. The launching command reads the notes when the job has ended (pretrain.launch.postmortem), so that the log
names the lost rank whichever process was quicker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from infra import distributed
from infra.files import read_text, write_json

FOLDER = "ranks"
# Variable with the path of a file for the line of wrong input that ends the ranks, for the program that has started them. A
# note cannot hold it: the input may be the run's folder.
PROBLEM_FILE = "YAWARE_PROBLEM_FILE"
RUNNING, TERMINATED = "running", "ended by SIGTERM"


@dataclass
class ExitNote:
    """The content of one note."""

    rank: int
    host: str
    pid: int
    ending: str = RUNNING  # or TERMINATED, "ended by the watchdog", "failed: RuntimeError: ..."
    verdict: str = ""  # the watchdog's line about the lost rank, if this rank knew it
    attempt: str = ""  # the start of a SLURM job, see ``distributed.slurm_attempt``


class RankNote:
    """``with RankNote(run_folder): train()`` keeps this rank's note in ``run_folder/ranks``.

    In the main thread it also handles SIGTERM, except while another handler is installed: the note is written before the
    process ends with status 143. A thread does this, because the main thread may wait in a collective.

    Args:
        run_folder: folder that holds the notes of all ranks.
        before_termination: called after SIGTERM, before the process ends; it may wait for the watchdog's verdict.
    """

    def __init__(self, run_folder: Path, before_termination: Callable[[], None] = lambda: None) -> None:
        self.note = ExitNote(distributed.rank(), socket.gethostname(), os.getpid(), attempt=distributed.slurm_attempt())
        self._path = run_folder / FOLDER / f"rank-{self.note.rank:05d}.json"
        self._before_termination = before_termination
        self._lock = threading.Lock()
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> RankNote:
        self._write()
        if threading.current_thread() is threading.main_thread():
            self._handle_sigterm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._restore()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()  # fails while other ranks have notes
        else:
            # Before SIGTERM has its old handler: a launcher sends it to all ranks once one has died, and it would end this one
            # before its note is written, which then looks like that of the rank that was killed.
            self.end(f"failed: {type(error).__name__}: {first_line(error)}")
            self._restore()

    def end(self, ending: str, verdict: str = "") -> None:
        """Write how this rank ends and, if known, why the job ends. The first verdict is kept."""
        with self._lock:
            self.note.ending, self.note.verdict = ending, self.note.verdict or verdict
            self._write()

    def report(self, verdict: str) -> None:
        """Write why the job ends, while this rank still runs."""
        self.end(self.note.ending, verdict)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not change how a rank ends
            write_json(self._path, asdict(self.note))

    def _handle_sigterm(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        old_handler = signal.signal(signal.SIGTERM, _noted)
        old_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._await_sigterm, args=(read_end,), name="exit note", daemon=True)
        thread.start()

        def restore() -> None:
            signal.set_wakeup_fd(old_wakeup)
            signal.signal(signal.SIGTERM, old_handler)
            os.close(write_end)
            thread.join(timeout=5)
            os.close(read_end)

        self._restore = restore

    def _await_sigterm(self, read_end: int) -> None:
        while received := os.read(read_end, 64):
            if signal.SIGTERM in received and signal.getsignal(signal.SIGTERM) is _noted:
                self.end(TERMINATED if self.note.ending == RUNNING else self.note.ending)
                self._before_termination()
                os._exit(128 + signal.SIGTERM)


def _noted(number: int, frame: Any) -> None:
    """A Python handler, so that the interpreter writes the signal's number to the wake-up file descriptor."""


def read_notes(run_folder: Path) -> list[ExitNote]:
    """Return the notes in ``run_folder``, ordered by rank. Unreadable files are left out."""
    names, notes = {field.name for field in fields(ExitNote)}, []
    for path in sorted((run_folder / FOLDER).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            content = json.loads(read_text(path))
            notes.append(ExitNote(**{name: value for name, value in content.items() if name in names}))
    return notes


def remove_notes(run_folder: Path, host: str | None = None) -> None:
    """Remove the notes of an earlier job; with ``host`` only those of that host's ranks."""
    for path in (run_folder / FOLDER).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            if host is None or json.loads(read_text(path)).get("host") == host:
                path.unlink()


def tell_problem(error: Exception) -> None:
    """Write an error's text to the file of `PROBLEM_FILE`, if the program that started this rank named one."""
    if path := os.environ.get(PROBLEM_FILE):
        with contextlib.suppress(OSError):
            Path(path).write_text(str(error), encoding="utf-8")


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]
