"""Where a training step of small scans goes: ``python -m tests.benchmarks.small_step [--recipe NAME] [--grid 30x36x30]``.

Each part of a step is timed alone in one thread, the best of several: two views of a batch by the DALI graph, the network
forward and backward, the loss with its gradient, and the optimiser. Beside the network stand its floating-point operations per
second, and those of a product of two matrices, for what a core can do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.dali_graph import AugmentPipeline
from data_pipeline.loading.source import ViewSampler
from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.kernels import gaussian
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.model import build_model

SIDE = 1024  # of the matrices


def best(work: Callable[[], Any], repeats: int) -> float:
    """Return the shortest time of a call in seconds, after one that is not measured."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def augmentation(recipe: Any, grid: tuple[int, ...], batch: int, repeats: int) -> float:
    """Return the seconds for two views of a batch."""
    settings = load_augmentation(to_dict(recipe)["augmentation"])
    voxels, sampler = np.random.default_rng(0).random(grid).astype(np.float16), ViewSampler(settings, grid, 0)

    def source(step: int) -> list[list[Any]]:
        return [sampler.arrays(voxels, batch * step + number, 0) for number in range(batch)]

    pipeline = AugmentPipeline(source, settings, shape=grid, batch=batch, device="cpu", threads=1, prefetch=1)
    try:
        return best(pipeline.run, repeats)
    finally:
        pipeline.close()


def parts(recipe: Any, grid: tuple[int, ...], repeats: int) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a step, and the network's floating-point operations, forward and backward."""
    batch, model = recipe.batch.global_, build_model(recipe).train()
    views, ages = torch.randn(2, batch, 1, *grid), torch.linspace(20, 80, batch)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-6)
    with FlopCounterMode(display=False) as counter:
        model(views)[0].sum().backward()
    operations = float(counter.get_total_flops())
    embedded = model(views)[0].detach().requires_grad_()
    seconds = {
        "augmentation": augmentation(recipe, grid, batch, repeats),
        "network, forward": best(lambda: model(views), repeats),
        "network, both": best(lambda: model(views)[0].sum().backward(), repeats),
        "loss": best(lambda: y_aware_infonce(embedded, ages, kernel=gaussian(5.0)).backward(), repeats),
        "optimiser": best(optimizer.step, repeats),
    }
    return seconds, operations


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="simulated-6mm")
    parser.add_argument("--grid", default="30x36x30")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, grid = load_recipe(options.recipe, []), tuple(map(int, options.grid.split("x")))
    seconds, operations = parts(recipe, grid, options.repeats)
    both, square = seconds.pop("network, both"), torch.randn(SIDE, SIDE)
    seconds["network, backward"] = both - seconds["network, forward"]
    whole = sum(seconds.values())
    print(f"{options.recipe}, {options.grid}, {recipe.batch.global_} scans, one thread, torch {torch.__version__}")
    for name, value in seconds.items():
        print(f"{name:<18}{1e3 * value:>8.1f} ms  {100 * value / whole:>4.0f} %")
    print(f"{'step':<18}{1e3 * whole:>8.1f} ms")
    product = 2 * SIDE**3 / best(lambda: square @ square, options.repeats)
    print(f"network: {operations / both / 1e9:.0f} GFLOP/s; a product of two matrices: {product / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
