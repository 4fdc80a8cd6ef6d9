"""Every loss, plain and tiled, on one to four gloo ranks with unequal data, against the naive version in one process."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import LOSSES
from tests.distributed.cases import Job, one_process
from tests.distributed.ranks import Ranks
from tests.distributed.test_loss_ranks import errors
from tests.reference import naive

pytestmark = pytest.mark.distributed

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "y-aware": [{}, {"normalization": "column"}, {"subjects": True}, {"cross_view": True, "temperature": 0.5}],
    "threshold": [{}, {"subjects": True}, {"cross_view": True}],
    "exp": [{}, {"subjects": True}, {"cross_view": True}],
    "rank-n-contrast": [{}, {"subjects": True}, {"cross_view": True}],
    "decoupled-uniformity": [{}, {"subjects": True}, {"ridge": 0.1}],
}
TILES = [None, 1, 2, "auto"]


def expected_of(job: Job) -> tuple[float, dict[str, Tensor]]:
    weight = naive.pair_weight("gaussian", 8.0)
    kept = {key: value for key, value in job.options.items() if key not in ("kernel", "tile", "subjects")}

    def twin(views: Tensor, proxies: Tensor, subjects: Tensor) -> Tensor:
        chosen = {"subjects": subjects.tolist()} if job.options.get("subjects") else {}
        return naive.TWINS[job.loss](views, proxies, weight, **kept, **chosen)

    return one_process(job, twin)


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (0, 4), (1, 3, 2), (3, 0, 2), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_equal_one_process(ranks: Ranks, loss: str, sizes: tuple[int, ...]) -> None:
    kernel = KERNELS["gaussian"](bandwidth=8.0)
    jobs, expected = [], []
    for seed, options in enumerate(OPTIONS[loss]):
        job = Job(sizes, loss, {"kernel": kernel, **options}, missing=seed == 0, seed=seed)
        twin = expected_of(job)
        for tile in TILES:
            jobs.append(Job(sizes, loss, {**job.options, "tile": tile}, missing=job.missing, seed=seed))
            expected.append(twin)
    for job, (loss_error, gradient_error) in zip(jobs, errors(ranks, jobs, expected), strict=True):
        assert loss_error < 1e-10, job.options
        assert gradient_error < 1e-10, job.options


@pytest.mark.parametrize("form", ["detached", "no-offset", "no-factor", "factor-twice", "local-mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_wrong_form_of_any_loss_is_detected(ranks: Ranks, loss: str, form: str) -> None:
    job = Job((2, 4), loss, {"kernel": KERNELS["gaussian"](bandwidth=8.0), "tile": 2}, gather=form, seed=5)
    [(_, gradient_error)] = errors(ranks, [job], [expected_of(job)])
    assert gradient_error > 1e-2
