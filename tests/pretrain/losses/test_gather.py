"""The gather on real ranks: order of the columns, types, unequal batches, and the sum of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.losses import gather as gather_module
from pretrain.losses.gather import AllGather, SingleProcess
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(3) as pool:
        yield pool


def gathered(
    group: dist.ProcessGroup, rank: int, sizes: Sequence[int], known: bool, dtype: torch.dtype, exchanged: bool
) -> Any:
    # The method for NCCL also works on gloo, only more slowly.
    gather_module.ALL_TO_ALL_BACKENDS = ("gloo",) if exchanged else ()
    scans = sizes[rank]
    z = (torch.arange(2 * scans * 3, dtype=dtype).view(2, scans, 3) + 1000 * (rank + 1)).requires_grad_()
    proxies = torch.full((scans, 2), rank + 0.5, dtype=torch.float32)
    subjects = torch.arange(scans) + 2**40 * (rank + 1)
    flags = torch.ones(scans, dtype=torch.bool)
    columns = AllGather(group, sizes if known else None)(z, [proxies, subjects, flags])
    # Each rank weights the columns by its own number, so that the gradient shows the contribution of each rank.
    weights = torch.arange(columns.z_2GD.numel(), dtype=dtype).view_as(columns.z_2GD) * (rank + 1)
    (columns.z_2GD * weights).sum().backward()
    return z.detach(), z.grad, columns.z_2GD.detach(), columns.metadata, columns.start, columns.world_size


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchanged", "reduced"])
@pytest.mark.parametrize("known", [False, True], ids=["sizes-exchanged", "sizes-given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(2,), (2, 2), (1, 3), (2, 0, 3), (1, 1, 1)], ids=str)
def test_columns_come_in_the_order_of_the_ranks_and_gradients_are_summed(
    ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype, known: bool, exchanged: bool
) -> None:
    world, total = len(sizes), sum(sizes)
    results = ranks.run(gathered, world, sizes=sizes, known=known, dtype=dtype, exchanged=exchanged)
    everyone = torch.cat([z for z, *_ in results], dim=1)
    weights = torch.arange(2 * total * 3, dtype=dtype).view(2, total, 3) * sum(range(1, world + 1))
    for rank, (z, gradient, columns, metadata, start, reported) in enumerate(results):
        assert (start, reported) == (sum(sizes[:rank]), world)
        assert torch.equal(columns, everyone)
        assert torch.equal(columns[:, start : start + sizes[rank]], z)
        assert torch.equal(gradient, weights[:, start : start + sizes[rank]])
        proxies, subjects, flags = metadata
        owners = torch.repeat_interleave(torch.arange(world), torch.tensor(sizes))
        assert torch.equal(proxies, (owners + 0.5)[:, None].expand(total, 2))
        # float32 could not carry these.
        assert torch.equal(subjects // 2**40, owners + 1)
        assert flags.all()


def wrong_size(group: dist.ProcessGroup, rank: int) -> str:
    try:
        AllGather(group, [1, 1])(torch.ones(2, 3, 4), [])
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_batch_that_contradicts_the_given_sizes_is_refused(ranks: Ranks) -> None:
    for rank, text in enumerate(ranks.run(wrong_size, 2)):
        assert text.startswith(f"rank {rank} holds 3 scans, but sizes has 1; leave sizes out")


def failing(group: dist.ProcessGroup, rank: int) -> int:
    if rank == 1:
        raise RuntimeError("as planned")
    return rank


def test_the_pool_reports_a_failing_rank_and_recovers(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1.*as planned"):
        ranks.run(failing, 2)
    assert ranks.run(failing, 1) == [0]


def test_a_single_process_gathers_its_own_rows() -> None:
    z, ages = torch.ones(2, 3, 4), torch.ones(3, 1)
    columns = SingleProcess()(z, [ages])
    assert columns.z_2GD is z
    assert columns.metadata[0] is ages
    assert (columns.start, columns.world_size) == (0, 1)
