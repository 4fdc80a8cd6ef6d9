"""Show the progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from infra.lean_imports import start_collecting

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Count ``total`` units of work, and show the rate and the remaining time.

    ``done`` units count as finished at the start, for example in a resumed run; the rate leaves them out.

    >>> with Progress(120, "scans", "building shards") as progress:
    ...     progress.advance(12, quarantined=1)
    """

    def __init__(self, total: int, unit: str, title: str, done: int = 0, stream: TextIO | None = None) -> None:
        start_collecting()
        self.total, self.unit, self.title, self.done = total, unit, title, done
        self._first, self._stream = done, stream or sys.stdout
        self._started = self._last_line = time.monotonic()
        self._values: dict[str, Any] = {}
        self._bar: Any = None
        if self._stream.isatty():
            self._bar, self._task = _rich_bar(title, total, done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, n: int = 1, **values: Any) -> None:
        """Count ``n`` more units as done; ``values`` (loss, rate, ...) are shown beside the count."""
        self.done += n
        self._values.update(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, values=self.describe())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def describe(self) -> str:
        """Return rate, remaining time and the current values, in one line."""
        seconds = time.monotonic() - self._started
        rate = (self.done - self._first) / seconds if seconds > 0 else 0.0
        remaining = f", {clock((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        extra = "".join(f", {name} {_short(value)}" for name, value in self._values.items())
        return f"{rate:.3g} {self.unit}/s{remaining}{extra}"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self.title}: {self.done}/{self.total} {self.unit}, {self.describe()}", file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """Format seconds as ``45 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rich_bar(title: str, total: int, done: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Rich

    bar = Rich(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"))
    return bar, bar.add_task(title, total=total, completed=done, values="")
