"""A stopped or killed rank of a real run is named in the log, the other ranks end, and the same command continues exactly."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra.watchdog import EXIT_STATUS
from tests.faults.rank_process import run_ranks
from tests.runs import ROOT, environment, losses, pretrain_command

STEPS, SECONDS = 12, 15
# Longer than anything takes on a loaded machine, for tests in which no rank hangs.
LONG = 120
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[int, psutil.Process]]]:
    """Start the command; yield it and its ranks' processes after six steps."""
    with (folder / "run.log").open("wb") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=log, stderr=log)
    limit = time.monotonic() + 600
    try:
        while len(losses(folder / "run")) < 6:
            assert launcher.poll() is None, (folder / "run.log").read_text()[-3000:]
            assert time.monotonic() < limit, "the run did not reach six steps"
            time.sleep(0.02)
        yield launcher, dict(ranks_of(launcher.pid))
    finally:
        if launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
        launcher.kill()
        launcher.wait()


def ranks_of(pid: int) -> Iterator[tuple[int, psutil.Process]]:
    for process in psutil.Process(pid).children(recursive=True):
        words, parent = " ".join(process.cmdline()), process.parent()
        rank = re.search(r"-m pretrain\.train --local_rank=(\d+)", words)
        forked = parent is not None and "--local_rank" in " ".join(parent.cmdline())  # by a rank; same command line
        if rank and "deepspeed" not in words and not forked:
            yield int(rank[1]), process


def command_for(shards: Path, folder: Path, world: int, seconds: float) -> list[str]:
    more = [f"--launch.ranks={world}", "--batch.global=6", f"--train.watchdog_seconds={seconds}"]
    return pretrain_command(shards, folder / "run", STEPS, *more)


@pytest.mark.jobs
def test_a_stopped_rank_ends_the_other_and_a_restart_continues_exactly(shards, tmp_path):
    command = command_for(shards, tmp_path, 2, SECONDS)
    with running(command, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        while ranks[0].is_running() and ranks[0].status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - stopped < SECONDS + 60, "rank 0 still waits for the stopped rank"
            time.sleep(0.1)
        assert time.monotonic() - stopped > SECONDS - 2
        # The launcher now ends the stopped rank too: at once if it is continued, otherwise after 30 s.
        ranks[1].send_signal(signal.SIGCONT)
        assert launcher.wait(timeout=120) == EXIT_STATUS
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("watchdog: rank 1 ")]
    assert re.search(r"has sent no message for \d+ s; its last phase was the .* (step|batch) \d+", lines[0])
    assert re.search(r"; rank 0 \(.*\) waited in the .* step \d+; the same command continues", lines[0])
    interrupted = losses(tmp_path / "run")
    assert 6 <= len(interrupted) < STEPS, "stopped too late to show anything"
    run_ranks(command, tmp_path)
    again = losses(tmp_path / "run")
    assert [step for step, _ in again] == list(range(STEPS))
    assert again[: len(interrupted)] == interrupted


def last_line(folder: Path) -> str:
    return (folder / "run.log").read_text().strip().splitlines()[-1]


@pytest.mark.jobs
def test_a_killed_rank_of_three_is_named_at_the_end(shards, tmp_path):
    with running(command_for(shards, tmp_path, 3, LONG), tmp_path) as (launcher, ranks):
        assert sorted(ranks) == [0, 1, 2]
        ranks[2].kill()
        killed = time.monotonic()
        assert launcher.wait(timeout=LONG) != 0
        assert time.monotonic() - killed < LONG, "the watchdog waited for the hang limit"
    # Either a surviving rank's watchdog was quicker, or the launcher.
    watchdog, launcher = r"has died \(its connection closed\) in the ", r"was killed by SIGKILL \(out of memory"
    assert re.match(rf"pretrain: rank 2 \(.*\) ({watchdog}|{launcher})", last_line(tmp_path))


@pytest.mark.jobs
def test_a_killed_rank_is_named_although_no_other_rank_can_report_it(shards, tmp_path):
    """The surviving ranks are stopped before the kill, and killed as soon as the launcher has sent them SIGTERM."""
    with running(command_for(shards, tmp_path, 3, LONG), tmp_path) as (launcher, ranks):
        for rank in (0, 1):
            ranks[rank].send_signal(signal.SIGSTOP)
        ranks[2].kill()
        limit = time.monotonic() + LONG
        while not any(sigterm_is_pending(ranks[rank].pid) for rank in (0, 1)):
            assert time.monotonic() < limit, "the launcher did not end the others"
            time.sleep(0.01)
        for rank in (0, 1):
            ranks[rank].kill()
        assert launcher.wait(timeout=LONG) != 0
    assert "watchdog: " not in (tmp_path / "run.log").read_text()
    assert re.match(r"pretrain: rank 2 \(.*\) was killed by SIGKILL \(out of memory", last_line(tmp_path))


def sigterm_is_pending(pid: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"ShdPnd:\s*(\w+)", text)[0], 16) >> (signal.SIGTERM - 1) & 1)
