"""What a killed process has started ends, and a process may open as many files as the system allows."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress

import psutil
import pytest

from infra.processes.guard import end_all
from infra.processes.with_parent import command_with_parent
from infra.processes.words import words_of
from tests.runs import ROOT

DRIVER = """
import subprocess, sys, time
from infra.processes.with_parent import command_with_parent
child = subprocess.Popen(command_with_parent(sys.argv[1:]))
print(child.pid, flush=True)
time.sleep(100)
"""
BELOW = "import subprocess; below = subprocess.Popen(['sleep', '100']); print(below.pid, flush=True); below.wait()"
GUARDED = """
import os, subprocess, sys, time
from infra.processes.guard import guard_session
guard = guard_session()  # before the processes that it guards
charge = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, text=True)
below = int(charge.stdout.readline())
other = subprocess.Popen(["sleep", "100"])
print(charge.pid, below, other.pid, guard.pid, flush=True)
time.sleep(100)
"""


def ends(pid, seconds=40.0):
    """Wait for a process that is not a child of this one."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def become(pid, name):
    """Wait until a process has become another program."""
    limit = time.monotonic() + 20
    while psutil.Process(pid).name() != name:
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_command_ends_when_the_process_that_started_it_is_killed():
    driver = start(DRIVER, "sleep", "100")
    child = int(driver.stdout.readline())
    become(child, "sleep")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert ends(child)


def test_a_command_whose_starter_has_ended_before_does_not_run(tmp_path):
    command = command_with_parent(["touch", str(tmp_path / "ran")])
    assert command[:3] == [sys.executable, "-m", "infra.processes.with_parent"]
    done = subprocess.run([*command[:3], "1", *command[4:]], cwd=ROOT)
    assert done.returncode == -signal.SIGTERM
    assert not (tmp_path / "ran").exists()


def test_a_command_keeps_its_arguments_output_and_status(tmp_path):
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(
        command_with_parent([sys.executable, "-c", code, "a b", "$x", ""]), cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stdout) == (7, b"['a b', '$x', '']\n")


def test_the_guard_ends_what_a_killed_driver_has_left():
    driver = start(GUARDED, f"session_2026-{uuid.uuid4()}", BELOW)
    charge, below, other, guard = map(int, driver.stdout.readline().split())
    time.sleep(3)  # the guard has looked once
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    try:
        assert ends(charge)
        assert ends(below)
        assert ends(guard)
        assert psutil.pid_exists(other), "a process that is none of the session's was ended"
    finally:
        os.kill(other, signal.SIGKILL)


STARTS_RAY = "from infra.ray_cluster import session\nwith session(1): input()"


@pytest.mark.distributed
def test_a_driver_that_is_killed_while_its_cluster_starts_leaves_none_of_it():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen([sys.executable, "-c", STARTS_RAY], cwd=ROOT, env=environment, stdin=subprocess.PIPE)
    limit, family = time.monotonic() + 100, []
    while not any("Agent" in " ".join(words_of(process)) for process in family):  # an agent that has renamed itself
        assert driver.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
        family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    try:
        assert [process.pid for process in family if not ends(process.pid)] == []
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_end_all_returns_what_did_not_end_by_itself():
    long, short = subprocess.Popen(["sleep", "100"]), subprocess.Popen(["sleep", "0.1"])
    assert end_all([psutil.Process(process.pid) for process in (long, short)], seconds=3) == [long.pid]
    assert long.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.parametrize("soft", [64, 256])
def test_the_limit_of_open_files_is_raised_to_the_hard_one(soft):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from infra.processes.limits import raise_open_files
print(raise_open_files(), raise_open_files())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.stdout.split() == [str(hard)] * 2
