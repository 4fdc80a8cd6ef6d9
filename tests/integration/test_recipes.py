"""Every shipped recipe: complete, documented at its head, and started and resumed by the real command on scaled-down scans."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_pipeline.cohort.split import parse_splits
from data_pipeline.shards.build import build_shards
from data_pipeline.volume.grid import Grid
from infra.errors import UserError
from pretrain.config import RECIPES, Recipe, check_micro_batch, load_recipe
from pretrain.encoders import check_encoder
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.run.objective import loss_options
from pretrain.run.plan import total_steps
from tests.cohorts import write_cohort
from tests.runs import losses, run

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# Ranks that a recipe is written for, as its head says, and ranks that the test gives it.
RANKS = {
    "demo-cpu": (2, 2), "paper-bhb10k": (1, 1), "paper-bhb10k-8gpu": (8, 2), "large-batch-64gpu": (64, 2),
    "vit-large-multinode": (32, 2), "openbhb": (1, 1), "simulated-6mm": (1, 1),
}  # fmt: skip
MEASURED = ("demo-cpu", "simulated-6mm")  # whose heads tell what was measured, and whose runs are named by the method
SMALL = {"large-batch-64gpu": ["--batch.micro=1"], "paper-bhb10k": ["--batch.micro=2"], "openbhb": ["--batch.micro=2"]}
# ViT-L itself is two ranks' 9 GiB here; its blocks are ViT-S's, and it is built and run in test_encoders.
SMALL["vit-large-multinode"] = ["--encoder.name=vit-small", "--encoder.options.grid=[30,32,30]"]


def started(name: str) -> object:
    """Those that start in seconds belong to every run of the tests; test_main_job starts the demo's."""
    return name if name == "paper-bhb10k" else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Shards of 36 people on the smallest grid that DenseNet121 takes, with OpenBHB's column."""
    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "few", participants=36, diagnosis=["control"] * 3)
    table = cohort / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{head}\topenbhb_split", *(f"{row}\ttrain" for row in rows)]) + "\n")
    out = tmp_path_factory.mktemp("shards") / "few"
    grid = Grid.of((30, 32, 30), np.array([[3.0, 0, 0, -44], [0, 3, 0, -62], [0, 0, 3, -34], [0, 0, 0, 1]]))
    build_shards(cohort, out, grid=grid, splits={"pretrain": 0.6, "monitor": 0.4}, workers=1)
    return out


def pretrain(name: str, shards: Path, output: Path) -> None:
    ranks = RANKS[name][1]
    # float32: a CPU has no bf16 kernel for some layers, and gradients of conv3d in bf16 are now and then garbage there.
    given = [f"--data.shards={shards}", f"--run.output={output}", "--train.steps=3", "--checkpoint.every_steps=2",
             "--batch.global=4", f"--launch.ranks={ranks}", "--data.workers=0", "--data.device=cpu", "--data.threads=1",
             "--train.precision=fp32", *SMALL.get(name, [])]  # fmt: skip
    command = [sys.executable, "-m", "infra.cli", "pretrain", "--config", name, *given]
    assert run(command, output.parent, timeout=1200).returncode == 0


@pytest.mark.distributed
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("name", [started(name) for name in SHIPPED if name != "demo-cpu"])
def test_a_recipe_starts_and_resumes(name, scans, tmp_path):
    output = tmp_path / "run"
    pretrain(name, scans, output)
    whole = losses(output)
    assert [step for step, _ in whole] == [0, 1, 2]
    assert np.isfinite([loss for _, loss in whole]).all()
    shutil.rmtree(output / "checkpoints/step-00000003")
    (output / "checkpoints/latest").write_text("step-00000002\n")
    pretrain(name, scans, output)
    assert losses(output) == whole  # the third step again, to the last digit


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_complete_and_possible_on_the_ranks_that_it_names(name):
    given = OmegaConf.load(RECIPES / f"{name}.yaml")
    assert set(given) == {field.name for field in fields(Recipe)}
    recipe, (ranks, _) = load_recipe(name, []), RANKS[name]
    assert recipe.run.name == ("y-aware" if name in MEASURED else name)
    check_micro_batch(recipe.batch, ranks)
    check_encoder(recipe.encoder.name, recipe.encoder.options, grid=(121, 145, 121))
    loss_options(recipe.loss)
    deepspeed_config(recipe, ranks)
    with pytest.raises(UserError, match="is not divisible by world_size"):
        check_micro_batch(recipe.batch, recipe.batch.global_ - 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipes_head_says_command_hardware_time_and_what_to_expect(name):
    head = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"--config {name}\n" in re.sub(r" +# .*| +$", "", text, flags=re.MULTILINE) + "\n"
    for word in ("Hardware:", "Time:", "Expect:"):
        assert word in text
    if name not in MEASURED:  # the others must not seem so
        assert "not measured by us" in text or "nothing measured by us" in text
        assert "Time: not measured" in text


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name, []).train.steps is None])
def test_a_recipes_head_counts_the_scans_that_its_shards_have_and_the_steps_that_these_are(name):
    text, recipe = (RECIPES / f"{name}.yaml").read_text(), load_recipe(name, [])
    ((epochs, scans, steps),) = re.findall(r"(\d+) epochs of ([\d,]+) scans are ([\d,]+) steps", text)
    assert int(epochs) == recipe.train.epochs
    assert number(steps) == total_steps(recipe, number(scans))
    trained, every = map(number, re.search(r"(\d[\d,]*) of (?:\S+ )?(\d[\d,]*)", text).groups())
    assert trained == number(scans)
    heads = "".join(path.read_text() for path in RECIPES.glob("*.yaml"))
    shares = parse_splits(re.search(rf"shards build \S+ {recipe.data.shards} .*--splits (\S+)", heads)[1])
    assert trained == pytest.approx(every * sum(shares[split] for split in recipe.data.split), rel=0.01)
    assert recipe.monitor.split in shares
