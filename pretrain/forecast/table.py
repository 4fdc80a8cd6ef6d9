"""The table of ``yaware plan --table``: the same scans per rank on one host, two, four, ... up to the hosts that are given."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

from infra.errors import UserError
from pretrain.config import Recipe
from pretrain.forecast.cluster import Machine, forecast_step
from pretrain.forecast.memory import MemoryModel
from pretrain.run.plan import total_steps

COLUMNS = ("GPUs", "batch", "GiB per rank", "MB sent per step", "s per step", "exchange", "scans/s", "MB/s of shards", "steps",
           "hours")  # fmt: skip


def doubled(largest: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... up to ``largest``, which is always the last."""
    nodes = 1
    while nodes < largest:
        yield nodes
        nodes *= 2
    yield largest


def table(
    recipe: Recipe, machine: Machine, model: MemoryModel, *, flops: float, scan_bytes: float, scans: int,
    tflops: float | None = None,
) -> list[str]:  # fmt: skip
    """Return the table in Markdown. Arguments are those of `pretrain.forecast.cluster.forecast_step`, and scans per epoch.

    Raises UserError if the kind of GPU is not known.
    """
    if machine.gpu is None:
        raise UserError("--table needs --gpu: h100, a100, ...")
    share = recipe.batch.global_ // machine.ranks
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for nodes in doubled(machine.nodes):
        part, shape = deepcopy(recipe), replace(machine, nodes=nodes)
        part.batch.global_ = share * shape.ranks
        step = forecast_step(
            part, shape, model.for_ranks(part, shape.ranks), flops=flops, scan_bytes=scan_bytes, tflops=tflops
        )
        timing, steps = step.timing, total_steps(part, scans)
        assert timing is not None
        rows.append((
            f"{shape.ranks:,}", f"{part.batch.global_:,}", f"{step.memory.total / 2**30:.1f}",
            f"{sum(step.sent.values()) / 1e6:,.0f}", f"{timing.step:.3f}", f"{timing.exchange / timing.step:.0%}",
            f"{timing.scans_per_second:,.0f}", f"{timing.shard_bytes_per_second / 1e6:,.0f}", f"{steps:,}",
            f"{timing.step * steps / 3600:.2f}",
        ))  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]
