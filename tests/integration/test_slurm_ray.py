"""Shards and evaluations on Ray over two nodes of a real SLURM: results, lost nodes, preemption, time limit, scancel."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.shards.build import build_shards
from infra.tracking.runs import runs
from tests.cohorts import write_cohort
from tests.netns import ip
from tests.runs import environment, pretrain_command, run
from tests.slurm import INTERFACE, cluster, why_not
from tests.slurm_job import RayJob, pythons_of_an_image, requeued

REASON = why_not()
pytestmark = [
    pytest.mark.distributed, pytest.mark.timeout(900), pytest.mark.skipif(REASON is not None, reason=str(REASON))
]  # fmt: skip
PER_SHARD = 2


@pytest.fixture(scope="module")
def slurm():
    with cluster() as made:
        yield made


class Build(RayJob):
    """A batch job that builds shards."""

    name = "yaware-build"

    def submit(self, cohort: Path, *more: str) -> Build:
        """Submit the job."""
        arguments = [str(cohort), str(self.output), f"--scans-per-shard={PER_SHARD}", *more]
        self.run("--cpus-per-task=2", arguments=arguments)
        return self

    @property
    def output(self) -> Path:
        return self.folder / "shards"


class Evaluation(RayJob):
    """A batch job that evaluates a run."""

    name = "yaware-evaluate"

    def submit(self, made: Path) -> Evaluation:
        """Submit the job."""
        self.run("--cpus-per-task=2", arguments=evaluation(made, self.folder))
        return self


@pytest.fixture
def job(slurm, tmp_path):
    """Return a function that makes a job of a class, which is cancelled at the end of the test."""
    jobs = []

    def make(kind: type[RayJob], *options: str, **variables: str) -> RayJob:
        script = "build-shards" if kind is Build else "evaluate"
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(kind(slurm, script, folder, *options, **variables))
        return jobs[-1]

    yield make
    for made in jobs:
        made.end()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "small", participants=12)


@pytest.fixture(scope="module")
def alone(cohort, tmp_path_factory):
    """The files of a build in one process."""
    out = tmp_path_factory.mktemp("alone") / "shards"
    build_shards(cohort, out, scans_per_shard=PER_SHARD)
    return files(out)


@pytest.fixture(scope="module")
def large_cohort(tmp_path_factory):
    """Volumes at 3 mm, so that a worker can be stopped while it writes a shard."""
    root = write_cohort(tmp_path_factory.mktemp("cohort") / "large", participants=40)
    generator = np.random.default_rng(0)
    for path in sorted(root.glob("sub-*/ses-1/anat/*.nii.gz")):
        voxels = generator.random((61, 73, 61), dtype=np.float32).round(2)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3, 3, 1])), path)
    return root


@pytest.fixture(scope="module")
def large_alone(large_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("large-alone") / "shards"
    build_shards(large_cohort, out, scans_per_shard=PER_SHARD)
    return files(out)


@pytest.mark.jobs
def test_a_build_over_two_nodes_gives_the_bytes_of_one_process(job, cohort, alone, tmp_path):
    """The job is that of an image: a Python of the host without any package starts the nodes, another runs all else."""
    done = job(Build, **pythons_of_an_image(tmp_path)).submit(cohort)
    assert done.wait("COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert done.lines("ray: ") == ["ray: 2 of 2 nodes"]
    assert files(done.output) == alone
    assert not list(done.folder.glob(".requeues-*"))
    started = (tmp_path / "words").read_text()
    assert "infra.slurm.ray_job" not in started
    assert started.count("infra.slurm.ray_node head") == started.count("infra.slurm.ray_node worker") == 1
    assert "infra.cli shards build" in started


@pytest.mark.slow
def test_two_jobs_on_the_same_nodes_do_not_meet(job, cohort, alone):
    both = [job(Build).submit(cohort) for _ in range(2)]
    for done in both:
        assert done.wait("COMPLETED", "FAILED")["ExitCode"] == "0:0"
        assert files(done.output) == alone
    first, second = [done.slurm.job(done.number) for done in both]
    assert second["StartTime"] < first["EndTime"], "they ran one after the other, and prove nothing"


@pytest.mark.jobs
def test_a_build_goes_on_without_a_lost_node(job, large_cohort, large_alone):
    struck = job(Build).submit(large_cohort)
    struck.hold("build_one")
    struck.slurm.kill_node("node2")
    try:
        assert struck.wait("COMPLETED", "FAILED", "NODE_FAIL")["ExitCode"] == "0:0"
        assert struck.slurm.job(struck.number)["Restarts"] == "0"
        assert files(struck.output) == large_alone
    finally:
        struck.slurm.start_node("node2")
        struck.slurm.await_nodes()


@pytest.mark.slow
def test_a_build_comes_back_after_the_loss_of_its_first_node(job, large_cohort, large_alone):
    struck = job(Build).submit(large_cohort)
    struck.hold("build_one")
    struck.slurm.kill_node("node1")
    cable = f"-n {struck.slurm.namespace('node1')} link set {INTERFACE}"
    ip(f"{cable} down")
    struck.wait("PENDING", "COMPLETING", restarts=1)
    ip(f"{cable} up")
    struck.slurm.start_node("node1")
    assert struck.wait("COMPLETED", "FAILED", "NODE_FAIL")["ExitCode"] == "0:0"
    # The line that says so was lost with srun on the first node.
    assert struck.slurm.job(struck.number)["Restarts"] == "1"
    assert files(struck.output) == large_alone


@pytest.mark.slow
def test_a_node_whose_ray_was_killed_starts_it_again(job, large_cohort, large_alone):
    struck = job(Build).submit(large_cohort)
    held = struck.hold("build_one", node="node1")
    (before,) = struck.raylets("node2")
    before.kill()
    limit = time.monotonic() + 200
    while not (struck.lines("ray: Ray has ended on node2 ") and struck.raylets("node2")):
        assert time.monotonic() < limit, struck.log
        time.sleep(0.2)
    held.resume()
    assert struck.wait("COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert struck.slurm.job(struck.number)["Restarts"] == "0"
    assert files(struck.output) == large_alone


@pytest.mark.slow
def test_a_time_limit_a_preemption_and_a_killed_head_change_no_byte(job, large_cohort, large_alone):
    disturbed = job(Build).submit(large_cohort)
    disturbed.hold("build_one")
    disturbed.reach_time_limit()
    disturbed.wait("PENDING", restarts=1)
    disturbed.slurm.run("scontrol", "update", f"jobid={disturbed.number}", "TimeLimit=20")
    disturbed.hold("build_one", restarts=1)
    disturbed.preempt()
    disturbed.hold("build_one", restarts=2)
    disturbed.processes("node1", "gcs/gcs_server")[0].kill()
    assert disturbed.wait("COMPLETED", "FAILED", restarts=3)["ExitCode"] == "0:0"
    assert requeued(disturbed) == ["stopped by SIGUSR1", "stopped by SIGTERM", "Ray has failed"]
    assert files(disturbed.output) == large_alone


@pytest.fixture
def short():
    """A temporary folder with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_cancelled_build_does_not_come_back_and_can_be_submitted_again(job, short, large_cohort, large_alone):
    cancelled = job(Build, TMPDIR=str(short)).submit(large_cohort)
    cancelled.hold("build_one")
    assert len(list(short.glob("yw-ray-*"))) == 2, "one of each node"
    cancelled.slurm.run("scancel", str(cancelled.number))
    assert cancelled.wait("CANCELLED")["Restarts"] == "0"
    assert requeued(cancelled) == []
    cancelled.submit(large_cohort)
    assert cancelled.wait("COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert files(cancelled.output) == large_alone
    # SLURM kills what does not end within its KillWait; the next job removes what was left.
    assert list(short.glob("yw-ray-*")) == []


@pytest.mark.slow
def test_the_bound_of_requeues_is_said_in_one_line(job, large_cohort):
    bounded = job(Build, YAWARE_MAX_REQUEUES="0").submit(large_cohort)
    bounded.hold("build_one")
    bounded.preempt()
    assert bounded.wait("FAILED", "COMPLETED")["ExitCode"] == "75:0", "no success for jobs that depend on it"
    (line,) = bounded.lines("job: ")
    assert line == (f"job: stopped by SIGTERM; job {bounded.number} is not queued again: it was restarted 0 times "
                    "(YAWARE_MAX_REQUEUES=0); the same command continues")  # fmt: skip


@pytest.mark.slow
def test_wrong_input_ends_the_job_with_one_line(job, tmp_path):
    failed = job(Build).submit(tmp_path / "none")
    done = failed.wait("FAILED", "COMPLETED")
    assert (done["ExitCode"], done["Restarts"]) == ("2:0", "0")
    assert len(failed.lines("yaware: error: ")) == 1
    assert failed.lines("job: ") == [f"job: ended with status 2; job {failed.number} is not queued again"]


@pytest.mark.parametrize("kind", [Build, Evaluation])
def test_an_array_is_refused_in_one_line(job, tmp_path, kind):
    refused = job(kind, "--array=1-1", "--output=array.log").submit(tmp_path / "none")
    assert refused.wait("FAILED")["ExitCode"] == "2:0"
    text = (refused.folder / "array.log").read_text()
    assert text.startswith("yaware: error: SLURM_ARRAY_JOB_ID: every task of a job array would do the same work")
    assert text.count("\n") == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    build_shards(write_cohort(folder / "cohort", participants=80), folder / "shards")
    small = ["--monitor.every_epochs=0", "--launch.ranks=1", "--encoder.options={width: 0.25, norm: group}"]
    assert run(pretrain_command(folder / "shards", folder / "run", 2, *small), folder).returncode == 0
    return folder


def evaluation(made: Path, folder: Path) -> list[str]:
    return [
        str(made / "run"), f"--shards={made / 'shards'}", "--tasks=age,sex", "--protocols=linear", "--folds=2", "--draws=1",
        "--n-train=12", "--repeats=1", "--halvings=0", "--experiment=test", f"--storage={folder / 'storage'}",
        f"--cache={folder / 'cache'}",
    ]  # fmt: skip


def metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of the only evaluation in the store of a folder."""
    (row,) = runs(environment(folder)["MLFLOW_TRACKING_URI"], "test", "evaluation")
    return {name: value for name, value in row["metrics"].items() if "seconds" not in name}


@pytest.fixture(scope="module")
def metrics_alone(made, tmp_path_factory):
    """The metrics of an evaluation in one process."""
    from evaluation.cli import evaluate

    folder = tmp_path_factory.mktemp("evaluated")
    store = environment(folder)["MLFLOW_TRACKING_URI"]
    assert evaluate([*evaluation(made, folder), f"--tracking-uri={store}"]) == 0
    assert len(metrics(folder)) > 10
    return metrics(folder)


@pytest.mark.jobs
def test_an_evaluation_over_two_nodes_gives_the_metrics_of_one_process(job, made, metrics_alone):
    done = job(Evaluation).submit(made)
    assert done.wait("COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert metrics(done.folder) == metrics_alone


@pytest.mark.slow
def test_an_evaluation_continues_after_the_loss_of_a_node(job, made, metrics_alone):
    # With one CPU a node the two trials run on two nodes.
    struck = job(Evaluation, "--cpus-per-task=1").submit(made)
    struck.hold("ResourceTrainable")
    struck.slurm.kill_node("node2")
    struck.slurm.start_node("node2")
    assert struck.wait("COMPLETED", "FAILED", "NODE_FAIL")["ExitCode"] == "0:0"
    assert requeued(struck) in ([], ["failed after the loss of a worker node"])
    assert metrics(struck.folder) == metrics_alone
