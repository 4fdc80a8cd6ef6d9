"""The batch scripts with stand-ins for the commands of SLURM: what they start, in which order, and their exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "infra/launch"
NAMES = ("pretrain.sbatch", "pretrain-deepspeed.sbatch")
GIVEN = ["demo-cpu", "--run.name=a b"]
# They record their arguments; srun runs its command.
STAND_INS = {
    "bin/srun": 'for o in "$@"; do [[ $o == --* ]] || break; shift; w+=" $o"; done; echo "srun$w" >> calls; exec "$@"',
    "bin/scontrol": 'printf "gpu07\\ngpu08\\n"',
    ".venv/bin/python": """
        echo "python $*" >> calls
        [[ $* == *" begin "* ]] && exit "${BEGIN:-0}"; [[ $* == *" end "* ]] && exit 75; exit 1
    """,
    # The shell must ignore USR1, which would end it.
    ".venv/bin/yaware": 'echo "yaware $*" >> calls; cat "$3" >> calls; kill -USR1 $$; exit 1',
}


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a batch script as SLURM would, and returns the result and the recorded calls."""
    for path, body in STAND_INS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/bash\n{body.strip()}\n")
        (tmp_path / path).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                 "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_ON_NODE": "8",
                 "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "6"}  # fmt: skip

    def run_script(name: str, *given: str, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(["bash", str(LAUNCH / name), *given], env={**variables, **more}, cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
        assert not list(tmp_path.glob(".hostfile-*"))
        return done, calls.read_text().splitlines()

    return run_script


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_script_checks_the_job_starts_the_ranks_and_ends_with_the_jobs_status(run, name):
    done, (first, start, *calls, last) = run(name, *GIVEN)
    assert done.returncode == 75
    assert first == "python -m pretrain.launch.batch_job begin demo-cpu --run.name=a b"
    assert last == "python -m pretrain.launch.batch_job end 1 demo-cpu --run.name=a b"
    if name == "pretrain.sbatch":
        assert start == "srun --cpus-per-task=6 --kill-on-bad-exit=1 --gpu-bind=none"
        assert calls == ["python -u -m pretrain.train --config demo-cpu --run.name=a b"]
    else:
        assert (
            start
            == "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --gpu-bind=none"
        )
        assert calls[1:] == ["gpu07 slots=8", "gpu08 slots=8"]
        assert re.sub(r"\S+/\.hostfile-123456", "HOSTS", calls[0]) == (
            "yaware launch --hostfile HOSTS --node_rank 1 --master_addr gpu07 --master_port 23456 "
            "--config demo-cpu --run.name=a b"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_job_starts_no_step(run, name):
    done, calls = run(name, *GIVEN, BEGIN="2")
    assert done.returncode == 2
    assert calls == ["python -m pretrain.launch.batch_job begin demo-cpu --run.name=a b"]


@pytest.mark.parametrize("name", NAMES)
def test_the_usage_is_said_without_a_recipe(run, name):
    done, calls = run(name)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    assert calls == []


@pytest.mark.parametrize("name", NAMES)
def test_the_directives_let_a_job_save_before_its_time_limit_and_come_back(name):
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / name).read_text(), re.MULTILINE))
    assert directives["signal"] == "USR1@120", "the ranks save at SIGUSR1; a B: would send it to the shell alone"
    assert {"requeue", "nodes", "ntasks-per-node", "gpus-per-node", "time"} <= directives.keys()
    assert directives["open-mode"] == "append", "a requeued job continues its log"


RAY = {
    "prepare.sbatch": ("cohort prepare", 2),
    "build-shards.sbatch": ("shards build", 2),
    "evaluate.sbatch": ("evaluate", 1),
}


@pytest.mark.parametrize(("name", "command"), [(name, command) for name, (command, _) in RAY.items()])
def test_a_script_on_ray_becomes_the_job_and_has_its_status(run, name, command):
    done, calls = run(name, "a b", "c", "--d=e")
    assert (done.returncode, calls) == (1, [f"python -m infra.slurm.ray_job {command} a b c --d=e"])


@pytest.mark.parametrize(("name", "least"), [(name, least) for name, (_, least) in RAY.items()])
def test_the_usage_of_a_script_on_ray_is_said_without_its_arguments(run, name, least):
    done, calls = run(name, *["x"] * (least - 1))
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    assert calls == []


def test_the_scripts_on_ray_differ_in_their_command_only():
    shown = []
    for name in RAY:
        lines = (LAUNCH / name).read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("# ", ": ", "#SBATCH --job-name"))]
        shown.append([re.sub(r"(ray_job) [\w ]+", r"\1", line) for line in kept])
    assert shown[0] == shown[1] == shown[2]
    assert {
        "#SBATCH --no-kill",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --ntasks-per-node=1",
    } <= set(shown[0])


@pytest.mark.parametrize(
    ("variables", "text"),
    [({"SLURM_ARRAY_JOB_ID": "1"}, "SLURM_ARRAY_JOB_ID: every task"), ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2: a hetero")],
)  # fmt: skip
def test_a_comparison_refuses_arrays_and_heterogeneous_jobs(variables, text, tmp_path):
    given = {
        **os.environ,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "YAWARE_PYTHON": sys.executable,
        "PYTHONPATH": str(LAUNCH.parents[1]),
    }
    done = subprocess.run(["bash", LAUNCH / "compare.sbatch", "--out", "x.html"], env={**given, **variables},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"yaware: error: {text}")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def pipeline(tmp_path):
    """Return a function that runs pipeline.sh with a stand-in for yaware, and returns the result and its calls."""
    tool = tmp_path / "yaware"
    tool.write_text(
        f'#!/bin/sh\nprintf "[%s]" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n'
        'echo "launch: submitted job 7; its log: x"\n'
    )
    tool.chmod(0o755)

    def run_pipeline(**variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (tmp_path / "calls").write_text("")
        command = ["bash", LAUNCH / "pipeline.sh", "cohort", "shards", "demo-cpu", "run", "age"]
        done = subprocess.run(command, env={**os.environ, "YAWARE": str(tool), **variables}, cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
        return done, (tmp_path / "calls").read_text().splitlines()

    return run_pipeline


@pytest.mark.parametrize("name", ["JOBS", "COMPARE_JOB", "BUILD_ARGUMENTS", "COMPARE_ARGUMENTS"])
@pytest.mark.parametrize("value", ["--account lab --comment 'a", '--time 30 "b c'])
def test_a_quote_without_its_partner_stops_the_pipeline_before_anything_is_submitted(pipeline, name, value):
    done, calls = pipeline(**{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"pipeline: error: {name}={value} has a quote without its partner; close it")
    assert done.stderr.count("\n") == 1
    assert calls == []


def test_the_pipeline_passes_quoted_and_empty_words_on(pipeline):
    done, calls = pipeline(JOBS="--comment 'a  b'", BUILD_ARGUMENTS="--x \"c d\" ''", PRETRAIN_JOB="--gpus 2")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "[launch][--slurm][--comment][a  b][build][cohort][shards][--x][c d][]"
    assert calls[1].startswith("[launch][--slurm][--comment][a  b][--gpus][2][--dependency][afterok:7][pretrain]")
    assert len(calls) == 4
