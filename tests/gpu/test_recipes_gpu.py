"""Every shipped recipe on one GPU with its own precision, memory layout and ZeRO stage: it trains and resumes."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.build import build_shards
from data_pipeline.volume.grid import Grid
from pretrain.config import RECIPES
from tests.cohorts import add_openbhb_split, write_cohort
from tests.runs import losses, run

pytestmark = pytest.mark.gpu
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "demo-cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Shards of 36 participants on a coarse grid, with OpenBHB's column of splits."""
    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "few", participants=36, diagnosis=["control"] * 3)
    columns = add_openbhb_split(cohort)
    out = tmp_path_factory.mktemp("shards") / "few"
    grid = Grid.of((48, 56, 48), np.array([[2.0, 0, 0, -48], [0, 2, 0, -66], [0, 0, 2, -38], [0, 0, 0, 1]]))
    build_shards(cohort, out, grid=grid, splits={"pretrain": 0.6, "monitor": 0.4}, columns=columns)
    return out


def train(name: str, device: str, shards: Path, output: Path) -> None:
    overrides = [f"--data.shards={shards}", f"--run.output={output}", "--train.steps=3", "--checkpoint.every_steps=2",
             "--batch.global=16", "--launch.ranks=1", "--data.workers=0"]  # fmt: skip
    if device == "cpu":
        overrides += ["--train.precision=fp32"]  # see test_training_gpu
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "infra.cli", "pretrain", "--config", name, *overrides]
    done = run(["env", f"DS_ACCELERATOR={device}", *command], output.parent, 280)
    assert done.returncode == 0, os.fspath(output)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_starts_and_resumes_at_its_own_precision(device, name, scans, tmp_path):
    output = tmp_path / "run"
    train(name, device, scans, output)
    whole = losses(output)
    assert [step for step, _ in whole] == [0, 1, 2]
    assert all(math.isfinite(loss) for _, loss in whole)
    shutil.rmtree(output / "checkpoints/step-00000003")
    (output / "checkpoints/latest").write_text("step-00000002\n")
    train(name, device, scans, output)
    assert losses(output)[2][1] == pytest.approx(whole[2][1], rel=1e-3)  # cuDNN sums in a different order each time
