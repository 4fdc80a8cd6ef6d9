"""Every kind of loss term, reader, optimiser and memory option on one GPU: the same losses as on the CPU."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.volume.grid import Grid
from tests.cohorts import write_cohort
from tests.gpu.cpu_side import without_gpu
from tests.runs import losses, run

pytestmark = pytest.mark.gpu
STEPS = 3
# The scans are not augmented, and products are not computed in TF32, so that both devices compute the same.
SAME = ["--augmentation.preset=none", "--data.device=cpu", "--data.workers=0", "--launch.ranks=1", "--batch.global=8",
        "--monitor.every_epochs=0", "--checkpoint.every_steps=3", f"--train.steps={STEPS}"]  # fmt: skip
SMALL = "--encoder.options={width: 0.25, norm: group}"
OPTIONS = {
    "micro-batches": [SMALL, "--batch.micro=2"],
    "dense": [SMALL, "--loss.dense={grid: 2}"],
    "reconstruction": [SMALL, "--loss.reconstruction={masked: 0.25}"],
    "decoupled-uniformity": [SMALL, "--loss.name=decoupled-uniformity"],
    "temperature": [SMALL, "--loss.temperature_bounds=[0.01, 1.0]"],
    "tiles": [SMALL, "--loss.tile=3"],
    "two proxies": [SMALL, "--loss.proxies={age: {bandwidth: 5.0}, sex: {kernel: same}}"],
    "lars, layer_decay": [SMALL, "--optimizer.name=lars", "--optimizer.layer_decay=0.7", "--optimizer.lr=0.1"],
    "average, readouts": [SMALL, "--train.ema_decay=0.9", "--readouts.fit=true", "--readouts.columns=[sex]"],
    "grid pooling": ["--encoder.options={width: 0.25, norm: group, pooling: grid2}"],
    "dali reader": [SMALL, "--data.reader=dali"],
    "stream reader": [SMALL, "--data.reader=stream"],
    "vit": ["--encoder.name=vit-small", "--encoder.options={}"],
    "unet": ["--encoder.name=unet", "--encoder.options={norm: group}", "--batch.global=4"],
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Shards of 36 participants, 24 of them healthy, of 48 x 56 x 48 voxels."""
    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "few", participants=36)
    out = tmp_path_factory.mktemp("shards") / "few"
    grid = Grid.of((48, 56, 48), np.array([[2.0, 0, 0, -48], [0, 2, 0, -66], [0, 0, 2, -38], [0, 0, 0, 1]]))
    build_shards(cohort, out, grid=grid, splits={"pretrain": 1.0})
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_the_first_steps_are_those_of_the_cpu(device, name, scans, tmp_path):
    found = []
    for number, where in enumerate(("cpu", device)):
        output = tmp_path / str(number) / "run"
        output.parent.mkdir()
        command = [sys.executable, "-m", "infra.cli", "pretrain", "--config", "demo-cpu", *SAME, *OPTIONS[name],
                   f"--data.shards={scans}", f"--run.output={output}"]  # fmt: skip
        start = without_gpu() if number == 0 else ["env", f"DS_ACCELERATOR={where}", "NVIDIA_TF32_OVERRIDE=0"]
        done = run([*start, *command], output.parent)
        assert done.returncode == 0, name
        found.append([loss for _, loss in losses(output)])
    on_cpu, on_gpu = found
    print(f"losses of {name}: CPU {on_cpu}, GPU {on_gpu}")
    assert len(on_cpu) == len(on_gpu) == STEPS
    assert all(math.isfinite(loss) for loss in on_gpu)
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-4)
    # Adam's first steps have the length of the learning rate whatever the gradient's is, so that rounding grows.
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)


def test_a_run_can_be_kept_off_the_gpu(device, scans, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "infra.cli", "pretrain", "--config", "demo-cpu", *SAME, SMALL,
               f"--data.shards={scans}", f"--run.output={output}", "--train.steps=1"]  # fmt: skip
    assert run(["env", "DS_ACCELERATOR=cpu", *command], tmp_path).returncode == 0
    (states,) = output.glob("checkpoints/step-*/random-00000.pt")
    assert "cuda" not in torch.load(states, weights_only=True)
