"""What a run comes to: counts against networks that really run, ZeRO's cuts, and the lines of `yaware plan` and `launch`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from torch import nn

from infra import cli
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.launch.estimate import memory_of_a_rank, plain_model, scan_flops
from pretrain.launch.hosts import launch_command, read_hostfile
from tests.runs import ROOT

P = 1000


def test_flops_are_those_of_the_layers():
    """Two convolutions by hand: 2 operations a weight and output voxel, thrice with the backward pass but for the input."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

        def forward(self, views_2B1DHW: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.second(self.first(views_2B1DHW.flatten(0, 1))), None

    views, voxels = 2, 5 * 6 * 7
    first, second = 2 * 27 * 4 * voxels * views, 2 * 4 * 2 * voxels * views
    assert scan_flops(Two().to("meta"), (5, 6, 7)) == 2 * first + 3 * second  # the volume itself needs no gradient


def test_recomputation_is_left_out_of_the_count():
    small = "--encoder.options={width: 0.25, norm: group"
    plain, saving = (load_recipe("demo-cpu", [small + end]) for end in ("}", ", checkpointing: true}"))
    assert scan_flops(plain_model(saving), (30, 36, 30)) == scan_flops(plain_model(plain), (30, 36, 30))


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("fp32", 0, (4, 4, 8)),  # no copy of the weights
        ("fp32", 1, (4, 4, 12 / 4)),
        ("fp32", 2, (4, 4 / 4, 12 / 4)),
        ("bf16", 2, (2, 2 / 4, 12 / 4)),
        ("bf16", 3, (2 / 4, 2 / 4, 12 / 4)),
    ],
)
def test_zero_cuts_optimizer_then_gradients_then_weights(precision, stage, expected):
    recipe = load_recipe("demo-cpu", [f"--train.precision={precision}", f"--deepspeed.zero_optimization.stage={stage}"])
    assert tuple(memory_of_a_rank(recipe, P, 4).values()) == tuple(P * share for share in expected)


def test_plan_says_what_a_run_comes_to(capsys):
    given = [
        "plan",
        "--config",
        "large-batch-64gpu",
        "--nodes",
        "8",
        "--gpus",
        "8",
        "--scans",
        "10420",
        "--tflops",
        "100",
    ]
    assert cli.run([*given, "--encoder.name=resnet18"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "ranks        64 (8 x 8); 32 scans a rank and step, in 4 passes of 8 (GradCache)",
        "steps        509 of 2048 scans: 100.0 epochs of 5.1 steps",
        "ZeRO 2       weights",
        "(estimate)",
        "at 100 TFLOP/s a rank (assumed)",
        "sbatch --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 infra/launch/pretrain.sbatch large-batch-64gpu "
        "--encoder.name=resnet18",
    ):
        assert text in printed


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--gpus", "7"], "batch.global=64 is not divisible by world_size=7; use 4 or 8 ranks"),
        (["--nodes", "0"], "--nodes=0 must be more than 0"),
        (["--grid", "121,145,121"], "--grid=121,145,121 is not of the form 121x145x121"),
        (["--grid", "20x20x20"], "smallest grid is 29x29x29"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(given, text, capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--batch.micro=null", "--scans", "100", *given]) == 2
    assert text in capsys.readouterr().err


def test_plan_without_shards_says_so(capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--data.shards=nowhere"]) == 2
    assert "nowhere/manifest.json is missing" in capsys.readouterr().err


def test_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode01 slots=8\n\n10.0.0.2   slots=4 # smaller\n")
    assert read_hostfile(path) == {"node01": 8, "10.0.0.2": 4}
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(path))) == read_hostfile(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("node01\n", "line 1: 'node01' is not of the form `name slots=8`"),
        ("a slots=2\na slots=2\n", "line 2: 'a slots=2' names a host for a second time"),
        ("# none\n", "names no host"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_hostfile_names_its_line(tmp_path, content, text):
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=text):
        read_hostfile(path)


def test_launch_lines_for_all_hosts_and_for_one(tmp_path):
    hosts = {"node01": 8, "node02": 8}
    common = {"master_addr": None, "master_port": 29500}
    every = launch_command(tmp_path, hosts, ["demo-cpu"], node_rank=None, **common)
    assert every[every.index("--master_addr") + 1] == "node01"
    assert "--no_ssh" not in every
    one = launch_command(tmp_path, hosts, ["demo-cpu", "--encoder.options={width: 1}"], node_rank=1, **common)
    assert one[one.index("--node_rank") + 1] == "1"
    with pytest.raises(
        UserError, match="would be taken apart by the shells of the other hosts; write it into a recipe"
    ):
        launch_command(tmp_path, hosts, ["demo-cpu", "--encoder.options={width: 1}"], node_rank=None, **common)
    with pytest.raises(UserError, match="--node_rank=2 is no host of .*; it names 2: 0 to 1"):
        launch_command(tmp_path, hosts, ["demo-cpu"], node_rank=2, **common)


LAUNCHERS = {
    # Over pdsh: deepspeed's handler ends the ranks on the other hosts and pdsh here, then leaves with 1.
    "pdsh": """
import pathlib, signal, subprocess, sys, time
below = subprocess.Popen(["./pdsh"])
def end(*_):
    pathlib.Path("asked").write_text("pdsh still there" if below.poll() is None else "pdsh gone")
    below.kill()
    below.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
while True:
    time.sleep(0.01)
""",
    # On one host, with no rank started yet: no handler, and a process below that would be left alone.
    "one host": """
import pathlib, subprocess, time
below = subprocess.Popen(["sleep", "60"])
pathlib.Path("asked").write_text(str(below.pid))
pathlib.Path("ready").touch()
while True:
    time.sleep(0.01)
""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_launcher_without_ranks_below_it_is_ended_by_the_signal(kind, number, tmp_path):
    """With stand-ins for deepspeed's launcher and for pdsh."""
    (tmp_path / "launcher.py").write_text(LAUNCHERS[kind])
    (tmp_path / "pdsh").write_text("#!/bin/bash\nexec -a pdsh sleep 60\n")
    (tmp_path / "pdsh").chmod(0o755)
    code = "import sys; from pretrain.cli import start; sys.exit(start([sys.executable, 'launcher.py'], {}))"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.2)  # for the handler, which is set beside
        started.send_signal(number)
        status = started.wait(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert status != 0
    asked = (tmp_path / "asked").read_text()
    if kind == "pdsh":
        assert (status, asked) == (1, "pdsh still there")
    else:
        assert not psutil.pid_exists(int(asked)) or psutil.Process(int(asked)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.distributed
@pytest.mark.timeout(1000)
def test_launch_trains_on_the_hosts_of_a_hostfile(shards, tmp_path):
    """One host of two ranks, started as a node of its own: what each node of a cluster without ssh does."""
    from infra.distributed import free_port
    from tests.runs import SMALL, environment, losses

    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
    given = [f"--data.shards={shards}", f"--run.output={tmp_path}/run", "--train.steps=1", *SMALL]
    given.append(
        "--encoder.options={width: 0.25, norm: batch, channels_last: true}"
    )  # weights that are not laid out plainly
    command = [sys.executable, "-m", "infra.cli", "launch", "--config", "demo-cpu", "--hostfile", f"{tmp_path}/hosts"]
    where = ["--node_rank", "0", "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, *where, *given], env=environment(tmp_path), capture_output=True, text=True, timeout=900
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert "launch: deepspeed --hostfile" in done.stdout
    assert [step for step, _ in losses(tmp_path / "run")] == [0]
