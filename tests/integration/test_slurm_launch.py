"""``yaware launch --slurm`` and ``pipeline.sh`` submit to a real SLURM; from a simulated cohort to a report over two nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from tests.cohorts import write_cohort
from tests.runs import ROOT
from tests.slurm import CONTROLLER, cluster, why_not
from tests.slurm_job import ENDED, make_checkout, variables

REASON = why_not()
pytestmark = [
    pytest.mark.distributed, pytest.mark.timeout(1200), pytest.mark.skipif(REASON is not None, reason=str(REASON))
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


@pytest.fixture
def type_in(slurm, tmp_path):
    """Return a function that runs a command on the cluster's login host, in a folder whose name has a space."""
    folder = tmp_path / "my work"
    make_checkout(folder)

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            slurm.enter(CONTROLLER, words), cwd=folder, env={**slurm.environment, **variables(folder), **more},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        print(done.stdout[-3000:], done.stderr[-3000:])
        return done

    run.folder = folder
    return run


def wait(slurm, number: int, seconds: float = 600) -> dict[str, str]:
    """Wait for the end of a job and return its fields."""

    def ended() -> dict[str, str] | None:
        job = slurm.job(number)
        return job if job["JobState"] in ENDED else None

    return slurm.until(ended, seconds, lambda: str(slurm.job(number)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".sbatch", ".log")}


LAUNCH = [sys.executable, "-m", "infra.cli", "launch", "--slurm"]


@pytest.mark.jobs
def test_a_build_is_submitted_and_its_lines_are_true(slurm, type_in, tmp_path):
    write_cohort(type_in.folder / "cohort", participants=8)
    build_shards(type_in.folder / "cohort", tmp_path / "alone")
    options = ["--nodes=1", "--cpus-per-task=2", "--time=20", "--job-name=one", "--sbatch-option=comment=a #b"]
    done = type_in(*LAUNCH, *options, "build", "cohort", "shards")
    assert done.returncode == 0
    wrote, submitted, watch, cancel = done.stdout.splitlines()
    assert wrote == "launch: wrote shards/one.sbatch"
    number = int(re.fullmatch(r"launch: submitted job (\d+); its log: (.*)", submitted)[1])
    log = type_in.folder / f"shards/one-{number}.log"
    assert submitted.endswith(f"; its log: {log}")
    assert watch == f"launch: to watch: squeue --jobs {number}; tail -F '{log}'"
    assert cancel == f"launch: to cancel: scancel {number}"
    job = wait(slurm, number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert "shards: built: 8 scans" in log.read_text()
    assert files(type_in.folder / "shards") == files(tmp_path / "alone")
    refused = type_in(*LAUNCH, "--partition=none", "build", "cohort", "new")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "yaware: error: sbatch refused new/yaware-build.sbatch: invalid partition specified: none"
    )
    assert refused.stderr.count("\n") == 1


PIPELINE = [str(ROOT / "infra/launch/pipeline.sh"), "cohort", "shards", "demo-cpu", "run"]
STAGES = ("build", "pretrain", "evaluate", "compare")
SMALL = {
    "JOBS": "--time 30",
    "BUILD_JOB": "--cpus-per-task 2", "BUILD_ARGUMENTS": "--scans-per-shard=10",
    "PRETRAIN_JOB": "--gpus 1 --cpus-per-task 1",
    "PRETRAIN_ARGUMENTS": "--batch.global=8 --train.steps=4 --monitor.every_epochs=0 --data.workers=1 "
    "'--encoder.options={width: 0.25, norm: group}'",
    "EVALUATE_JOB": "--cpus-per-task 2",
    "EVALUATE_ARGUMENTS": "--protocols linear --folds 2 --draws 1 --n-train 12 --repeats 1 --halvings 0",
    "COMPARE_JOB": "--cpus-per-task 1", "EXPERIMENT": "pipeline",
}  # fmt: skip


def submitted(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Return the numbers of the jobs that the pipeline has submitted, in the order of its stages."""
    jobs = dict(re.findall(r"^pipeline: (\w+): job (\d+); its log: ", done.stdout, re.MULTILINE))
    assert tuple(jobs) == STAGES
    return [int(number) for number in jobs.values()]


@pytest.mark.slow
def test_a_pipeline_from_a_simulated_cohort_to_the_report(slurm, type_in):
    simulate = ["cohort", "simulate", "cohort", "--participants=60", "--spacing=12", "--modality=vbm"]
    assert type_in(".venv/bin/yaware", *simulate).returncode == 0
    done = type_in(*PIPELINE, "age,sex", "report.html", **SMALL)
    assert done.returncode == 0
    numbers = submitted(done)
    assert f"pipeline: to cancel: scancel {' '.join(map(str, numbers))}" in done.stdout
    jobs = [wait(slurm, number) for number in numbers]
    for work, number in zip(
        ("shards/yaware-build", "run/yaware", "yaware-evaluate", "yaware-compare"), numbers, strict=True
    ):
        print((type_in.folder / f"{work}-{number}.log").read_text()[-3000:])
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 4
    assert [job["NumNodes"] for job in jobs] == ["2", "2", "2", "1"]
    assert "pipeline" in (type_in.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_stages_after_a_failed_one_are_cancelled(slurm, type_in):
    (type_in.folder / "cohort").mkdir()
    done = type_in(*PIPELINE, "age", **SMALL)
    jobs = [wait(slurm, number) for number in submitted(done)]
    assert [job["JobState"] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert jobs[0]["ExitCode"] == "2:0"


@pytest.mark.slow
def test_a_refused_stage_leaves_nothing_in_the_queue(slurm, type_in):
    write_cohort(type_in.folder / "cohort", participants=8)
    given = {**SMALL, "EVALUATE_ARGUMENTS": "--folds 1"}
    done = type_in(*PIPELINE, "age", **given)
    assert done.returncode == 2
    assert done.stderr == "yaware: error: folds=1 is too small; it must be at least 2\n"
    numbers = re.findall(r"^pipeline: \w+: job (\d+);", done.stdout, re.MULTILINE)
    assert len(numbers) == 2
    assert [wait(slurm, int(number))["JobState"] for number in numbers] == ["CANCELLED"] * 2


def test_the_usage_of_the_pipeline_is_one_line(tmp_path):
    done = subprocess.run(PIPELINE[:2], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "usage: infra/launch/pipeline.sh COHORT SHARDS RECIPE RUN TASKS [REPORT]\n"
