"""nidl's y-Aware InfoNCE, alone and on every rank of a group."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests import memory
from tests.benchmarks.harness.group import on_ranks, together
from tests.benchmarks.harness.measure import limit_memory, measured

DEPTH, SIGMA, TAU = 128, 5.0, 0.1


def inputs(scans: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views (2, B, D) and ages (B, 1), the same as `tests.benchmarks.bench_loss.inputs`."""
    source = torch.Generator().manual_seed(scans)
    views = torch.randn(2, scans, DEPTH, generator=source).requires_grad_()
    return views, 6.0 + 82.0 * torch.rand(scans, 1, generator=source)


def nidl_loss() -> Any:
    """Return nidl's loss; its bandwidth is the square of ours."""
    from nidl.losses import YAwareInfoNCE

    return YAwareInfoNCE(kernel="gaussian", bandwidth=SIGMA**2, temperature=TAU)


def nidl(scans: int, repeats: int) -> dict[str, Any]:
    """Measure the forward and backward pass of nidl's loss; ``check`` is its value."""
    small, small_ages = inputs(16)
    nidl_loss()(*small, small_ages).backward()
    limit_memory()
    views, ages = inputs(scans)
    memory.reset_peak()
    before, values = memory.peak_bytes(), []

    def work() -> None:
        for _ in range(repeats):
            views.grad = None
            loss = nidl_loss()(views[0], views[1], ages)
            loss.backward()
            values.append(loss.item())

    return {**measured(work, repeats), "peak": memory.peak_bytes() - before, "check": values[-1]}


def _rank(rank: int, scans: int, steps: int) -> list[tuple[float, float]]:
    from torch.distributed.nn.functional import all_gather

    views, ages = inputs(scans)
    found = []
    for _ in range(1 + steps):
        torch.distributed.barrier()
        started, used = time.perf_counter(), time.process_time()
        z = [torch.cat(list(all_gather(view))) for view in views]
        labels = torch.cat(list(all_gather(ages)))
        nidl_loss()(*z, labels).backward()
        found.append((time.process_time() - used, time.perf_counter() - started))
    return found[1:]


def nidl_ranks(ranks: int, total: int, steps: int) -> dict[str, float]:
    """Let every rank gather all embeddings and compute nidl's whole loss, as nidl does; CPU seconds of all ranks a step."""
    return together(on_ranks(_rank, ranks, scans=total // ranks, steps=steps))
