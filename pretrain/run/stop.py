"""Stop requests: SIGTERM, SIGINT and SIGUSR1 (SLURM's preemption, Ctrl-C) end a run after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Records a signal. Each step asks for it once, after its forward pass, so that all ranks stop after the same step.

    A signal before that moment ends the run after the current step. A later one (backward pass, logging, monitor,
    checkpoint) is noticed in the next step, which then is the last. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Install the signal handlers. Does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._record) for number in SIGNALS}

    def forget(self) -> None:
        """Restore the handlers that were installed before ``listen``."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    @property
    def name(self) -> str:
        """The signal's name; the name of a signal to another rank is not known here."""
        return self.received.name if self.received else "a signal to another rank"

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received != signal.SIGINT:  # the starting process may pass Ctrl-C on as SIGUSR1
            self.received = signal.Signals(number)
