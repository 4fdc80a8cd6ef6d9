"""Progress shows plain lines in a log and a bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from infra import progress
from infra.progress import Progress, clock
from tests.runs import ROOT


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (185, "3 min 05 s"), (7625, "2 h 07 min")])
def test_clock_formats_seconds(seconds, text):
    assert clock(seconds) == text


def test_plain_lines_hold_count_rate_remaining_time_and_values(monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(100, "steps", "pretraining x", done=20, stream=stream) as shown:
        for _ in range(20):
            now[0] += 2.0
            shown.advance(loss=1.23456789, memory="1.5 GB")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pretraining x: 25/100 steps, 0.5 steps/s, 2 min 30 s left, loss 1.235, memory 1.5 GB"
    assert len(lines) == 40 / progress.SECONDS_BETWEEN_LINES + 1
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_and_printed_lines_stay_whole():
    code = (
        "from infra.progress import Progress\n"
        "with Progress(3, 'steps', 'pretraining x') as shown:\n"
        "    for step in range(3): shown.advance(loss=0.5, lr=1e-4); print('printed', step)\n"
    )
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, 160)) if hasattr(termios, "tcsetwinsize") else None
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the child has closed its end
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    assert child.wait() == 0
    text = output.decode()
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert "3/3" in plain
    assert "loss 0.5, lr 0.0001" in plain
    assert all(re.search(rf"^printed {step}\s*$", plain, re.MULTILINE) for step in range(3))


def test_a_log_gets_plain_lines_with_count_and_values():
    stream = io.StringIO()
    with Progress(4, "scans", "building", stream=stream) as progress:
        for _ in range(4):
            progress.advance(quarantined=1)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("building: 4/4 scans, ")
    assert line.endswith(", quarantined 1")
