"""`yaware plan`: counted operations against layers by hand, memory of a rank under ZeRO, and the printed forecast."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from infra import cli
from pretrain.config import load_recipe
from pretrain.forecast.hardware import GPUS, find_gpu
from pretrain.forecast.memory import MemoryModel
from pretrain.forecast.operations import memory_of_a_rank, plain_model, scan_flops
from pretrain.forecast.traffic import collectives_of_step

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
        "MiB, activations ",
        "MB sent per rank and step: embeddings 4.1, gradients ",
        "assuming     100 TFLOP/s per rank (given)",
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
        (["--gpu", "h10"], "--gpu=h10 is not known (did you mean 'h100'?); allowed: b200, h200, h100, a100,"),
        (["--gpu", "h100", "--utilisation", "1.5"], "--utilisation=1.5 must be more than 0 and at most 1"),
        (["--table"], "--table needs --gpu"),
        (["--tflops", "inf"], "--tflops=inf must be more than 0 and finite"),
        (["--tflops", "nan"], "--tflops=nan must be more than 0 and finite"),
        (["--scans", "63"], "--scans=63 is fewer than batch.global=64; lower batch.global or give more scans"),
    ],
)
def test_an_impossible_plan_is_one_line(given, text, capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--batch.micro=null", "--scans", "100", *given]) == 2
    assert text in capsys.readouterr().err


def test_plan_names_missing_shards(capsys):
    assert cli.run(["plan", "--config", "paper-bhb10k", "--data.shards=nowhere"]) == 2
    assert "nowhere/manifest.json is missing" in capsys.readouterr().err


NETWORK = "--encoder.options={width: 0.25, norm: group}"
SMALL = ["plan", "--config", "demo-cpu", "--scans", "1000", "--grid", "32x32x32", NETWORK]
FOUR = ["--nodes", "2", "--gpus", "2", "--gpu", "h100"]


def forecast_of(capsys, *given):
    assert cli.run([*SMALL, "--json", *given]) == 0
    return json.loads(capsys.readouterr().out)


def planned(capsys, *given):
    assert cli.run([*SMALL, *given]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_the_assumptions_name_what_is_not_counted(capsys):
    rows = planned(capsys, "--gpus=2", "--tflops=1", "--monitor.every_epochs=1", "--readouts.fit=true")
    assert "the exchange is not counted, because no --gpu names the network" in rows["assuming"]
    assert "DALI's own memory, checkpoints, the monitor and readouts are not counted" in rows["assuming"]
    assert "exchange not counted" in rows["time"]
    rows = planned(capsys, *FOUR, "--monitor.every_epochs=0", "--readouts.fit=false")
    assert "the exchange is not counted" not in rows["assuming"]
    assert rows["assuming"].endswith("DALI's own memory and checkpoints are not counted")


def test_a_gpu_is_named_in_any_case():
    assert find_gpu("H100") == GPUS["h100"]


def test_the_largest_batch_fits_and_one_scan_more_does_not(capsys):
    """The advice is checked by planning with it, on a GPU so small that the search ends early."""
    gpu = replace(GPUS["cpu"], memory=150e6)
    recipe = load_recipe("demo-cpu", [NETWORK])
    parameters = sum(p.numel() for p in plain_model(recipe).parameters())
    model = MemoryModel(recipe, (32, 32, 32), parameters, 2, gpu=gpu, loaded=3)
    largest = model.largest_batch(gpu.usable)
    assert largest > 2
    assert model.of_batch(largest).total <= 150e6 < model.of_batch(largest + 1).total
    assert model.largest_batch(1e6) == 0


def test_the_forecast_of_a_gpu_has_time_traffic_and_advice(capsys):
    found = forecast_of(capsys, *FOUR)
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values())
    # DeepSpeed reserves its bucket of float32 numbers before anything is in it.
    assert found["memory"]["parts"]["buffers"] == 4.0 * found["parameters"]
    given = forecast_of(capsys, *FOUR, "--deepspeed.zero_optimization.reduce_bucket_size=500000000")
    assert given["memory"]["parts"]["buffers"] == 2e9
    weights = 4.0 * found["parameters"]
    assert found["sent"]["gradients"] == 2 * weights * 3 / 4
    assert found["sent"]["weights"] == weights * 3 / 4
    timing = found["timing"]
    assert timing["scans_per_second"] == pytest.approx(32 / (timing["compute"] + timing["exchange"]))
    assert found["largest"] > found["scans"] == 8
    faster = forecast_of(capsys, *FOUR, "--utilisation", "0.55")
    assert faster["timing"]["compute"] == pytest.approx(timing["compute"] / 10)
    assert faster["timing"]["exchange"] == timing["exchange"]
    low = forecast_of(
        capsys, *FOUR, "--train.precision=bf16"
    )  # twice the peak, and nearly half of the share, as measured
    assert low["timing"]["compute"] == pytest.approx(timing["compute"] * 494 / 989 * 0.055 / 0.028)


def test_one_rank_sends_nothing_and_more_micro_batches_reduce_more_often_in_stage_two():
    recipe = load_recipe("demo-cpu", ["--deepspeed.zero_optimization.stage=2", "--batch.micro=2"])
    assert collectives_of_step(recipe, P, 8, 1, "nccl") == []
    gradients = [c for c in collectives_of_step(recipe, P, 8, 4, "nccl") if c.of == "gradients"]
    assert [(c.operation, c.times, c.size) for c in gradients] == [("all_reduce", 4, 4 * P)]
    assert gradients[0].sent(4, "nccl") == 4 * 2 * 3 / 4 * 4 * P


def test_the_table_doubles_the_hosts_and_keeps_the_scans_of_a_rank(capsys):
    assert cli.run([*SMALL, "--nodes", "3", "--gpus", "2", "--gpu", "a100", "--batch.global=48", "--table"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:2] == ["GPUs", "batch"]
    assert [row[:2] for row in rows[2:]] == [["2", "16"], ["4", "32"], ["6", "48"]]
