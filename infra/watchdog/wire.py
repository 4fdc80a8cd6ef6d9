"""Messages between the watchdogs of a job: the status of each rank, as JSON lines over TCP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 3  # ranks that a line lists by name; a job may have hundreds


@dataclass
class RankStatus:
    """What is known about a rank. Times are ``time.monotonic()`` of the host that keeps the record."""

    rank: int
    host: str
    phase: str
    phases_begun: int = 0
    phase_limit: float = float("inf")  # seconds that the rank may stay in this phase
    phase_start: float = field(default_factory=time.monotonic)
    last_message: float = field(default_factory=time.monotonic)
    source_line: str = ""  # the line that its main thread executes, known if the phase takes long
    ending: str = ""  # "left" or "failed: ..." after the rank has announced its end
    ending_time: float | None = None
    lost_time: float | None = None  # when its connection broke
    lost_reason: str = ""

    def seconds_in_phase(self, now: float) -> float:
        """Return how long the rank has been in its phase."""
        return now - self.phase_start

    def message(self, now: float) -> dict[str, Any]:
        """Return this status as a message to other ranks; the phase's start becomes an age."""
        names = ("rank", "host", "phase", "phases_begun", "phase_limit", "source_line", "ending")
        return {**{name: getattr(self, name) for name in names}, "seconds_in_phase": self.seconds_in_phase(now)}

    def update(self, message: dict[str, Any], now: float) -> None:
        """Take over a ``message`` from that rank."""
        self.host, self.phase = str(message["host"]), str(message["phase"])
        self.source_line, self.ending = str(message["source_line"]), str(message["ending"])
        self.phases_begun, self.phase_limit = int(message["phases_begun"]), float(message["phase_limit"])
        if self.ending and self.ending_time is None:
            self.ending_time = now
        self.phase_start, self.last_message = now - float(message["seconds_in_phase"]), now

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Wire:
    """JSON lines over a non-blocking socket. A message is dropped while an earlier one still waits to be sent."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._inbox, self._outbox = connection, b"", b""
        self.closed = ""  # the reason, once the connection is closed

    def send(self, message: dict[str, Any]) -> None:
        """Send as much as fits into the system's buffer."""
        if not self._outbox:
            self._outbox = json.dumps(message).encode() + b"\n"
        try:
            self._outbox = self._outbox[self._socket.send(self._outbox) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._close(error)

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived. Input that is not JSON, or a line above 1 MB, closes the wire."""
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
    """Return a listening socket on a free port of ``address``, or of all addresses if it is not one of this host."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    try:
        listener = socket.create_server((address, 0), family=family, backlog=1024)
    except OSError:
        listener = socket.create_server(("", 0), family=family, backlog=1024)
    listener.setblocking(False)
    return listener


def describe(culprits: list[RankStatus], all_ranks: Iterable[RankStatus], now: float) -> str:
    """Return one line: which ranks hold the job up and in which phase, and in which phase the others wait.

    >>> describe([b], [a, b], now)
    'watchdog: rank 1 (host-b) has not moved for 30 s in the loading of batch 41 (data_pipeline/loading/loader.py:133); ...
    """
    faults = "; ".join(f"{status} {_fault(status, now)}" for status in culprits[:SHOWN])
    more = f"; and {len(culprits) - SHOWN} more" if len(culprits) > SHOWN else ""
    by_phase: dict[str, list[RankStatus]] = {}
    for status in all_ranks:
        if status not in culprits and status.ending != "left":
            by_phase.setdefault(status.phase, []).append(status)
    waits = "; ".join(f"{_list_ranks(group)} waited in {phase}" for phase, group in by_phase.items())
    return (
        f"watchdog: {faults}{more}{'; ' + waits if waits else ''}; the same command continues from the last checkpoint"
    )


def _fault(status: RankStatus, now: float) -> str:
    source = f" ({status.source_line})" if status.source_line else ""
    if status.ending.startswith("failed"):
        return f"has {status.ending.replace(':', f' in {status.phase}:', 1)}"
    if status.lost_time is not None:
        return f"has died ({status.lost_reason}) in {status.phase}"
    # A hanging rank still sends a message every second. A rank that sends none is stopped, or its host is cut off.
    silent, in_phase = now - status.last_message, status.seconds_in_phase(now)
    if silent > 2 and silent > in_phase / 2:
        return f"has sent no message for {silent:.0f} s; its last phase was {status.phase}{source}"
    return f"has not moved for {in_phase:.0f} s in {status.phase}{source}"


def _list_ranks(group: list[RankStatus]) -> str:
    more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
    return ", ".join(str(status) for status in group[:SHOWN]) + more
