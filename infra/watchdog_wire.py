"""What the watchdogs of a job tell each other: standings, as JSON lines over TCP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 3  # ranks named one by one; a job may have hundreds


@dataclass
class Standing:
    """Where a rank stands, by its own word. Times are those of ``time.monotonic()`` on the host that keeps the record."""

    rank: int
    host: str
    phase: str
    count: int = 0  # phases begun so far
    limit: float = float("inf")  # seconds it may stay in this phase
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    where: str = ""  # source line of its main thread, once it has been long in a phase
    word: str = ""  # how it took its leave: "left" or "failed: ..."
    word_at: float | None = None  # when
    gone: float | None = None  # when its connection broke
    reason: str = ""  # why

    def idle(self, now: float) -> float:
        """Seconds in its phase."""
        return now - self.since

    def message(self, now: float) -> dict[str, Any]:
        """What is told to others."""
        names = ("rank", "host", "phase", "count", "limit", "where", "word")
        return {**{name: getattr(self, name) for name in names}, "idle": self.idle(now)}

    def update(self, message: dict[str, Any], now: float) -> None:
        """Take in a ``message`` of that rank."""
        self.host, self.phase, self.where = str(message["host"]), str(message["phase"]), str(message["where"])
        self.count, self.limit = int(message["count"]), float(message["limit"])
        self.word = str(message["word"])
        if self.word and self.word_at is None:
            self.word_at = now
        self.since, self.heard = now - float(message["idle"]), now

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Wire:
    """JSON lines over a socket that never blocks: a line is left out while an earlier one still waits to be sent."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._inbox, self._outbox = connection, b"", b""
        self.closed = ""  # why, once it is

    def send(self, message: dict[str, Any]) -> None:
        """Send what fits into the system's buffer."""
        if not self._outbox:
            self._outbox = json.dumps(message).encode() + b"\n"
        try:
            self._outbox = self._outbox[self._socket.send(self._outbox) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._close(error)

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; a stranger's noise closes the wire."""
        try:
            while block := self._socket.recv(1 << 16):
                self._inbox += block
                if len(self._inbox) > 1 << 20:
                    raise OSError("no line in a megabyte")
            self.closed = self.closed or "its connection closed"
        except BlockingIOError:
            pass
        except OSError as error:
            self._close(error)
        *lines, self._inbox = self._inbox.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.closed = "it sent no JSON"
            return []
        return messages

    def _close(self, error: OSError) -> None:
        broken = isinstance(error, (ConnectionResetError, BrokenPipeError))
        self.closed = self.closed or ("its connection closed" if broken else f"its connection broke: {error}")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of ``address``; of every address where that is not this host's own."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        listener = socket.create_server((address, 0), family=family, backlog=1024)
    except OSError:
        listener = socket.create_server(("", 0), family=family, backlog=1024)
    listener.setblocking(False)
    return listener


def describe(culprits: list[Standing], everyone: Iterable[Standing], now: float) -> str:
    """One line: who holds the job up, in what, and in what the others wait.

    >>> describe([b], [a, b], now)
    'watchdog: rank 1 (host-b) has not moved for 30 s in the loading of batch 41 (data_pipeline/loading/loader.py:133); ...
    """
    named = culprits[:SHOWN]
    what = "; ".join(f"{standing} {_trouble(standing, now)}" for standing in named)
    more = f"; and {len(culprits) - SHOWN} more" if len(culprits) > SHOWN else ""
    waiting = [s for s in everyone if s not in culprits and s.word != "left"]
    groups: dict[str, list[Standing]] = {}
    for standing in waiting:
        groups.setdefault(standing.phase, []).append(standing)
    waits = "; ".join(f"{_listed(group)} waited in {phase}" for phase, group in groups.items())
    return f"watchdog: {what}{more}{'; ' + waits if waits else ''}; the same command continues from the last checkpoint"


def _trouble(standing: Standing, now: float) -> str:
    where = f" ({standing.where})" if standing.where else ""
    if standing.word.startswith("failed"):
        return f"has {standing.word.replace(':', f' in {standing.phase}:', 1)}"
    if standing.gone is not None:
        return f"has died ({standing.reason}) in {standing.phase}"
    # A rank that hangs is still heard of every second; of a silent one only old news is known.
    silent, idle = now - standing.heard, standing.idle(now)
    if silent > 2 and silent > idle / 2:
        return f"has not been heard of for {silent:.0f} s; it was last in {standing.phase}{where}"
    return f"has not moved for {idle:.0f} s in {standing.phase}{where}"


def _listed(group: list[Standing]) -> str:
    more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
    return ", ".join(str(standing) for standing in group[:SHOWN]) + more
