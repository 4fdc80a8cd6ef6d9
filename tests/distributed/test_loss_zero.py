"""The gathered loss under DeepSpeed ZeRO 0 to 3 in float32, against one process in float64."""

from __future__ import annotations

import pytest

from pretrain.kernels import KERNELS
from tests.distributed.cases import Job, one_process, relative_error
from tests.distributed.deepspeed_cases import serve, zero_steps
from tests.distributed.ranks import Ranks
from tests.reference import naive

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

STAGES = (0, 1, 2, 3)


def check(world_size: int, sizes: list[tuple[int, ...]]) -> None:
    """One set of ranks for all stages and sizes: starting a DeepSpeed group takes seconds."""
    options = {"kernel": KERNELS["gaussian"](bandwidth=5.0)}
    jobs = [(stage, Job(size, options=options, seed=seed)) for seed, size in enumerate(sizes) for stage in STAGES]
    with Ranks(world_size, serve) as pool:
        results = pool.run(zero_steps, world_size, jobs=jobs)
    weight = naive.pair_weight("gaussian", 5.0)
    for index, (stage, job) in enumerate(jobs):
        value, gradients = one_process(job, lambda views, proxies, _: naive.y_aware(views, proxies, weight))
        for share, whole, found in (results[rank][index] for rank in range(world_size)):
            assert share != pytest.approx(value, rel=1e-4) or world_size == 1
            assert whole == pytest.approx(value, rel=1e-5), f"ZeRO {stage}, {job.sizes}"
            assert relative_error(found, gradients) < 1e-5, f"ZeRO {stage}, {job.sizes}"


def test_zero_stages_on_three_ranks() -> None:
    check(3, [(2, 2, 2), (1, 3, 2)])


def test_zero_stages_on_two_ranks() -> None:
    check(2, [(2, 2), (3, 1)])


def test_zero_stages_on_one_rank() -> None:
    check(1, [(4,)])
