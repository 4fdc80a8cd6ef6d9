"""`yaware plan`: counted operations against layers by hand, memory of a rank under ZeRO, and the printed forecast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infra import cli
from pretrain.config import load_recipe
from pretrain.launch.estimate import memory_of_a_rank, plain_model, scan_flops

P = 1000


def test_counted_operations_equal_those_of_two_layers_by_hand():
    """Two convolutions by hand: 2 operations per weight and output voxel, three times that with the backward pass."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

        def forward(self, views_2B1DHW: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.second(self.first(views_2B1DHW.flatten(0, 1))), None

    views, voxels = 2, 5 * 6 * 7
    first, second = 2 * 27 * 4 * voxels * views, 2 * 4 * 2 * voxels * views
    assert scan_flops(Two().to("meta"), (5, 6, 7)) == 2 * first + 3 * second  # no gradient for the input volume


def test_recomputation_is_not_counted():
    small = "--encoder.options={width: 0.25, norm: group"
    plain, saving = (load_recipe("demo-cpu", [small + end]) for end in ("}", ", checkpointing: true}"))
    assert scan_flops(plain_model(saving), (30, 36, 30)) == scan_flops(plain_model(plain), (30, 36, 30))


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("fp32", 0, (4, 4, 8)),  # no float32 copy of the weights
        ("fp32", 1, (4, 4, 12 / 4)),
        ("fp32", 2, (4, 4 / 4, 12 / 4)),
        ("bf16", 2, (2, 2 / 4, 12 / 4)),
        ("bf16", 3, (2 / 4, 2 / 4, 12 / 4)),
    ],
)
def test_zero_divides_optimizer_then_gradients_then_weights(precision, stage, expected):
    recipe = load_recipe("demo-cpu", [f"--train.precision={precision}", f"--deepspeed.zero_optimization.stage={stage}"])
    assert tuple(memory_of_a_rank(recipe, P, 4).values()) == tuple(P * share for share in expected)


def test_plan_prints_ranks_steps_memory_time_and_the_command(capsys):
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
        "ranks        64 (8 x 8); 32 scans per rank and step, in 4 passes of 8 (GradCache)",
        "steps        509 of 2048 scans: 100.0 epochs of 5.1 steps",
        "ZeRO 2       weights",
        "(estimate)",
        "at 100 TFLOP/s per rank (assumed)",
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
def test_an_impossible_plan_is_one_line(given, text, capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--batch.micro=null", "--scans", "100", *given]) == 2
    assert text in capsys.readouterr().err


def test_plan_names_missing_shards(capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--data.shards=nowhere"]) == 2
    assert "nowhere/manifest.json is missing" in capsys.readouterr().err
