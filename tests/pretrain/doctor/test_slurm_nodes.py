"""``yaware doctor --slurm`` on a real SLURM cluster of two nodes, by ``srun`` outside and inside an allocation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import slurm
from tests.runs import ROOT

REASON = slurm.why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
DOCTOR = [sys.executable, "-m", "infra.cli", "doctor", "--slurm", "--seconds=10", "--json"]


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as started:
        yield started


def ask(cluster, command):
    """Run a command on the controller; return the doctor's rows by (check, node) and its exit status."""
    variables = {**cluster.environment, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": slurm.INTERFACE}
    done = subprocess.run(
        cluster.enter(slurm.CONTROLLER, command), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )
    assert "{" in done.stdout, done.stdout + done.stderr + cluster.log()
    found = json.loads(done.stdout[done.stdout.index("{") :])
    print(json.dumps(found["rows"], indent=1), done.stderr)
    return {(row["check"], row["node"]): row for row in found["rows"]}, done.returncode


def check_healthy(rows):
    assert rows["reach", ""]["text"] == "2 nodes: node1, node2"
    assert rows["ports", "all"]["state"] == rows["clock", "all"]["state"] == rows["environment", "all"]["state"] == "ok"
    assert f"gloo takes {slurm.INTERFACE}" in rows["interface", "all"]["text"]


@pytest.mark.jobs
def test_nodes_outside_an_allocation_are_asked_by_srun(cluster):
    rows, status = ask(cluster, [*DOCTOR, "--nodes=2", "--partition=high"])
    check_healthy(rows)
    assert status == (1 if any(row["state"] == "fail" for row in rows.values()) else 0)


@pytest.mark.slow
def test_nodes_of_an_allocation_are_asked_by_srun(cluster):
    rows, _ = ask(cluster, ["salloc", "--quiet", "--nodes=2", *DOCTOR])
    check_healthy(rows)


@pytest.mark.slow
def test_a_partition_that_does_not_exist_is_told_in_slurms_words(cluster):
    rows, status = ask(cluster, [*DOCTOR, "--nodes=2", "--partition=nowhere"])
    assert status == 1
    assert "invalid partition" in rows["reach", ""]["text"].lower()
