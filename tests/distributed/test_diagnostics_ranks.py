"""Effective positives on real ranks, with unequal batches, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.diagnostics import Positives, effective_positives, positive_statistics
from pretrain.losses.gather import AllGather
from tests.distributed.cases import Job, batch
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

KERNEL = KERNELS["gaussian"](bandwidth=8.0)


def positives_on_rank(group: dist.ProcessGroup, rank: int, job: Job) -> tuple[Tensor, Positives]:
    _, proxies, _ = batch(job)
    gather = AllGather(group)
    own = proxies[job.own(rank)]
    positives = effective_positives(own, KERNEL, gather=gather)
    return positives, positive_statistics([positives], [own], gather)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 0, 2), (2, 1, 1, 3)], ids=str)
def test_effective_positives_and_their_summary_equal_one_process(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    job = Job(sizes, missing=True)
    _, proxies, _ = batch(job)
    expected = effective_positives(proxies, KERNEL)
    results = ranks.run(positives_on_rank, len(sizes), job=job)
    torch.testing.assert_close(torch.cat([positives for positives, _ in results]), expected)
    whole = positive_statistics([expected], [proxies])
    for _, summary in results:
        assert summary.histogram == whole.histogram
        assert (summary.scans, summary.below_two, summary.missing) == (whole.scans, whole.below_two, whole.missing)
        assert summary.mean == pytest.approx(whole.mean, rel=1e-12)
