"""Stop requests: SIGTERM, SIGINT and SIGUSR1 (SLURM's preemption, Ctrl-C) end a run after its step."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes a signal; each step asks once, after its forward pass, so that all ranks write a checkpoint at one step.

    A signal up to there ends the run after that step. One that comes later (backward pass, logging, monitor, checkpoint)
    is asked about in the next step, which is the last then.
    A second Ctrl-C acts at once, as it would have without this.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        """Take over the signals; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def forget(self) -> None:
        """Give the signals back to Python."""
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    @property
    def name(self) -> str:
        """The signal's name; another rank's is not known here."""
        return self.received.name if self.received else "a signal to another rank"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
