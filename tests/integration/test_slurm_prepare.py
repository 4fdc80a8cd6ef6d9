"""``prepare.sbatch`` and ``yaware launch --slurm prepare`` on two nodes of a real SLURM: the bytes of one process."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from infra import cli
from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, write_small_cohort
from tests.slurm import CONTROLLER, cluster, why_not
from tests.slurm_job import RayJob, requeued, variables

REASON = why_not()
pytestmark = [
    pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("raw") / "small", participants=6)


def contents(out):
    """The files of a derivative, without the timings and the files of batch jobs."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "timings.tsv")
    return {str(path.relative_to(out)): path.read_bytes() for path in files if ".jobs" not in path.parts}


@pytest.fixture(scope="module")
def alone(raw, tmp_path_factory):
    """The files of a preparation in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert cli.run(["cohort", "prepare", str(raw), str(out), *SMALL_OPTIONS, "--workers=1"]) == 0
    return contents(out)


class Preparation(RayJob):
    """A batch job that prepares raw scans."""

    name = "yaware-prepare"

    def submit(self, raw):
        """Submit the job."""
        self.run("--cpus-per-task=2", arguments=[str(raw), str(self.folder / "out"), *SMALL_OPTIONS])
        return self


@pytest.fixture
def job(slurm, tmp_path, raw):
    """A submitted job, which is cancelled at the end of the test."""
    made = Preparation(slurm, "prepare", tmp_path)
    yield made.submit(raw)
    made.end()


def test_a_preemption_and_a_lost_node_change_no_byte(job, alone):
    job.hold("prepare_one")
    job.preempt()
    job.hold("prepare_one", restarts=1)
    job.slurm.kill_node("node2")
    try:
        assert job.wait("COMPLETED", "FAILED", "NODE_FAIL")["ExitCode"] == "0:0"
        assert job.slurm.job(job.number)["Restarts"] == "1"
        assert requeued(job) == ["stopped by SIGTERM"]
        assert contents(job.folder / "out") == alone
    finally:
        job.slurm.start_node("node2")
        job.slurm.await_nodes()


def test_a_launched_preparation_runs_on_both_nodes(slurm, raw, alone, tmp_path):
    launched = Preparation(slurm, "prepare", tmp_path)
    options = ["--nodes=2", "--cpus-per-task=2", "--time=20"]
    words = [
        sys.executable,
        "-m",
        "infra.cli",
        "launch",
        "--slurm",
        *options,
        "prepare",
        str(raw),
        "out",
        *SMALL_OPTIONS,
    ]
    done = subprocess.run(
        slurm.enter(CONTROLLER, words), cwd=tmp_path, env={**slurm.environment, **variables(tmp_path)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    launched.number = int(re.search(r"submitted job (\d+)", done.stdout)[1])
    ended = launched.wait("COMPLETED", "FAILED")
    log = (tmp_path / "out" / ".jobs" / f"{launched.name}-{launched.number}.log").read_text()
    assert ended["ExitCode"] == "0:0", log[-4000:]
    assert "ray: 2 of 2 nodes" in log
    assert contents(tmp_path / "out") == alone
