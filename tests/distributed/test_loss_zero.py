"""The gathered loss under DeepSpeed ZeRO 0 to 3 in float32, against one process in float64."""

from __future__ import annotations

import pytest

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from tests.distributed.cases import Job, one_process, relative_error
from tests.distributed.deepspeed_cases import serve, zero_steps
from tests.distributed.ranks import Ranks
from tests.reference import naive

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STAGES = (0, 1, 2, 3)
BANDWIDTH = 5.0


def check(world_size: int, jobs: list[Job]) -> None:
    """Check all jobs and stages on one set of ranks, since starting a DeepSpeed group takes seconds."""
    runs = [(stage, job) for job in jobs for stage in STAGES]
    with Ranks(world_size, serve) as pool:
        results = pool.run(zero_steps, world_size, jobs=runs)
    weight = naive.pair_weight("gaussian", BANDWIDTH)
    for index, (stage, job) in enumerate(runs):
        twin = naive.TWINS[job.loss]
        value, gradients = one_process(job, lambda views, proxies, _, twin=twin: twin(views, proxies, weight))
        for _, whole, found in (results[rank][index] for rank in range(world_size)):
            assert whole == pytest.approx(value, rel=1e-5), f"ZeRO {stage}, {job}"
            assert relative_error(found, gradients) < 1e-5, f"ZeRO {stage}, {job}"


def job(sizes: tuple[int, ...], loss: str = "y-aware", seed: int = 0, tile: int | None = None) -> Job:
    return Job(sizes, loss, {"kernel": KERNELS["gaussian"](bandwidth=BANDWIDTH), "tile": tile}, seed=seed)


def test_y_aware_on_three_ranks() -> None:
    check(3, [job((2, 2, 2)), job((1, 3, 2), seed=1, tile=2)])


def test_every_loss_on_two_ranks() -> None:
    plain = [job((3, 1), loss, seed) for seed, loss in enumerate(LOSSES)]
    check(2, [*plain, job((2, 2), tile=1), job((3, 1), "threshold", seed=9, tile=1)])


def test_y_aware_on_one_rank() -> None:
    check(1, [job((4,)), job((4,), tile=2)])
