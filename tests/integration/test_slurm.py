"""Both batch scripts on a real SLURM: starts, preemptions, time limits, lost tasks and nodes, scancel, bounds of requeues."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.rank_process import run_ranks
from tests.runs import SMALL, losses
from tests.slurm import NODES, cluster, why_not
from tests.slurm_job import BatchJob, requeued

REASON = why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SCRIPTS = ("pretrain", "pretrain-deepspeed")
STEPS = 28
# Two tasks a node: pretrain-deepspeed.sbatch must start one launcher a node nevertheless.
SIZE = {
    "pretrain": ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"],
    "pretrain-deepspeed": ["--ntasks-per-node=2", "--gpus-per-node=1", "--cpus-per-task=1"],
}
PATIENT = pytest.mark.timeout(900)
# The fixtures are shared, so that one file holds them all; `make test-jobs` runs it beside other files.
with_both = pytest.mark.parametrize(
    "script", [pytest.param(name, marks=(pytest.mark.jobs, PATIENT)) for name in SCRIPTS]
)


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


def training(shards: Path, output: Path, *more: str) -> list[str]:
    """Return the recipe and its overrides. Groups normalise each scan alone, so that one process gives the same losses."""
    small = [word for word in SMALL if not word.startswith("--data.workers")]
    overrides = [*small, "--encoder.options={width: 0.25, norm: group}", "--data.workers=1"]
    return [
        "demo-cpu",
        f"--data.shards={shards}",
        f"--run.output={output}",
        f"--train.steps={STEPS}",
        *overrides,
        *more,
    ]


@pytest.fixture(scope="module")
def one_host_run(shards, tmp_path_factory):
    """The run folder of two undisturbed ranks on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    run_ranks(["--config", *training(shards, folder / "run")], folder)
    return folder / "run"


@pytest.fixture(scope="module")
def one_host(one_host_run):
    """Its losses."""
    return losses(one_host_run)


def one_process(shards: Path, folder: Path, last: Path | None = None) -> list[tuple[int, float]]:
    """Return the losses of one process, from the start or from the last checkpoint but one of the run ``last``."""
    if last is not None:
        shutil.copytree(last, folder / "run")
        *_, earlier, latest = sorted((folder / "run" / "checkpoints").glob("step-*"))
        shutil.rmtree(latest)
        (latest.parent / "latest").write_text(earlier.name)
    text = run_ranks(["--config", *training(shards, folder / "run")], folder, world=1)
    assert ("pretrain: resuming after step " in text) == (last is not None)
    return losses(folder / "run")


class Job(BatchJob):
    """A batch job that trains, in a checkout of its own."""

    def submit(self, shards: Path, *more: str) -> Job:
        """Submit the job."""
        self.run(*SIZE[self.script], arguments=training(shards, self.output, *more))
        return self

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def step(self) -> int:
        """Return how many steps were logged."""
        return len(losses(self.output))

    def train_until(self, step: int, restarts: int = 0) -> None:
        """Wait until the job, in its start after some restarts, has made two steps and in all its starts ``step`` steps."""
        self.wait("RUNNING", restarts=restarts)

        def reached() -> dict[str, str] | None:
            resumed = [int(line.split(":")[1].split()[-1]) for line in self.lines("pretrain: resuming after step ")]
            there = len(resumed) == restarts and self.step() >= max([step, *(first + 2 for first in resumed)])
            return self.slurm.job(self.number) if there else None

        self.slurm.until(reached, 300, lambda: self.log[-4000:])
        assert self.step() < STEPS, "too late to disturb the run"

    def ranks(self, node: str) -> list[psutil.Process]:
        """Return the processes of a node's ranks."""
        ranks = []
        for number in self.slurm.processes(node):
            with suppress(psutil.Error):
                words = (process := psutil.Process(number)).cmdline()
                if "python" in words[0] and words[1:4] == ["-u", "-m", "pretrain.train"]:
                    ranks.append(process)
        assert len(ranks) == 1, [psutil.Process(number).cmdline() for number in self.slurm.processes(node)]
        return ranks

    @contextmanager
    def without_a_step_until(self, sent: signal.Signals) -> Iterator[None]:
        """Stop all ranks before the block, and let them go on when SLURM has sent a signal to the job on both nodes.

        So the job cannot end before what the block asks SLURM for, however slow SLURM and fast the training is.
        """
        logs = [self.slurm.folder / f"{node}.log" for node in NODES]
        line = f"Sent signal {int(sent)} to StepId={self.number}."
        before = [log.read_text().count(line) for log in logs]
        ranks = [rank for node in NODES for rank in self.ranks(node)]
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        yield

        def reached() -> dict[str, str] | None:
            now = [log.read_text().count(line) for log in logs]
            return {"": ""} if all(n > b for n, b in zip(now, before, strict=True)) else None

        self.slurm.until(reached, 100, self.slurm.log)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # SLURM itself lets the processes of a preempted job go on
                rank.send_signal(signal.SIGCONT)

    def reach_time_limit(self) -> None:
        """Set the time limit to one or two minutes from now and wait for SLURM's warning, without a step meanwhile.

        SLURM looks at limits every 30 s. The script asks for the warning two minutes before the limit.
        """
        with self.without_a_step_until(signal.SIGUSR1):
            hours, minutes, _ = map(int, self.slurm.job(self.number)["RunTime"].split(":"))
            self.slurm.run("scontrol", "update", f"jobid={self.number}", f"TimeLimit={60 * hours + minutes + 2}")

    def preempt(self) -> None:
        """Let a job of a higher partition take both nodes for a moment, without a step until SLURM's signal."""
        with self.without_a_step_until(signal.SIGTERM):
            super().preempt()

    def lose_a_task_and_reach_the_time_limit(self) -> None:
        """Kill a rank in the first start, and reach the time limit in the second; the third has more time."""
        self.train_until(6)
        self.ranks("node2")[0].kill()
        self.train_until(12, restarts=1)
        self.reach_time_limit()
        self.wait("PENDING", restarts=2)
        self.slurm.run("scontrol", "update", f"jobid={self.number}", "TimeLimit=20")


@pytest.fixture
def job(slurm, tmp_path):
    """Return a function that makes a job, which is cancelled at the end of the test."""
    jobs = []

    def make(script: str, *options: str, **variables: str) -> Job:
        jobs.append(Job(slurm, script, tmp_path, *options, **variables))
        return jobs[-1]

    yield make
    for made in jobs:
        made.end()


@pytest.mark.jobs
@PATIENT
def test_a_time_limit_a_preemption_and_a_killed_task_change_no_loss_until_the_bound(
    job, shards, one_host, one_host_run, tmp_path
):
    disturbed = job("pretrain", YAWARE_MAX_REQUEUES="2").submit(shards)
    disturbed.train_until(3)
    disturbed.reach_time_limit()
    disturbed.wait("PENDING", restarts=1)
    disturbed.slurm.run("scontrol", "update", f"jobid={disturbed.number}", "TimeLimit=20")
    disturbed.train_until(8, restarts=1)
    disturbed.preempt()
    disturbed.train_until(13, restarts=2)
    disturbed.ranks("node2")[0].kill()
    assert disturbed.wait("FAILED", "COMPLETED")["Restarts"] == "2"
    assert [line.partition(" after step ")[0] for line in requeued(disturbed)] == [
        "stopped by SIGUSR1",
        "stopped by SIGTERM",
    ]
    (line,) = [line for line in disturbed.lines("pretrain: ") if "queued again" in line]
    assert line.startswith(("pretrain: rank 1 (node2) has died ", "pretrain: rank 1 (node2) was lost"))
    assert line.endswith(f"; job {disturbed.number} is not queued again: it was restarted 2 times (YAWARE_MAX_REQUEUES=2); "
                         "the same command continues")  # fmt: skip
    made = losses(disturbed.output)
    assert len(made) >= 12
    assert made == one_host[: len(made)]
    assert "a reader process was lost" not in disturbed.log
    # Two ranks round sums otherwise than one, and after some ten steps ReLU and max-pooling have made 1e-3 of 1e-7: the first
    # steps are compared, and the last ones after the same checkpoint.
    from_start = one_process(shards, tmp_path / "start")[:5]
    to_the_end = one_process(shards, tmp_path / "end", last=one_host_run)[-4:]
    for alone, two in ((from_start, one_host[:5]), (to_the_end, one_host[-4:])):
        assert [step for step, _ in alone] == [step for step, _ in two]
        assert [loss for _, loss in alone] == pytest.approx([loss for _, loss in two], rel=1e-5)


@pytest.mark.jobs
@PATIENT
def test_one_launcher_a_node_comes_back_after_a_killed_task_a_time_limit_and_a_preemption(job, shards, one_host):
    disturbed = job("pretrain-deepspeed").submit(shards)
    slurm = disturbed.slurm
    condition = [f"--dependency=afterok:{disturbed.number}", "--kill-on-invalid-dep=yes"]  # as those of pipeline.sh
    after = slurm.submit(*condition, "--output=/dev/null", "--wrap=true", cwd=disturbed.folder)
    disturbed.lose_a_task_and_reach_the_time_limit()
    disturbed.train_until(17, restarts=2)
    assert slurm.job(after)["JobState"] == "PENDING", "a requeue is no end"
    disturbed.preempt()
    assert disturbed.wait("COMPLETED", restarts=3)["ExitCode"] == "0:0"
    slurm.until(lambda: slurm.job(after) if slurm.job(after)["JobState"] == "COMPLETED" else None, 60, slurm.log)
    starts = [line for line in disturbed.lines("launch: ") if "-m pretrain.engine.local_ranks" in line]
    assert len(starts) == 8, "four starts on two nodes"
    killed, limit, preempted = requeued(disturbed)
    assert killed.startswith("rank 1 (node2) ")
    assert limit.startswith("stopped by SIGUSR1 after step ")
    # SLURM sends SIGTERM to all processes, and the launchers pass it on as SIGUSR1.
    assert re.fullmatch(r"stopped by (SIGTERM|SIGUSR1) after step \d+", preempted)
    assert losses(disturbed.output) == one_host
    assert "a reader process was lost" not in disturbed.log
    assert not list(disturbed.folder.glob(".hostfile-*"))


@pytest.mark.slow
@PATIENT
def test_a_run_finishes_after_a_killed_task_and_a_time_limit(job, shards, one_host):
    """To the end, where the test above of the same script reaches its bound."""
    disturbed = job("pretrain").submit(shards)
    disturbed.lose_a_task_and_reach_the_time_limit()
    assert disturbed.wait("COMPLETED")["ExitCode"] == "0:0"
    assert requeued(disturbed)[0].startswith("rank 1 (node2) ")
    assert losses(disturbed.output) == one_host


@with_both
def test_a_cancelled_job_saves_and_does_not_come_back(job, shards, script):
    cancelled = job(script).submit(shards)
    cancelled.train_until(3)
    cancelled.slurm.run("scancel", str(cancelled.number))
    assert cancelled.wait("CANCELLED")["Restarts"] == "0"
    (stopped,) = cancelled.lines("pretrain: stopped by SIG")
    assert (cancelled.output / "checkpoints/latest").read_text().strip() == f"step-{int(stopped.split()[6][:-1]):08d}"
    assert requeued(cancelled) == []


@with_both
def test_the_bound_of_requeues_is_said_in_one_line(job, shards, script):
    bounded = job(script, YAWARE_MAX_REQUEUES="0").submit(shards)
    bounded.train_until(3)
    bounded.preempt()
    assert bounded.wait("FAILED", "COMPLETED")["ExitCode"] == "75:0", (
        "not finished: no success for jobs that depend on it"
    )
    (line,) = [line for line in bounded.lines("pretrain: ") if "queued again" in line]
    assert line.endswith(f"; job {bounded.number} is not queued again: it was restarted 0 times (YAWARE_MAX_REQUEUES=0); "
                         "the same command continues")  # fmt: skip


@with_both
def test_a_job_that_lost_a_node_goes_on_when_the_node_is_back(job, shards, one_host, script):
    struck = job(script).submit(shards)
    struck.train_until(6)
    struck.slurm.kill_node("node2")
    struck.wait("PENDING", "COMPLETING", restarts=1)
    struck.slurm.start_node("node2")
    # On a loaded machine SLURM may send the order to end the old start again, and hit the new one, which comes back too.
    assert struck.wait("COMPLETED")["ExitCode"] == "0:0"
    assert losses(struck.output) == one_host


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--array=1-1"], "SLURM_ARRAY_JOB_ID: every task of a job array would do the same work"),
        (
            ["--nodes=1", ":", "--nodes=1", "--ntasks=1"],
            "SLURM_HET_SIZE=2: a heterogeneous job would start its first part only",
        ),
    ],
    ids=["array", "heterogeneous"],
)
def test_an_array_and_a_heterogeneous_job_are_refused_in_one_line(job, shards, script, options, text):
    refused = job(script, "--output=yaware-%A.log" if "array" in options[0] else "--requeue", *options).submit(shards)
    assert refused.wait("FAILED")["ExitCode"] == "2:0"
    assert refused.log.startswith(f"yaware: error: {text}")
    assert refused.log.count("\n") == 1
    assert not refused.output.exists()


@pytest.mark.jobs
def test_an_error_in_the_shards_does_not_requeue(job, tmp_path):
    failed = job("pretrain").submit(tmp_path / "none")
    assert failed.wait("FAILED", "COMPLETED")["Restarts"] == "0"
    assert len(failed.lines("yaware: error: ")) == 2, "one line of each host"
    (line,) = [line for line in failed.lines("pretrain: ") if "queued again" in line]
    assert line == f"pretrain: wrong input; job {failed.number} is not queued again"
    assert not list(failed.folder.glob(".problem-*"))
    assert not failed.output.exists()


def test_the_cluster_leaves_no_process_and_no_namespace():
    with cluster() as made:
        folder, namespaces = made.folder, [made.namespace(host) for host in (*NODES, "controller")]
        assert [line.split() for line in made.run("sinfo", "-h", "-o", "%P %D").splitlines()] == [
            ["low*", "2"],
            ["high", "2"],
        ]
        daemons = [daemon.pid for daemon in made.daemons.values()]
        assert len(daemons) == 4
    assert not folder.exists()
    assert not any(psutil.pid_exists(pid) for pid in daemons)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in namespaces)
    assert not any((Path("/etc/netns") / name).exists() for name in namespaces)
    assert os.environ.get("SLURM_CONF") is None
