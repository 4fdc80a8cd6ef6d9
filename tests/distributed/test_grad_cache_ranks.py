"""Gradient caching on real ranks, without an engine and under ZeRO 0 to 3, against one pass over the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from tests.distributed.cases import Job, Network, PlainEngine, backward, encoder, gradients, relative_error
from tests.distributed.deepspeed_cases import serve, zero_steps
from tests.distributed.ranks import Ranks
from tests.distributed.test_all_losses_ranks import expected_of
from tests.distributed.test_loss_ranks import errors

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
KERNEL = KERNELS["gaussian"](bandwidth=8.0)
STAGES = (0, 1, 2, 3)


def whole_pass(job: Job) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one process in one pass, float64; the temperature is a parameter if it is learned."""
    model = Network(encoder(), job.learned)
    alone = Job((job.total,), job.loss, job.options, learned=job.learned, missing=job.missing, seed=job.seed)
    loss = backward(PlainEngine(model), alone, 0, None, torch.float64)
    return loss.item(), gradients(model)


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (0, 4), (1, 3, 2), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_from_micro_batches_equals_one_process(ranks: Ranks, loss: str, sizes: tuple[int, ...]) -> None:
    jobs = [
        Job(sizes, loss, {"kernel": KERNEL, "tile": tile}, micro=micro, missing=micro == 2, seed=micro)
        for micro, tile in ((1, None), (2, None), (2, 1), (9, None))
    ]
    for job, (loss_error, gradient_error) in zip(
        jobs, errors(ranks, jobs, [expected_of(job) for job in jobs]), strict=True
    ):
        assert loss_error < 1e-10, job
        assert gradient_error < 1e-10, job


@pytest.mark.parametrize("form", ["detached", "no-offset", "factor-twice"])
def test_a_wrong_gather_is_also_detected_with_gradient_caching(ranks: Ranks, form: str) -> None:
    job = Job((2, 4), "y-aware", {"kernel": KERNEL}, gather=form, micro=1, seed=5)
    [(_, gradient_error)] = errors(ranks, [job], [expected_of(job)])
    assert gradient_error > 1e-2


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (1, 3, 2)], ids=str)
def test_a_learned_temperature_gets_the_gradient_of_all_ranks(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    jobs = [Job(sizes, "y-aware", {"kernel": KERNEL, "tile": tile}, micro=micro, learned=True, seed=3)
            for micro, tile in ((None, None), (None, 2), (1, None), (2, 1))]  # fmt: skip
    expected = [whole_pass(job) for job in jobs]
    assert abs(expected[0][1]["temperature.log_temperature"].item()) > 1e-3
    for loss_error, gradient_error in errors(ranks, jobs, expected):
        assert loss_error < 1e-10
        assert gradient_error < 1e-10


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.jobs)])
def test_micro_batches_under_zero_equal_one_process(world_size: int) -> None:
    losses = LOSSES if world_size == 2 else ["y-aware"]
    jobs = [Job((4,) * world_size, loss, {"kernel": KERNEL, "tile": tile}, micro=micro, learned=learned, seed=micro)
            for loss in losses for micro, tile, learned in ((1, None, False), (2, 2, loss == "y-aware"))]  # fmt: skip
    runs = [(stage, job) for job in jobs for stage in STAGES]
    with Ranks(world_size, serve) as pool:
        results = pool.run(zero_steps, world_size, jobs=runs)
    for index, (stage, job) in enumerate(runs):
        value, expected = whole_pass(job)
        for _, found_value, found in (results[rank][index] for rank in range(world_size)):
            assert found_value == pytest.approx(value, rel=1e-5), f"ZeRO {stage}, {job}"
            assert relative_error(found, expected) < 1e-5, f"ZeRO {stage}, {job}"
