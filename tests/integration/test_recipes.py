"""Every shipped recipe is complete and possible; the real command starts and resumes it on small scans; its head is true."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_pipeline.cli import RUN
from data_pipeline.cohort.split import parse_splits
from data_pipeline.shards.build import build_shards
from data_pipeline.volume.grid import Grid
from infra import cli
from infra.errors import UserError
from pretrain.config import RECIPES, Recipe, check_micro_batch, load_recipe
from pretrain.encoders import check_encoder
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.run.objective import loss_options
from pretrain.train import parse_arguments
from tests.cohorts import add_openbhb_split, write_cohort
from tests.runs import losses, run

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# Ranks that a recipe is written for, and ranks that the test uses.
RANKS = {
    "demo-cpu": (2, 2), "paper-bhb10k": (1, 1), "paper-bhb10k-8gpu": (8, 2), "large-batch-64gpu": (64, 2),
    "vit-large-multinode": (32, 2), "openbhb": (1, 1), "simulated-6mm": (1, 1),
}  # fmt: skip
NAMED_BY_METHOD = ("demo-cpu", "simulated-6mm")
SMALL = {"large-batch-64gpu": ["--batch.micro=1"], "paper-bhb10k": ["--batch.micro=2"], "openbhb": ["--batch.micro=2"]}
# ViT-L takes 9 GiB on two ranks; its blocks are those of ViT-S, and encoders/test_networks.py builds and runs it.
SMALL["vit-large-multinode"] = ["--encoder.name=vit-small", "--encoder.options.grid=[30,32,30]"]


def marked(name: str) -> object:
    """Only paper-bhb10k is quick enough for `make test-jobs`; test_main_job runs demo-cpu."""
    return name if name == "paper-bhb10k" else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Shards of 36 participants on the smallest grid that DenseNet121 accepts, with OpenBHB's split column."""
    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "few", participants=36, diagnosis=["control"] * 3)
    columns = add_openbhb_split(cohort)
    out = tmp_path_factory.mktemp("shards") / "few"
    grid = Grid.of((30, 32, 30), np.array([[3.0, 0, 0, -44], [0, 3, 0, -62], [0, 0, 3, -34], [0, 0, 0, 1]]))
    build_shards(cohort, out, grid=grid, splits={"pretrain": 0.6, "monitor": 0.4}, columns=columns)
    return out


def pretrain(name: str, shards: Path, output: Path) -> None:
    ranks = RANKS[name][1]
    # float32, because CPUs lack bf16 kernels for some layers and sometimes compute wrong bf16 gradients of conv3d.
    given = [f"--data.shards={shards}", f"--run.output={output}", "--train.steps=3", "--checkpoint.every_steps=2",
             "--batch.global=4", f"--launch.ranks={ranks}", "--data.workers=0", "--data.device=cpu", "--data.threads=1",
             "--train.precision=fp32", *SMALL.get(name, [])]  # fmt: skip
    command = [sys.executable, "-m", "infra.cli", "pretrain", "--config", name, *given]
    assert run(command, output.parent, timeout=1200).returncode == 0


@pytest.mark.jobs
@pytest.mark.distributed
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("name", [marked(name) for name in SHIPPED if name != "demo-cpu"])
def test_a_recipe_starts_and_resumes(name, scans, tmp_path):
    output = tmp_path / "run"
    pretrain(name, scans, output)
    whole = losses(output)
    assert [step for step, _ in whole] == [0, 1, 2]
    assert np.isfinite([loss for _, loss in whole]).all()
    shutil.rmtree(output / "checkpoints/step-00000003")
    (output / "checkpoints/latest").write_text("step-00000002\n")
    pretrain(name, scans, output)
    assert losses(output) == whole  # the repeated third step is equal to the last bit


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_complete_and_possible_on_the_ranks_that_it_names(name):
    given = OmegaConf.load(RECIPES / f"{name}.yaml")
    assert set(given) == {field.name for field in fields(Recipe)}
    recipe, (ranks, _) = load_recipe(name, []), RANKS[name]
    assert recipe.run.name == ("y-aware" if name in NAMED_BY_METHOD else name)
    check_micro_batch(recipe.batch, ranks)
    check_encoder(recipe.encoder.name, recipe.encoder.options, grid=(121, 145, 121))
    loss_options(recipe.loss)
    deepspeed_config(recipe, ranks)
    with pytest.raises(UserError, match="is not divisible by world_size"):
        check_micro_batch(recipe.batch, recipe.batch.global_ - 1)


def commands(name: str) -> list[list[str]]:
    """The command lines in the head of a recipe, as a shell splits them."""
    head = re.findall(r"^#   ((?:yaware|deepspeed|sbatch) .*)$", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in head]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_command_in_a_recipes_head_is_valid_and_uses_the_recipe(name, tmp_path, monkeypatch):
    """Build commands are parsed by `yaware shards build`; start commands must resolve to this recipe and its ranks."""
    built: list[dict[str, object]] = []
    monkeypatch.setitem(RUN, "build", lambda options: built.append(vars(options)) or 0)
    starts = 0
    for command in commands(name):
        if command[:3] == ["yaware", "shards", "build"]:
            assert cli.run(command[1:]) == 0
            assert str(built[-1]["out"]) == load_recipe(name, []).data.shards
            continue
        starts += 1
        recipe_at = (
            command.index("--config") if "--config" in command else command.index("infra/launch/pretrain.sbatch")
        )
        assert load_recipe(*parse_arguments(["--config", *command[recipe_at + 1 : recipe_at + 2]])) == load_recipe(
            name, []
        )
        if command[0] == "deepspeed":
            assert command == [*command[:3], "--module", "pretrain.train", "--config", name]
            assert command[1] == "--hostfile" or int(command[2]) == RANKS[name][0] == load_recipe(name, []).launch.ranks
        if command[0] == "sbatch":
            counts = dict(part.lstrip("-").split("=") for part in command if "=" in part)
            assert int(counts["nodes"]) * int(counts["ntasks-per-node"]) == RANKS[name][0]
    assert starts, f"{name} has no command to start it"


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name, []).train.steps is None])
def test_yaware_plan_computes_the_steps_that_a_recipes_head_states(name, capsys):
    text, (ranks, _) = (RECIPES / f"{name}.yaml").read_text(), RANKS[name]
    ((epochs, scans, steps),) = re.findall(r"(\d+) epochs of ([\d,]+) scans are ([\d,]+) steps", text)
    assert int(epochs) == load_recipe(name, []).train.epochs
    shape = ["--nodes", str(max(1, ranks // 8)), "--gpus", str(min(8, ranks)), "--scans", str(number(scans))]
    assert cli.run(["plan", "--config", name, *shape, "--encoder.name=resnet18", "--encoder.options={}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^steps +{steps} of ", printed, re.MULTILINE)
    assert re.search(rf"^ranks +{ranks} \(", printed, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name, []).train.steps is None])
def test_the_split_of_a_recipes_shards_has_the_scans_that_its_head_states(name):
    text, recipe = (RECIPES / f"{name}.yaml").read_text(), load_recipe(name, [])
    trained, total = map(number, re.search(r"(\d[\d,]*) of (?:\S+ )?(\d[\d,]*)", text).groups())
    builds = [command for other in SHIPPED for command in commands(other) if "build" in command]
    (build,) = [command for command in builds if command[4] == recipe.data.shards]
    shares = parse_splits(build[build.index("--splits") + 1])
    assert trained == pytest.approx(total * sum(shares[split] for split in recipe.data.split), rel=0.01)
    assert recipe.monitor.split in shares
