"""A rank that hangs, dies or fails ends the whole job in time, and the log of every rank names it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.distributed import free_port
from infra.watchdog import EXIT_STATUS, Watchdog
from infra.watchdog.wire import RankStatus, describe
from tests.runs import ROOT

SECONDS = 3
pytestmark = pytest.mark.distributed


def start(world: int, actions: dict[str, str], folder: Path, seconds: float = SECONDS) -> list[subprocess.Popen[bytes]]:
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = [sys.executable, "-m", "tests.infra.watchdog.watchdog_rank", str(seconds), json.dumps(actions)]
    ranks = []
    for rank in range(world):
        with (folder / f"rank{rank}.log").open("wb") as log:
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(script, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return ranks


def statuses(ranks: list[subprocess.Popen[bytes]], timeout: float = 60) -> list[int]:
    """Return the exit status of each rank; fail if one still runs after ``timeout``."""
    limit = time.monotonic() + timeout
    try:
        return [rank.wait(timeout=max(0.1, limit - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def verdict(folder: Path, rank: int) -> str:
    lines = [line for line in (folder / f"rank{rank}.log").read_text().splitlines() if line.startswith("watchdog: ")]
    assert len(lines) == 1, (folder / f"rank{rank}.log").read_text()
    return lines[0]


@pytest.mark.parametrize("culprit", [0, 2])
def test_every_rank_names_a_hanging_rank_and_its_source_line(tmp_path, culprit):
    ranks = start(3, {str(culprit): "hang"}, tmp_path)
    assert statuses(ranks) == [EXIT_STATUS] * 3
    for rank in range(3):
        line = verdict(tmp_path, rank)
        assert f"watchdog: rank {culprit} (" in line
        assert "has not moved for 3 s in the loading of batch 3" in line
        assert line.count("waited in the exchange of step 3") == 1
        for other in {0, 1, 2} - {culprit}:
            assert f"rank {other} (" in line.split(";")[1]
    assert "(tests/infra/watchdog/watchdog_rank.py:" in verdict(tmp_path, culprit)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_killed_rank_is_named_and_ends_the_others(tmp_path, culprit):
    ranks = start(3, {str(culprit): "hang"}, tmp_path, seconds=60)
    wait_for_text(tmp_path / f"rank{culprit}.log", "at step 3")
    time.sleep(1)  # for the others to reach the exchange
    killed = time.monotonic()
    ranks[culprit].kill()
    expected = [EXIT_STATUS] * 3
    expected[culprit] = -9
    assert statuses(ranks) == expected
    assert time.monotonic() - killed < 15, "the watchdog waited for the hang limit although the process was gone"
    for rank in {0, 1, 2} - {culprit}:
        assert f"rank {culprit} (" in verdict(tmp_path, rank)
        assert "has died (its connection closed) in the loading of batch 3" in verdict(tmp_path, rank)


def test_survivors_name_the_dead_rank_although_a_launcher_sends_them_sigterm(tmp_path):
    ranks = start(3, {"1": "hang"}, tmp_path, seconds=60)
    wait_for_text(tmp_path / "rank1.log", "at step 3")
    time.sleep(1)
    ranks[1].kill()
    while any(ranks[rank].poll() is None for rank in (0, 2)):
        for rank in (0, 2):
            ranks[rank].terminate()
        time.sleep(0.02)
    assert statuses(ranks) == [EXIT_STATUS, -9, EXIT_STATUS]
    for rank in (0, 2):
        assert "rank 1 (" in verdict(tmp_path, rank)


def test_an_exception_on_one_rank_ends_the_others_and_its_traceback_is_printed(tmp_path):
    ranks = start(3, {"1": "raise"}, tmp_path, seconds=60)
    assert statuses(ranks) == [EXIT_STATUS, 1, EXIT_STATUS]
    assert "Traceback" in (tmp_path / "rank1.log").read_text()
    assert f"SIGTERM: {signal.SIG_DFL}" in (tmp_path / "rank1.log").read_text(), "SIGTERM can no longer end the rank"
    for rank in (0, 2):
        assert "has failed in the loading of batch 3: RuntimeError: out of memory" in verdict(tmp_path, rank)


def test_the_watchdog_is_silent_about_an_exception_on_all_ranks(tmp_path):
    ranks = start(2, dict.fromkeys("01", "raise everywhere"), tmp_path)
    assert statuses(ranks) == [1, 1]
    for rank in range(2):
        text = (tmp_path / f"rank{rank}.log").read_text()
        assert "SameEverywhere: out of memory" in text
        assert "watchdog:" not in text


def test_a_rank_that_hangs_while_holding_pythons_lock_ends(tmp_path):
    ranks = start(2, {"1": "hold python's lock"}, tmp_path)
    assert statuses(ranks) == [EXIT_STATUS, 1]
    assert "rank 1 (" in verdict(tmp_path, 0)
    assert "Thread 0x" in (tmp_path / "rank1.log").read_text()


def test_slow_ranks_that_make_progress_are_not_ended(tmp_path):
    ranks = start(2, {"1": "take twice as long but beat", "checkpoint": "slow"}, tmp_path)
    assert statuses(ranks) == [0, 0]
    assert all((tmp_path / f"rank{rank}.log").read_text().strip().endswith("done") for rank in range(2))


def watchdog_of_three():
    """Return the watchdog of rank 0, and what it knows of ranks 1 and 2; all have begun nine phases."""
    watch = Watchdog(SECONDS)
    others = {rank: RankStatus(rank, "host", "the ninth phase", 9, SECONDS) for rank in (1, 2)}
    watch._own.phases_begun, watch._own.phase_limit = 9, SECONDS
    watch._ranks |= others
    watch._wires = dict.fromkeys(others, object())
    return watch, others[1], others[2]


def test_a_rank_that_waited_long_for_a_slow_one_is_not_blamed_when_that_one_comes():
    (watch, waiting, slow), now = watchdog_of_three(), time.monotonic()
    watch._own.phase_start = waiting.phase_start = now - 2 * SECONDS
    slow.phases_begun, slow.phase_start = 8, now
    assert watch._stuck(now) == [], "the slow rank is in its loading and has just beaten"
    slow.phases_begun, slow.phase_start = 9, now + 0.1
    assert watch._stuck(now + 0.1) == [], "all are in the exchange since a moment ago"
    slow.phases_begun, watch._own.phases_begun = 10, 10
    slow.phase_start = watch._own.phase_start = now + 0.2
    assert watch._stuck(now + 0.3) == [], "rank 1 has left the exchange too, but its message is on its way"
    assert watch._stuck(now + SECONDS + 0.2) == [waiting], "rank 1 hangs in the exchange"


def test_a_rank_that_waits_is_not_blamed_while_another_goes_on_in_the_same_phase():
    (watch, waiting, slow), now = watchdog_of_three(), time.monotonic()
    watch._own.phase_start = waiting.phase_start = slow.phase_start = now
    waiting.last_message = slow.last_message = now + 5 * SECONDS  # they send messages all the time
    assert watch._stuck(now) == []
    for step in range(1, 4):  # rank 2 embeds its scans, the others have embedded theirs
        slow.phase_start = now + step * SECONDS
        assert watch._stuck(now + (step + 0.5) * SECONDS) == []
    assert watch._stuck(now + 4.5 * SECONDS) == [watch._own, waiting, slow], "none of them has gone on"


@pytest.mark.parametrize("late", ["0", pytest.param("1", marks=pytest.mark.jobs)])
def test_a_rank_that_is_slow_to_connect_is_not_lost(tmp_path, late):
    ranks = start(2, {"late": late, "1": "take twice as long but beat"}, tmp_path, seconds=60)
    assert statuses(ranks) == [0, 0]
    assert all("watchdog: " not in (tmp_path / f"rank{rank}.log").read_text() for rank in range(2))


def test_zero_seconds_turn_the_watchdog_off(tmp_path):
    ranks = start(2, {"1": "take twice as long but beat"}, tmp_path, seconds=0)
    assert statuses(ranks) == [0, 0]


def test_the_line_is_short_with_hundreds_of_ranks():
    everyone = [RankStatus(rank, f"host-{rank // 8}", "the exchange of step 7") for rank in range(256)]
    for status in everyone[100:108]:
        status.phase, status.lost_time = "the forward pass of step 7", status.phase_start
        status.lost_reason = "its connection closed"
    line = describe(everyone[100:108], everyone, everyone[0].phase_start + 5)
    assert "rank 100 (host-12) has died" in line
    assert "and 5 more; rank 0 (host-0), rank 1 (host-0), rank 2 (host-0) and 245 more waited in" in line
    assert len(line) < 600


def wait_for_text(path: Path, text: str) -> None:
    limit = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < limit, path.read_text()
        time.sleep(0.05)
