"""Run a command that prints what nodes answer, with limits of time: one for its start, one from its start on."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from infra.processes.with_parent import command_with_parent

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class NodeCommand:
    """A command that starts the doctor on one or several nodes.

    Attributes:
        words: the command line, which other users of the machine can read.
        secrets: environment variables that the node reads from its standard input.
        variables: the whole environment of the command; None takes that of this process.
    """

    words: Sequence[str]
    secrets: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] | None = None


def output_of(
    command: NodeCommand, seconds: float, *, has_started: Callable[[str], bool] | None = None, wait: float | None = None
) -> tuple[str, str]:  # fmt: skip
    """Run a command and return what it printed on stdout and on stderr; a command that is too slow is ended.

    Args:
        command: what to run.
        seconds: limit from the start on.
        has_started: tells from a printed line that the nodes have started; None counts from now on.
        wait: limit for the start in seconds; None waits without limit.
    """
    with subprocess.Popen(
        command_with_parent(list(command.words)), stdin=subprocess.PIPE if command.secrets else subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=None if command.variables is None else dict(command.variables),
    ) as process:  # fmt: skip
        started = threading.Event()
        if has_started is None:
            started.set()
        printed: tuple[list[str], list[str]] = ([], [])
        readers = [
            threading.Thread(target=_read, args=(stream, lines, has_started, started), daemon=True)
            for stream, lines in zip((process.stdout, process.stderr), printed, strict=True)
        ]
        for reader in readers:
            reader.start()
        if process.stdin is not None:
            _give_secrets(process.stdin, command.secrets)
        try:
            problem = _wait(process, started, seconds, wait)
        finally:
            if process.poll() is None:
                process.terminate()
        for reader in readers:
            reader.join()
    out, err = ("".join(lines) for lines in printed)
    return out, f"{err}\n{problem}" if problem else err


def _give_secrets(stream: IO[str], secrets: Mapping[str, str]) -> None:
    with suppress(BrokenPipeError):  # the command has ended; it says why
        stream.write(json.dumps(dict(secrets)) + "\n")
        stream.close()


def _read(
    stream: IO[str], lines: list[str], has_started: Callable[[str], bool] | None, started: threading.Event
) -> None:
    for line in stream:
        lines.append(line)
        if has_started is not None and has_started(line):
            started.set()


def _wait(process: subprocess.Popen[str], started: threading.Event, seconds: float, wait: float | None) -> str:
    """Wait until the process ends or a limit is reached; return which limit, or an empty string."""
    begun = time.monotonic()
    while process.poll() is None and not started.is_set():
        if wait is not None and time.monotonic() - begun > wait:
            return f"no allocation within {wait:g} s (--wait)"
        time.sleep(LOOK_SECONDS)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    return ""
