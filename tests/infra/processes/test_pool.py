"""Worker processes compute in order, raise the errors of the function, and need no guard in the caller's script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from infra.errors import UserError
from infra.processes.pool import map_in_processes
from tests.runs import ROOT


def slow_for_even(number):
    time.sleep(0.05 * (number % 2 == 0))
    return number, os.getpid()


def refuse_three(number):
    if number == 3:
        raise UserError("number=3 is not allowed")
    return number


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_after_the_result(number):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return number


def wait_for(number):
    Path(number).write_text(str(os.getpid()))
    time.sleep(3)


def children():
    return {child.pid for child in psutil.Process().children()}


def test_results_come_in_order_from_several_processes():
    before = children()
    found = list(map_in_processes(slow_for_even, range(9), 3))
    assert [number for number, _ in found] == list(range(9))
    assert 2 <= len({pid for _, pid in found}) <= 3
    assert os.getpid() not in {pid for _, pid in found}
    assert children() <= before


def test_no_task_starts_no_process():
    assert list(map_in_processes(refuse_three, [], 4)) == []


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [(refuse_three, UserError, "number=3 is not allowed"), (die_at_three, RuntimeError, "worker process has died")],
)
def test_an_error_or_a_death_ends_all_workers(function, error, words):
    before = children()
    with pytest.raises(error, match=words):
        list(map_in_processes(function, range(20), 2))
    assert children() <= before


def test_a_worker_that_dies_while_it_waits_is_named_too():
    results = map_in_processes(die_after_the_result, range(3), 1)
    assert next(results) == 0
    time.sleep(1)
    with pytest.raises(RuntimeError, match=f"worker process has died .status {-signal.SIGKILL}"):
        next(results)


def test_workers_end_with_a_killed_caller(tmp_path):
    code = f"""
from infra.processes.pool import map_in_processes
from tests.infra.processes.test_pool import wait_for
list(map_in_processes(wait_for, {[str(tmp_path / name) for name in "ab"]!r}, 2))
"""
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while sum(1 for path in tmp_path.iterdir() if path.read_text()) < 2:
        assert caller.poll() is None
        time.sleep(0.05)
    workers = [psutil.Process(int(path.read_text())) for path in tmp_path.iterdir()]
    caller.kill()
    caller.wait()
    _, alive = psutil.wait_procs(workers, timeout=90)
    assert not alive


def test_a_script_without_a_guard_can_simulate_a_cohort(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import yaware\nprint(yaware.simulate_cohort('cohort', participants=6, spacing=12, workers=2))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "cohort").rglob("*.nii.gz"))) >= 6
