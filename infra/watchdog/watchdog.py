"""Ends a job whose ranks cannot go on and names the rank that is to blame.

A collective waits for ever for a rank that was killed, hangs or was cut off from the network. Therefore each rank announces
what it begins (``phase("the loading of batch 41")``), and a thread of it sends this status to rank 0 over a TCP connection
that is separate from the collectives; rank 0 answers with its own. No clocks of different hosts are compared, and a step
needs no further collective.

The watchdog ends the job, with one line on every host and exit status 75 (EX_TEMPFAIL: start the same command again), if

- a rank's process died, or a rank failed with an exception that the others do not share: within ``GRACE_SECONDS``
- a rank sends no message for T seconds: its process is stopped, or its host is lost or cut off
- a rank hangs: no rank has begun fewer phases, and no rank of its phase has gone on for T seconds. They count from when the
  last rank had come to that phase: until then the others may have waited for it. Start-up, the first step (which may compile)
  and checkpoints may take ``SLOW_SECONDS`` if that is longer.

If the hanging code also holds Python's lock, ``faulthandler`` prints the stacks and ends the process after T seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from infra import distributed
from infra.errors import UserError
from infra.watchdog.exit_note import RankNote, first_line
from infra.watchdog.wire import RankStatus, Wire, describe, listen

EXIT_STATUS = 75
SLOW_SECONDS = 300.0
GRACE_SECONDS = 5.0  # from the death of a rank to the end of the others, which may be about to end by themselves
TICK_SECONDS = 0.2

_current: Watchdog | None = None


def phase(text: str, slow: bool = False) -> None:
    """Announce that this rank begins ``text`` (a noun phrase: "the loading of batch 41").

    Every rank begins the same phases in the same order. ``slow`` allows the phase at least ``SLOW_SECONDS``.
    """
    if _current is not None:
        _current.begin(text, slow)


def beat() -> None:
    """Announce that this rank still makes progress in its phase; for long phases."""
    if _current is not None:
        _current.beat()


def steady() -> None:
    """Announce that the first step is done: from now on only a ``slow`` phase may take longer than T seconds."""
    if _current is not None:
        _current.warm = True


def connect() -> None:
    """Connect the watchdogs of all ranks once the process group exists. Collective."""
    if _current is not None:
        _current.connect()


def note_exit(run_folder: Path) -> contextlib.AbstractContextManager[Any]:
    """Keep this rank's exit note in ``run_folder`` (infra.watchdog.exit_note); without a watchdog this does nothing."""
    if _current is None:
        return contextlib.nullcontext()
    _current.note = RankNote(run_folder, _current.wait_for_verdict)
    return _current.note


class Watchdog:
    """``with Watchdog(600): train()`` ends this process, and the job, if it makes no progress for 600 s; 0 turns it off.

    Before ``connect`` a rank watches only itself.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.warm = seconds, False
        self._every = min(1.0, seconds / 10)
        self._grace = min(GRACE_SECONDS, seconds)
        self._own = RankStatus(distributed.rank(), socket.gethostname(), "the start", phase_limit=self._limit(True))
        self.note: RankNote | None = None
        self._ranks = {self._own.rank: self._own}
        self._wires: dict[int, Wire] = {}  # by rank; rank 0 has one to each rank, the others have one to rank 0
        self._unknown: list[Wire] = []  # connections to rank 0 that have not yet sent their rank
        self._listener: socket.socket | None = None
        self._token = ""
        self._fewest, self._all_there = -1, 0.0  # phases that every rank has begun, and since when, or a little later
        self._last_sent, self._phases_sent = 0.0, 0  # time of the last message, and phases begun by then
        self._verdict: tuple[str, list[int]] | None = None  # the line to print, and the ranks that it blames
        self._printed = ""
        self._leaving, self._stopped = False, threading.Event()
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        global _current
        if self.seconds > 0:
            _current = self
            address = f"{os.environ.get('MASTER_ADDR', 'this host')}:{os.environ.get('MASTER_PORT', '')}".rstrip(":")
            self.begin(f"the meeting of {distributed.world_size()} ranks at {address}")
            self._arm()
            self._thread.start()
        return self

    def begin(self, text: str, slow: bool = False) -> None:
        """See ``phase``."""
        own = self._own
        with self._lock:
            own.phases_begun, own.phase = own.phases_begun + 1, text
            own.phase_limit, own.phase_start = self._limit(slow), time.monotonic()

    def beat(self) -> None:
        """See ``beat`` of this module."""
        with self._lock:
            self._own.phase_start = time.monotonic()

    def connect(self) -> None:
        """See ``connect`` of this module. If a rank cannot reach rank 0's port, every rank goes on watching only itself."""
        if distributed.world_size() == 1:
            return
        self.begin("the connection of the watchdogs")
        wire, problem, address = None, "", os.environ["MASTER_ADDR"]
        if self._own.rank == 0:
            self._token, self._listener = secrets.token_hex(16), listen(address)
        port = self._listener.getsockname()[1] if self._listener else 0
        port, self._token, host = distributed.broadcast((port, self._token, self._own.host))
        if self._own.rank:
            try:
                wire = Wire(socket.create_connection((address, port), timeout=min(30.0, self.seconds)))
            except OSError as error:
                problem = str(error)
                print(f"watchdog: rank {self._own.rank} ({self._own.host}) cannot reach {address}:{port}: {error}; "
                      "each rank watches only itself", file=sys.stderr, flush=True)  # fmt: skip
        if distributed.reduce_scalars([float(bool(problem))], "max")[0]:
            return
        now = time.monotonic()
        with self._lock:
            others = range(1, distributed.world_size()) if self._own.rank == 0 else [0]
            for rank in others:
                name = host if rank == 0 else "unknown host"
                self._ranks[rank] = RankStatus(rank, name, "the start", last_message=now)
            if wire:
                self._wires[0] = wire
                self._last_sent = 0.0
                self._send(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        if _current is not self:
            return
        _current = None
        clean = error is None or (isinstance(error, SystemExit) and not error.code)
        with self._lock:
            self._own.ending = "left" if clean else f"failed: {type(error).__name__}: {first_line(error)}"
            self._leaving = True
        before = None
        if not clean and self._wires and _may_mean_a_lost_rank(error):
            if threading.get_ident() == self._main:
                # The launcher sends SIGTERM to all ranks once it sees that one has died. Name the dead rank first.
                before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._await_verdict()
        self._stopped.set()
        self._thread.join(timeout=self._grace)
        faulthandler.cancel_dump_traceback_later()
        self._send(time.monotonic() + self._every)
        if self._verdict and self._own.rank not in self._verdict[1]:
            self._end(self._verdict[0])
        for wire in (*self._wires.values(), *self._unknown):
            wire.close()
        if self._listener:
            self._listener.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)  # no rank was lost: SIGTERM ends this process again

    def wait_for_verdict(self) -> None:
        """Wait until the watchdog's thread has named a lost rank; only a moment if it knows of none."""
        time.sleep(3 * TICK_SECONDS)
        if self._printed:
            self._await_verdict()

    def _await_verdict(self) -> None:
        deadline = time.monotonic() + 2 * self._grace
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 4)

    def _limit(self, slow: bool) -> float:
        return self.seconds if self.warm and not slow else max(self.seconds, SLOW_SECONDS)

    def _run(self) -> None:
        armed = time.monotonic()
        while not self._stopped.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - armed > self._every:
                self._arm()
                armed = now
            with self._lock:
                self._own.last_message = now
                self._accept()
                self._receive(now)
                if self._verdict is None:
                    self._judge(now)
                self._send(now)
                if self._verdict and not self._leaving:
                    self._end(self._verdict[0])

    def _arm(self) -> None:
        # This timer runs in a C thread without Python's lock: it fires when the watchdog's thread cannot run.
        faulthandler.dump_traceback_later(self.seconds + self._grace, exit=True)

    def _accept(self) -> None:
        if len(self._ranks) == 1:
            return  # another rank may connect before `connect` has gone on here; it would be taken for a stranger
        while self._listener is not None:
            try:
                self._unknown.append(Wire(self._listener.accept()[0]))
            except BlockingIOError:
                break
        for wire in list(self._unknown):
            messages = wire.receive()
            rank = messages[0].get("rank", -1) if messages and messages[0].get("token") == self._token else None
            if rank in self._ranks and rank != 0 and rank not in self._wires:
                self._wires[rank] = wire
                self._ranks[rank].update(messages[-1], time.monotonic())
                self._unknown.remove(wire)
            elif messages or wire.closed:
                wire.close()
                self._unknown.remove(wire)

    def _receive(self, now: float) -> None:
        for rank, wire in self._wires.items():
            for message in wire.receive():
                self._ranks[rank].update(message, now)
                if self._verdict is None and "verdict" in message:
                    self._verdict = (str(message["verdict"]), list(message["ranks"]))
            if wire.closed and self._ranks[rank].lost_time is None:
                self._ranks[rank].lost_time, self._ranks[rank].lost_reason = now, wire.closed

    def _judge(self, now: float) -> None:
        """Print at once which rank died; end the job after the others had time to end by themselves."""
        others = [s for s in self._ranks.values() if s is not self._own]
        died = [s for s in others if s.lost_time is not None and not s.ending]
        failed = [s for s in others if s.ending.startswith("failed")]
        if died or failed:
            seconds = now - min((s.lost_time if died else s.ending_time) or now for s in died or failed)
            if died and seconds > TICK_SECONDS:
                self._print(describe(died, self._ranks.values(), now))
            if seconds > (2 * TICK_SECONDS if self._leaving and died else self._grace):
                self._decide(died or failed, now)
            return
        silent = [s for s in others if not s.ending and now - s.last_message > self.seconds]
        stuck = self._stuck(now)
        if silent or stuck:
            self._decide(silent or stuck, now)

    def _stuck(self, now: float) -> list[RankStatus]:
        """Return the ranks furthest behind if none of them has gone on for too long. Only rank 0 knows all."""
        if self._own.rank != 0 and 0 in self._wires and self._ranks[0].ending != "left":
            return []
        running = [s for s in self._ranks.values() if not s.ending and (s is self._own or s.rank in self._wires)]
        if not running:
            return []
        fewest = min(s.phases_begun for s in running)
        if fewest != self._fewest:  # the last rank has come: its phase, this one or a later one, began no earlier
            self._fewest, self._all_there = fewest, max(s.phase_start for s in running)
        behind = [s for s in running if s.phases_begun == fewest]
        # If one of them has stopped sending messages, it is to blame; the others only wait in the same phase. As long as one
        # of them goes on, those that do not may wait for it.
        behind = [s for s in behind if s is not self._own and now - s.last_message > 3 * self._every + 1] or behind
        return behind if all(now - max(s.phase_start, self._all_there) > s.phase_limit for s in behind) else []

    def _decide(self, culprits: list[RankStatus], now: float) -> None:
        if self._own in culprits:
            self._own.source_line = self._source_line()
        self._verdict = (describe(culprits, self._ranks.values(), now), [s.rank for s in culprits])

    def _send(self, now: float) -> None:
        nothing_new = self._own.phases_begun == self._phases_sent and self._verdict is None
        if nothing_new and now - self._last_sent < self._every:
            return
        self._last_sent, self._phases_sent = now, self._own.phases_begun
        if self._own.seconds_in_phase(now) > self._own.phase_limit / 2:
            self._own.source_line = self._source_line()
        message: dict[str, Any] = {"token": self._token, **self._own.message(now)}
        if self._verdict and self._own.rank == 0:
            message |= {"verdict": self._verdict[0], "ranks": self._verdict[1]}
        for wire in self._wires.values():
            wire.send(message)

    def _source_line(self) -> str:
        """Return the innermost line of this project that the main thread executes."""
        root = str(Path(__file__).resolve().parents[2])
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(root + os.sep) and os.sep + "." not in name.removeprefix(root):
                return f"{os.path.relpath(name, root)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def _print(self, text: str) -> None:
        if not self._printed:
            self._printed = text
            # os.write, because the main thread may hold the lock of sys.stderr.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())
            if self.note:
                self.note.report(text)

    def _end(self, text: str) -> None:
        """End the process without the main thread, which may wait in a collective for ever."""
        self._print(text)
        if self.note:
            self.note.end("ended by the watchdog", text)
        if self._own.rank == 0:
            time.sleep(2 * TICK_SECONDS)  # for the others to read the verdict before the connection closes
        os._exit(EXIT_STATUS)


def _may_mean_a_lost_rank(error: BaseException | None) -> bool:
    """Return whether an error may come from a collective. This project's own errors are the same on every rank."""
    own = isinstance(error, (UserError, KeyboardInterrupt, SystemExit))
    return isinstance(error, RuntimeError) and not own and type(error).__module__.startswith(("builtins", "torch"))
