"""Reconstruction and the dense loss on real ranks with different scans: values and gradients are those of naive loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from pretrain.losses.dense import dense_loss
from pretrain.losses.gather import AllGather
from pretrain.losses.reconstruction import reconstruction_error, squared_errors
from tests.distributed.cases import GATHERS
from tests.distributed.engine_cases import Run, plain_steps
from tests.distributed.test_engine_ranks import Pools, losses, zero
from tests.reference import naive, terms

pytestmark = pytest.mark.distributed
TOTAL = 6
CUTS = [(0, 6), (0, 1, 6), (0, 2, 3, 6), (0, 0, 4, 6)]


def batch():
    """Cells, which are shown, ages, subjects, rebuilt volumes, volumes and hidden voxels; the scans differ in all of them."""
    source = torch.Generator().manual_seed(0)
    cells = torch.randn(2, TOTAL, 8, 5, generator=source, dtype=torch.float64)
    shown = torch.rand(TOTAL, 8, generator=source) < 0.6
    shown[:, 0], shown[1:, 1], shown[:3, 2], shown[3:, 2] = False, False, True, False
    ages = 20 + 30 * torch.rand(TOTAL, 1, generator=source, dtype=torch.float64)
    volumes = torch.randn((2, 2, TOTAL, 1, 4, 3, 2), generator=source, dtype=torch.float64)
    hidden = torch.rand((2, TOTAL, 1, 4, 3, 2), generator=source) < torch.rand((2, TOTAL, 1, 1, 1, 1), generator=source)
    return cells, shown, ages, torch.tensor([0, 1, 2, 0, 4, 1]), volumes[0], volumes[1], hidden


def on_a_rank(group, rank, cuts, name, tile, form):
    cells, shown, ages, subjects, rebuilt, volumes, hidden = batch()
    own, gather = slice(cuts[rank], cuts[rank + 1]), GATHERS[form](group)
    cells.requires_grad_()
    rebuilt.requires_grad_()
    kernel = KERNELS["gaussian"](bandwidth=8.0)

    def of_cell(views, its_ages, its_gather, its_subjects):
        options = {} if tile is None else {"tile": tile}
        return LOSSES[name](views, its_ages, kernel=kernel, gather=its_gather, subjects=its_subjects, **options)

    dense = dense_loss(cells[:, own], shown[own], ages[own], loss=of_cell, gather=gather, subjects=subjects[own])
    errors = squared_errors(rebuilt[:, own], volumes[:, own], hidden[:, own])
    reconstruction = reconstruction_error(errors, AllGather(group))
    (dense + reconstruction).backward()
    return dense.item(), cells.grad, reconstruction.item(), rebuilt.grad


def expected_of(name):
    cells, shown, ages, subjects, rebuilt, volumes, hidden = batch()
    cells.requires_grad_()
    rebuilt.requires_grad_()
    weight = naive.pair_weight("gaussian", 8.0)
    dense = terms.dense(cells, shown.tolist(), ages, naive.TWINS[name], weight, subjects.tolist())
    reconstruction = terms.reconstruction(rebuilt, volumes, hidden)
    (dense + reconstruction).backward()
    return dense.item(), cells.grad, reconstruction.item(), rebuilt.grad


def worst(found, expected):
    return float((sum(found) / len(found) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("name", "tile"), [*((name, None) for name in LOSSES), ("y-aware", 2)])
def test_the_mean_over_ranks_is_that_of_the_naive_loops(ranks, cuts, name, tile):
    found = list(zip(*ranks.run(on_a_rank, len(cuts) - 1, cuts=cuts, name=name, tile=tile, form="right"), strict=True))
    expected = expected_of(name)
    for place in (0, 2):
        assert np.mean(found[place]) == pytest.approx(expected[place], rel=1e-10)
    for place in (1, 3):
        assert worst(found[place], expected[place]) < 1e-10


@pytest.mark.parametrize("form", ["detached", "no-offset", "factor-twice"])
def test_a_wrong_gather_is_detected(ranks, form):
    found = list(zip(*ranks.run(on_a_rank, 3, cuts=(0, 2, 3, 6), name="y-aware", tile=None, form=form), strict=True))
    assert worst(found[1], expected_of("y-aware")[1]) > 1e-2


BOTH = ("--loss.reconstruction={weight: 0.5, masked: 0.2}", "--loss.dense={weight: 0.7, grid: 2}",
        "--loss.temperature_bounds=[0.01, 1.0]")  # fmt: skip
LAYERS = ("--loss.reconstruction.layer=layer1", "--loss.dense.layer=layer1")
MICRO = ("--batch.micro=2",)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    started = Pools()
    yield started
    started.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(1, [(0, ()), (3, MICRO)]), (2, [(0, MICRO), (1, ()), (2, MICRO), (3, ())]), (3, [(1, MICRO), (3, MICRO)])],
)
def test_training_with_both_terms_equals_plain_torch_under_every_stage_and_in_micro_batches(
    pools: Pools, world_size: int, cases: list[tuple[int, tuple[str, ...]]]
) -> None:
    clip = "--deepspeed.gradient_clipping=1000"
    by_layers = {layers: plain_steps((*BOTH, clip, *layers), 3) for layers in ((), LAYERS)}
    runs = [
        (layers, Run((*BOTH, zero(stage), clip, *micro, *layers), last=3))
        for stage, micro in cases
        for layers in by_layers
    ]
    for (layers, run), result in zip(runs, pools.run(world_size, [run for _, run in runs]), strict=True):
        expected = by_layers[layers]
        assert losses(result) == pytest.approx([step["loss"] for step in expected], rel=1e-5), run
        for found, plain in zip(result["metrics"], expected, strict=True):
            assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4), run
            parts = [found[f"loss/{name}"] for name in ("contrastive", "reconstruction", "dense")]
            assert found["loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.7 * parts[2], rel=1e-6)
            assert min(parts[1:]) > 0.01


@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_both_terms_resumes_bit_for_bit_and_on_other_ranks(
    pools: Pools, tmp_path: Path, precision: str
) -> None:
    options = (*BOTH, zero(2), f"--train.precision={precision}")
    whole, resumed = pools.run(2, [Run(options, save=tmp_path), Run(options, load=tmp_path)])
    assert resumed["metrics"] == whole["metrics"][3:]
    assert all(torch.equal(resumed["encoder"][name], value) for name, value in whole["encoder"].items())
    [other] = pools.run(3, [Run((*BOTH, zero(1), f"--train.precision={precision}"), load=tmp_path)])
    assert losses(other) == pytest.approx(losses(whole)[3:], rel=1e-5 if precision == "fp32" else 1e-2)
