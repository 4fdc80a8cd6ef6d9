"""A node of Ray in a job: its options, and a cluster of one node that runs a command, stops at a signal, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.slurm import ray_node, requeue
from infra.slurm.ray_job import head_address
from infra.slurm.ray_node import LEAST_STORE, MOST_STORE, object_store_bytes, start_arguments
from tests.listening import reachable
from tests.runs import ROOT


@pytest.mark.parametrize(
    ("memory", "shared", "expected"),
    [
        (16 * 2**30, 64 * 2**30, int(1.6 * 2**30)),
        (16 * 2**30, 2**30, 2**29),  # half of what is free in /dev/shm
        (2**29, 2**30, LEAST_STORE),
        (2**50, 2**50, MOST_STORE),
    ],
)
def test_the_object_store_is_a_share_of_the_jobs_memory(memory, shared, expected):
    assert object_store_bytes(memory, shared) == pytest.approx(expected, abs=1)


def test_memory_and_cpus_are_those_of_the_job_not_of_the_node(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    assert ray_node.memory_of_job() == 3000 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "500")
    assert ray_node.memory_of_job() == 500 * 2**20
    assert "--num-cpus=3" in start_arguments("worker", "10.0.0.1:20012", Path("/tmp/x"))


def test_only_the_head_has_a_fixed_port():
    head, worker = (start_arguments(role, "10.0.0.1:20012", Path("/tmp/x")) for role in ("head", "worker"))
    assert {"--head", "--node-ip-address=10.0.0.1", "--port=20012"} <= set(head)
    assert "--address=10.0.0.1:20012" in worker
    for words in (head, worker):
        assert {"--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--block"} <= set(
            words
        )


@pytest.mark.parametrize(
    ("nodes", "here", "lost", "asked"),
    [
        ("a,b,c", "b", False, 0),  # the head's node belongs to the job: it may come back
        ("b,c", "b", True, 1),
        ("b,c", "c", True, 0),  # node b does it
    ],
)
def test_the_first_node_that_is_left_queues_the_job_again(monkeypatch, tmp_path, capsys, nodes, here, lost, asked):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requeue, "scontrol", lambda *words: calls.append(words) or (f"NodeList={nodes}", ""))
    for name, value in {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": here}.items():
        monkeypatch.setenv(name, value)
    assert ray_node._requeued_without("a") == lost
    assert calls.count(("requeue", "12")) == asked
    line = "ray: node a was lost, with Ray's head; requeueing job 12 (1 of at most 100 times)\n"
    assert capsys.readouterr().out == line * asked


CODE = """
import os, sys, time
from infra.ray_cluster import session
with session() as ray:
    print("CPUs", ray.cluster_resources()["CPU"], flush=True)
    time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder of the cluster's own; its sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="yrn", dir="/tmp") as folder:
        yield Path(folder)


def start(scratch: Path, seconds: float, status: int) -> subprocess.Popen[str]:
    """Start the head of a cluster of one node, with a command that asks it for its CPUs and ends with a status."""
    command = [sys.executable, "-m", "infra.slurm.ray_node", "head", head_address(["a"], "a", os.getpid()),
               sys.executable, "-c", CODE, str(seconds), str(status)]  # fmt: skip
    variables = {
        **os.environ,
        "SLURM_CPUS_ON_NODE": "3",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 32,
        "TMPDIR": str(scratch),
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.distributed
def test_a_command_runs_on_the_cluster_and_its_status_is_that_of_the_node(scratch):
    done = start(scratch, 0, 5)
    out, _ = done.communicate(timeout=600)
    assert (out, done.returncode) == ("CPUs 3.0\n", 5)
    assert list(scratch.iterdir()) == []


@pytest.mark.jobs
def test_a_signal_ends_command_and_cluster(scratch):
    running = start(scratch, 300, 0)
    assert running.stdout.readline() == "CPUs 3.0\n"
    assert list(scratch.glob("yw-ray-*"))
    family = psutil.Process(running.pid).children(recursive=True)
    assert len(family) > 5
    assert not reachable(family), "one node needs no other host"
    begun = time.monotonic()
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 128 + signal.SIGUSR1
    assert time.monotonic() - begun < 25, "SLURM kills after KillWait, 30 s"
    assert list(scratch.iterdir()) == []
