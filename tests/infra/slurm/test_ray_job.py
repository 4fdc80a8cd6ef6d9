"""A batch job on Ray: the address of its head, which ends are continued, and what is said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from infra.distributed import FIRST_PORT, PORTS
from infra.errors import UserError
from infra.slurm import ray_job, requeue
from infra.slurm.ray_job import end_job, head_address, why_unfinished
from infra.slurm.requeue import read_requeues
from tests.runs import ROOT

JOB = {"SLURM_JOB_ID": "12"}
RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}


def test_a_job_on_one_node_stays_on_loopback():
    assert head_address(["a"], "a", 7) == f"127.0.0.1:{FIRST_PORT + 7}"


def test_the_head_listens_on_the_interface_to_the_other_nodes():
    # All of 127.0.0.0/8 is reached from 127.0.0.1; the name of this node is never asked for.
    assert (
        head_address(["this-node.invalid", "127.0.0.9"], "this-node.invalid", PORTS + 3)
        == f"127.0.0.1:{FIRST_PORT + 3}"
    )


def test_a_port_of_another_job_is_not_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", FIRST_PORT + 11))
        assert head_address(["a"], "a", 11) == f"127.0.0.1:{FIRST_PORT + 12}"


def test_an_unknown_node_is_named():
    with pytest.raises(UserError, match=r"node no-such-node.invalid of the job cannot be reached from a"):
        head_address(["a", "no-such-node.invalid"], "a", 1)


@pytest.mark.parametrize(
    ("status", "job", "lost", "again", "reason"),
    [
        (138, RUNNING, False, True, "stopped by SIGUSR1"),
        (143, RUNNING, False, True, "stopped by SIGTERM"),
        (1, {**RUNNING, "PreemptTime": "2026-01-01"}, False, True, "preempted"),
        (137, RUNNING, False, True, "killed by signal 9 (out of memory, perhaps)"),
        (75, RUNNING, False, True, "Ray has failed"),
        (1, RUNNING, True, True, "failed after the loss of a worker node"),
        (1, RUNNING, False, False, "ended with status 1"),
        (2, RUNNING, True, False, "ended with status 2"),
    ],
)
def test_a_command_continues_unless_it_failed_by_itself(status, job, lost, again, reason):
    assert why_unfinished(status, job, lost) == (again, reason)


@pytest.fixture
def asked(monkeypatch):
    """What scontrol was asked; it shows a running job and agrees to requeue it."""
    calls = []

    def scontrol(*words):
        calls.append(words)
        return "JobState=RUNNING PreemptTime=None", ""

    monkeypatch.setattr(requeue, "scontrol", scontrol)
    return calls


def test_an_unfinished_command_is_queued_again_within_the_bounds(asked, tmp_path, capsys):
    record = tmp_path / "record"
    for restart in range(4):
        assert end_job(137, False, record, {**JOB, "SLURM_RESTART_COUNT": str(restart)}) == 75
    *again, last = capsys.readouterr().out.splitlines()
    killed = "job: killed by signal 9 (out of memory, perhaps)"
    assert again == [f"{killed}; requeueing job 12 ({n} of at most 100 times)" for n in (1, 2, 3)]
    assert last == (f"{killed}; job 12 is not queued again: 3 requeues brought no progress (YAWARE_RESTARTS=3); the same "
                    "command continues")  # fmt: skip
    assert [words for words in asked if words[0] == "requeue"] == [("requeue", "12")] * 3


def test_stops_by_slurm_are_bounded_by_the_number_of_all_restarts_only(asked, tmp_path):
    record = tmp_path / "record"
    for restart in range(8):
        assert end_job(143, False, record, {**JOB, "SLURM_RESTART_COUNT": str(restart)}) == 75
    assert len(read_requeues(record)) == 8


def test_a_success_removes_the_record(tmp_path):
    (tmp_path / "record").write_text("{}")
    assert end_job(0, True, tmp_path / "record", JOB) == 0
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_a_job_that_slurm_ends_is_left_alone(monkeypatch, tmp_path, capsys, state):
    monkeypatch.setattr(ray_job, "show_job", lambda number: ({"JobState": state}, ""))
    assert end_job(143, False, tmp_path / "record", JOB) == 143
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("command", "well"),
    [
        ("exit 0", True),
        ("exit 3", False),
        ("trap 'exit 0' TERM; while :; do sleep 0.1; done", False),
        ("trap '' TERM; while :; do sleep 0.1; done", False),
    ],
)
def test_a_job_step_of_workers_that_does_not_end_is_ended(monkeypatch, command, well):
    monkeypatch.setattr(ray_job, "END_SECONDS", 2)
    with subprocess.Popen(["sh", "-c", command]) as workers:
        assert ray_job._end_well(workers) == well


def test_a_python_without_packages_can_start_the_nodes():
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import infra.slurm.ray_job; print(infra.slurm.ray_job.main([]))"],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@pytest.mark.parametrize(
    ("variables", "python"),
    [
        ({}, sys.executable),
        ({"YAWARE_PYTHON": "/image"}, sys.executable),
        ({"YAWARE_HOST_PYTHON": "/host", "YAWARE_PYTHON": "/image"}, "/image"),
        ({"YAWARE_HOST_PYTHON": "/host"}, ".venv/bin/python"),
    ],
)
def test_the_nodes_have_the_python_of_the_image_beside_one_of_the_host(variables, python):
    assert ray_job.node_python(variables) == python


def test_a_node_without_srun_is_one_line(monkeypatch, capsys, tmp_path):
    for name, value in {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "a",
        "SLURMD_NODENAME": "a",
        "PATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    assert ray_job.main(["evaluate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "yaware: error: srun is not found on a; put SLURM's commands on PATH. An Apptainer image has none"
    )
    assert error.count("\n") == 1


def test_outside_a_job_one_line_says_what_is_missing(monkeypatch, capsys):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    assert ray_job.main(["evaluate"]) == 2
    assert capsys.readouterr().err == (
        "yaware: error: SLURM_JOB_ID is not set; start this with sbatch, see infra/launch/README.md\n"
    )
