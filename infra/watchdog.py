"""Ends a job whose ranks cannot go on, and says who held it up.

A collective waits for ever for a rank that was killed, hangs or was cut off. Here each rank says what it begins
(``phase("the loading of batch 41")``), and a thread of it tells rank 0 over a TCP connection of its own, apart from the
collectives; rank 0 answers. Nobody's clock is compared with another's, and a step gains no collective.

What ends the job, with one line on every host and exit status 75 (EX_TEMPFAIL: start the same command again):

- a rank's process died, or left by an exception that the others do not share: within ``GRACE_SECONDS``
- a rank is not heard of for T seconds: stopped, or its host is lost or cut off
- a rank hangs: of all ranks it has begun the fewest phases, and it has been in the last for T seconds. Start-up, the
  first step (which may compile) and checkpoints may take ``SLOW_SECONDS`` where that is longer.

Where the hanging code also holds Python's lock, ``faulthandler`` prints the stacks and ends the process after T.
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
from infra.watchdog_wire import Standing, Wire, describe, listen

EXIT_STATUS = 75
SLOW_SECONDS = 300.0
GRACE_SECONDS = 5.0  # between the death of a rank and the end of the others, which may be about to leave by themselves
TICK_SECONDS = 0.2

_current: Watchdog | None = None


def phase(text: str, slow: bool = False) -> None:
    """This rank begins ``text`` (a noun phrase: "the loading of batch 41"). Every rank begins the same phases in turn."""
    if _current is not None:
        _current.begin(text, slow)


def beat() -> None:
    """This rank is still at work in its phase; for long phases that know of their own progress."""
    if _current is not None:
        _current.beat()


def steady() -> None:
    """The first step is done: from now on a phase may take T and no longer, unless it is begun as ``slow``."""
    if _current is not None:
        _current.warm = True


def connect() -> None:
    """Have the ranks watch each other, once the process group is up. Collective."""
    if _current is not None:
        _current.connect()


class Watchdog:
    """``with Watchdog(600): train()`` ends this process, and the job, when it has not moved for 600 s; 0 = off.

    Until ``connect`` a rank watches itself alone.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.warm = seconds, False
        self._every = min(1.0, seconds / 10)
        self._grace = min(GRACE_SECONDS, seconds)
        self._own = Standing(distributed.rank(), socket.gethostname(), "the start", limit=self._limit(True))
        self._ranks = {self._own.rank: self._own}
        self._wires: dict[int, Wire] = {}  # by rank; rank 0 has one to each, the others one to rank 0
        self._unknown: list[Wire] = []  # connected to rank 0, but did not say yet who they are
        self._listener: socket.socket | None = None
        self._token = ""
        self._sent, self._told = (
            0.0,
            0,
        )  # when this rank last sent its standing, and how many phases it had begun by then
        self._verdict: tuple[str, list[int]] | None = None
        self._said = ""
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
            own.count, own.phase, own.limit, own.since = own.count + 1, text, self._limit(slow), time.monotonic()

    def beat(self) -> None:
        """See ``beat`` of this module."""
        with self._lock:
            self._own.since = time.monotonic()

    def connect(self) -> None:
        """See ``connect`` of this module. Where a rank cannot reach rank 0's port, each goes on watching itself alone."""
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
                      "each rank watches itself alone", file=sys.stderr, flush=True)  # fmt: skip
        if distributed.reduce_scalars([float(bool(problem))], "max")[0]:
            return
        now = time.monotonic()
        with self._lock:
            others = range(1, distributed.world_size()) if self._own.rank == 0 else [0]
            for rank in others:
                self._ranks[rank] = Standing(rank, host if rank == 0 else "unknown host", "the start", heard=now)
            if wire:
                self._wires[0] = wire
                self._sent = 0.0
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
            self._own.word = "left" if clean else f"failed: {type(error).__name__}: {_first_line(error)}"
            self._leaving = True
        before = None
        if not clean and self._wires and _may_mean_a_lost_rank(error):
            if threading.get_ident() == self._main:
                # The launcher asks all ranks to end as soon as it sees that one has died; first it is said which.
                before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            deadline = time.monotonic() + 2 * self._grace
            while self._verdict is None and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS / 4)
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
            signal.signal(signal.SIGTERM, before)  # no rank was lost: what is left to do may be ended as ever

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
                self._own.heard = now
                self._accept()
                self._receive(now)
                if self._verdict is None:
                    self._judge(now)
                self._send(now)
                if self._verdict and not self._leaving:
                    self._end(self._verdict[0])

    def _arm(self) -> None:
        # A thread of C, which needs no lock of Python's: it fires where the watchdog's thread cannot run for so long.
        faulthandler.dump_traceback_later(self.seconds + self._grace, exit=True)

    def _accept(self) -> None:
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
            if wire.closed and self._ranks[rank].gone is None:
                self._ranks[rank].gone, self._ranks[rank].reason = now, wire.closed

    def _judge(self, now: float) -> None:
        """Say at once who died; decide that the job ends once the others had time to leave by themselves."""
        others = [s for s in self._ranks.values() if s is not self._own]
        died = [s for s in others if s.gone is not None and not s.word]
        failed = [s for s in others if s.word.startswith("failed")]
        if died or failed:
            seconds = now - min((s.gone if died else s.word_at) or now for s in died or failed)
            if died and seconds > TICK_SECONDS:
                self._say(describe(died, self._ranks.values(), now))
            if seconds > (2 * TICK_SECONDS if self._leaving and died else self._grace):
                self._decide(died or failed, now)
            return
        silent = [s for s in others if not s.word and now - s.heard > self.seconds]
        stuck = self._stuck(now)
        if silent or stuck:
            self._decide(silent or stuck, now)

    def _stuck(self, now: float) -> list[Standing]:
        """The ranks furthest behind, where one of them has been in its phase for too long; rank 0 alone knows them all."""
        if self._own.rank != 0 and 0 in self._wires and self._ranks[0].word != "left":
            return []
        running = [s for s in self._ranks.values() if not s.word and (s is self._own or s.rank in self._wires)]
        if not running:
            return []
        last = min(s.count for s in running)
        behind = [s for s in running if s.count == last]
        # A rank that fell silent while the others wait with it in the same phase is the one to name.
        behind = [s for s in behind if s is not self._own and now - s.heard > 3 * self._every + 1] or behind
        return behind if any(s.idle(now) > s.limit for s in behind) else []

    def _decide(self, culprits: list[Standing], now: float) -> None:
        if self._own in culprits:
            self._own.where = self._where()
        self._verdict = (describe(culprits, self._ranks.values(), now), [s.rank for s in culprits])

    def _send(self, now: float) -> None:
        if now - self._sent < self._every and self._own.count == self._told and self._verdict is None:
            return
        self._sent, self._told = now, self._own.count
        if self._own.idle(now) > self._own.limit / 2:
            self._own.where = self._where()
        message: dict[str, Any] = {"token": self._token, **self._own.message(now)}
        if self._verdict and self._own.rank == 0:
            message |= {"verdict": self._verdict[0], "ranks": self._verdict[1]}
        for wire in self._wires.values():
            wire.send(message)

    def _where(self) -> str:
        """The innermost line of this project that the main thread is in."""
        root = str(Path(__file__).resolve().parents[1])
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(root + os.sep) and os.sep + "." not in name.removeprefix(root):
                return f"{os.path.relpath(name, root)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def _say(self, text: str) -> None:
        if not self._said:
            self._said = text
            # The main thread may hold the lock of sys.stderr.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    def _end(self, text: str) -> None:
        """Leave without asking the main thread, which may wait in a collective for ever."""
        self._say(text)
        if self._own.rank == 0:
            time.sleep(2 * TICK_SECONDS)  # the others read the verdict before the connection closes
        os._exit(EXIT_STATUS)


def _may_mean_a_lost_rank(error: BaseException | None) -> bool:
    """Errors of a collective; what this project raises itself is the same on every rank."""
    own = isinstance(error, (UserError, KeyboardInterrupt, SystemExit))
    return isinstance(error, RuntimeError) and not own and type(error).__module__.startswith(("builtins", "torch"))


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
