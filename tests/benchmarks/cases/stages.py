"""The stages of a step of the main recipe, one at a time, and what this machine can do at best; seconds of a scan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import load_recipe
from tests.benchmarks.bench_encoders import measure, timed
from tests.benchmarks.cases import network
from tests.benchmarks.harness.group import on_ranks, together

RECIPE = "paper-bhb10k"


def augmentation(scans: int) -> dict[str, float]:
    """Augment with the recipe's preset; seconds of a scan (two views)."""
    found = network.augmentation(load_recipe(RECIPE, []).augmentation["preset"], scans)
    return {name: 2 * value for name, value in found.items()}


def transfer(sides: list[int], scans: int) -> dict[str, float]:
    """Copy a batch of two views, as its copy to a device would be made."""
    views, target = torch.ones(2, scans, 1, *sides), torch.empty(2, scans, 1, *sides)
    target.copy_(views)
    return best(lambda: target.copy_(views), scans)


def network_passes(sides: list[int], repeats: int) -> dict[str, float]:
    """Run the network forward and backward over two views of a scan."""
    found = measure(load_recipe(RECIPE, []).encoder.name, tuple(sides), "cpu", repeats)
    if "over" in found:
        raise MemoryError(f"more than the {found['over'] / 2**20:,.0f} MiB that are free")
    return {"cpu": found["cpu"], "wall": found["seconds"], "peak": found["bytes"]}


def loss(repeats: int) -> dict[str, Any]:
    """Compute the loss of the recipe's batch, forward and backward."""
    scans = load_recipe(RECIPE, []).batch.global_
    found = network.loss(scans, repeats, "plain")
    return {name: found[name] / scans for name in ("cpu", "wall")}


def _exchange(rank: int, numbers: int, scans: int, times: int) -> list[tuple[float, float]]:
    gradient, found = torch.ones(numbers), []
    for _ in range(1 + times):
        dist.barrier()
        wall, cpu = timed(lambda: dist.all_reduce(gradient), "cpu")
        found.append((cpu / scans, wall / scans))
    return found[1:]


def exchange(numbers: int, ranks: int) -> dict[str, float]:
    """Sum a gradient of ``numbers`` float32 over ranks of this machine; seconds a scan of the recipe's batch."""
    scans = load_recipe(RECIPE, []).batch.global_
    return together(on_ranks(_exchange, ranks, numbers=numbers, scans=scans, times=20))


def products(side: int) -> dict[str, float]:
    """Multiply two float32 matrices on all threads; ``rate`` is operations per second."""
    left, right = torch.ones(side, side), torch.ones(side, side)
    left @ right
    found = best(lambda: left @ right, 1)
    return {**found, "rate": 2 * side**3 / found["wall"]}


def copies(megabytes: int) -> dict[str, float]:
    """Copy memory on all threads; ``rate`` is bytes read and written per second."""
    source = torch.ones(megabytes * 250_000)
    target = torch.empty_like(source)
    target.copy_(source)
    found = best(lambda: target.copy_(source), 1)
    return {**found, "rate": 2e6 * megabytes / found["wall"]}


def best(work: Callable[[], Any], units: int, seconds: float = 1.0) -> dict[str, float]:
    """Repeat ``work`` for a second; return the smallest wall-clock seconds and the CPU seconds of that time, per unit."""
    found, started = [], time.perf_counter()
    while not found or time.perf_counter() - started < seconds:
        found.append(timed(work, "cpu"))
    wall, cpu = min(found)
    return {"cpu": cpu / units, "wall": wall / units}
