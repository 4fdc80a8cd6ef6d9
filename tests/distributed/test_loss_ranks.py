"""The loss on real gloo ranks, with different data on each, against one process in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from tests.distributed.cases import Job, jobs_on_ranks, one_process, relative_error
from tests.distributed.ranks import Ranks
from tests.reference import naive

pytestmark = pytest.mark.distributed

GAUSSIAN = KERNELS["gaussian"](bandwidth=5.0)
# Scans per rank: a single rank; equal numbers; one scan each; unequal numbers; a rank without scans.
SIZES = [(4,), (3, 3), (1, 1), (2, 4), (4, 1), (2, 2, 2), (1, 3, 2), (3, 0, 2), (2, 1, 1, 3)]


def naive_y_aware(views: Tensor, proxies: Tensor, _: Tensor, bandwidth: float = 5.0, **options: str) -> Tensor:
    return naive.y_aware(views, proxies, naive.pair_weight("gaussian", bandwidth), **options)


def errors(ranks: Ranks, jobs: list[Job], expected: list[tuple[float, dict[str, Tensor]]]) -> list[tuple[float, float]]:
    """Return the relative (loss error, gradient error) of each job, the largest of its ranks."""
    world = len(jobs[0].sizes)
    results = ranks.run(jobs_on_ranks, world, jobs=jobs)
    found = []
    for index, (value, gradients) in enumerate(expected):
        per_rank = [results[rank][index] for rank in range(world)]
        mean = sum(share for share, _, _ in per_rank) / world
        loss_error = max(abs(mean - value), *(abs(whole - value) for _, whole, _ in per_rank)) / abs(value)
        found.append((loss_error, max(relative_error(own, gradients) for _, _, own in per_rank)))
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_gradients_equal_one_process(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    column = {"normalization": "column"}
    jobs = [
        Job(sizes, options={"kernel": GAUSSIAN}),
        Job(sizes, options={"kernel": GAUSSIAN}, missing=True, seed=1),
        Job(sizes, options={"kernel": KERNELS["gaussian"](bandwidth=0.0), "temperature": 0.5}, seed=2),
        Job(sizes, options={"kernel": GAUSSIAN, **column}, seed=3),
    ]
    twins = [
        naive_y_aware,
        naive_y_aware,
        partial(naive_y_aware, bandwidth=0.0, temperature=0.5),
        partial(naive_y_aware, **column),
    ]
    expected = [one_process(job, twin) for job, twin in zip(jobs, twins, strict=True)]
    for loss_error, gradient_error in errors(ranks, jobs, expected):
        assert loss_error < 1e-10
        assert gradient_error < 1e-10


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4), (1, 3, 2)], ids=str)
def test_distributed_data_parallel_needs_no_further_factor(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    job = Job(sizes, options={"kernel": GAUSSIAN}, ddp=True)
    [(loss_error, gradient_error)] = errors(ranks, [job], [one_process(job, naive_y_aware)])
    assert loss_error < 1e-10
    assert gradient_error < 1e-10


def test_with_equal_batches_the_scalar_of_a_rank_is_the_mean_over_its_anchors(ranks: Ranks) -> None:
    job = Job((2, 2), options={"kernel": GAUSSIAN})
    shares = [result[0][0] for result in ranks.run(jobs_on_ranks, 2, jobs=[job])]
    assert shares[0] != pytest.approx(shares[1], rel=1e-3)
    whole, _ = one_process(job, naive_y_aware)
    assert sum(shares) / 2 == pytest.approx(whole, rel=1e-12)


# Wrong form -> whether its *loss* is also wrong. Its gradient must be wrong for unequal data.
WRONG = {
    "detached": False,
    "own-slot": False,
    "no-offset": True,
    "no-factor": True,
    "factor-twice": True,
    "local-mean": True,
}


@pytest.mark.parametrize("form", WRONG)
def test_a_wrong_form_is_detected(ranks: Ranks, form: str) -> None:
    job = Job((2, 4), options={"kernel": GAUSSIAN}, gather=form)
    [(loss_error, gradient_error)] = errors(ranks, [job], [one_process(job, naive_y_aware)])
    assert gradient_error > 1e-2
    assert loss_error > 1e-3 if WRONG[form] else loss_error < 1e-10


def test_column_normalisation_is_detected(ranks: Ranks) -> None:
    """It differs from row normalisation not only by the factor 2: halved, loss and gradient still differ."""
    job = Job((3, 5), options={"kernel": KERNELS["gaussian"](bandwidth=10.0), "normalization": "column"})
    value, gradients = one_process(job, partial(naive_y_aware, bandwidth=10.0))
    doubled = 2 * value, {name: 2 * gradient for name, gradient in gradients.items()}
    [(loss_error, gradient_error)] = errors(ranks, [job], [doubled])
    assert loss_error > 1e-3
    assert gradient_error > 1e-2


def test_the_single_process_of_the_package_equals_the_naive_version(ranks: Ranks) -> None:
    job = Job((5,), options={})
    plain = one_process(job, lambda views, proxies, _: LOSSES["y-aware"](views, proxies, kernel=GAUSSIAN))
    expected = one_process(job, naive_y_aware)
    assert plain[0] == pytest.approx(expected[0], rel=1e-12)
    assert relative_error(plain[1], expected[1]) < 1e-12
    assert torch.isfinite(torch.tensor(plain[0]))
