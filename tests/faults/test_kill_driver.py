"""SIGKILL to ``yaware pretrain`` itself: its ranks save and end, and the same command continues the run."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from pretrain.launch.orphans import end_orphans
from pretrain.launch.processes import local_ranks
from tests.listening import reachable
from tests.runs import ROOT, environment, losses, pretrain_command, run

STEPS = 40


@pytest.mark.jobs
@pytest.mark.distributed
def test_no_rank_trains_on_after_its_command_was_killed(shards, tmp_path):
    command = pretrain_command(shards, tmp_path / "run", STEPS, "--checkpoint.every_steps=1000")
    log = (tmp_path / "killed.log").open("w")
    started = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=log, stderr=log)
    limit = time.monotonic() + 200
    while len(losses(tmp_path / "run")) < 3:
        assert started.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        assert time.monotonic() < limit
        time.sleep(0.02)
    below = psutil.Process(started.pid).children(recursive=True)
    assert len(local_ranks(started.pid)) == 2
    assert not reachable(below), "the store of the ranks, gloo and the watchdog listen on loopback"
    started.send_signal(signal.SIGKILL)
    started.wait()
    _, alive = psutil.wait_procs(below, timeout=100)
    assert not alive, [process.cmdline() for process in alive]
    done = len(losses(tmp_path / "run"))
    assert done < STEPS, "the run had ended before it was killed"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
    again = run(command, tmp_path)
    assert again.returncode == 0
    assert f"resuming after step {done}" in again.stdout
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(STEPS))


def write_note(run_folder, rank, pid, host=None):
    (run_folder / "ranks").mkdir(parents=True, exist_ok=True)
    note = {"rank": rank, "host": host or socket.gethostname(), "pid": pid, "ending": "running", "verdict": ""}
    (run_folder / "ranks" / f"rank-{rank:05d}.json").write_text(json.dumps(note))


def test_the_next_start_ends_the_ranks_that_were_left_and_says_so(tmp_path, capfd):
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    left = subprocess.Popen([*sleep, "--local_rank=0"])
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; print(subprocess.Popen(sys.argv[2:]).pid, flush=True); input()",
         "local_ranks", *sleep, "--local_rank=1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    of_a_running_job = int(launcher.stdout.readline())
    no_rank, elsewhere = subprocess.Popen(sleep), subprocess.Popen([*sleep, "--local_rank=3"])
    try:
        write_note(tmp_path, 0, left.pid)
        write_note(tmp_path, 1, of_a_running_job)
        write_note(tmp_path, 2, no_rank.pid)  # the number of a process that has ended, given to another one
        write_note(tmp_path, 3, elsewhere.pid, host="another")
        write_note(tmp_path, 4, 2**22 + 1)
        assert end_orphans(tmp_path, seconds=20) == [left.pid]
        assert f"ending rank 0 (process {left.pid}), left by a job that was killed" in capfd.readouterr().err
        assert left.poll() is not None
        assert psutil.pid_exists(of_a_running_job)
        assert no_rank.poll() is None
        assert elsewhere.poll() is None
    finally:
        psutil.Process(of_a_running_job).kill()
        for process in (left, launcher, no_rank, elsewhere):
            process.kill()
            process.wait()
