"""Where a training step of small scans goes: ``python -m tests.benchmarks.small_step [--recipe NAME] [--grid 30x36x30]``.

Each part of a step is timed alone in one thread, the best of several: two views of a batch by the DALI graph, the network
forward and backward, the loss with its gradient, and the optimiser. Beside the network stand its floating-point operations per
second, and those of a product of two matrices, for what a core can do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.loading.augment import load_augmentation
from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.kernels import gaussian
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.model import build_model
from tests.benchmarks.bench_augment import graph
from tests.benchmarks.cases.stages import best, products

SIDE = 1024  # of the matrices


def parts(recipe: Any, grid: tuple[int, ...]) -> tuple[dict[str, float], float]:
    """Return the seconds of each part of a step, and the network's floating-point operations, forward and backward."""
    batch, model = recipe.batch.global_, build_model(recipe).train()
    views, ages = torch.randn(2, batch, 1, *grid), torch.linspace(20, 80, batch)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-6)
    with FlopCounterMode(display=False) as counter:
        model(views)[0].sum().backward()
    embedded = model(views)[0].detach().requires_grad_()
    optimizer.step()  # allocates its state
    work = {
        "network, forward": lambda: model(views),
        "network, both": lambda: model(views)[0].sum().backward(),
        "loss": lambda: y_aware_infonce(embedded, ages, kernel=gaussian(5.0)).backward(),
        "optimiser": optimizer.step,
    }
    with graph(load_augmentation(to_dict(recipe)["augmentation"]), "cpu", grid, batch) as augment:
        seconds = {"augmentation": best(augment, 1)["wall"]}
    return seconds | {name: best(one, 1)["wall"] for name, one in work.items()}, float(counter.get_total_flops())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="simulated-6mm")
    parser.add_argument("--grid", default="30x36x30")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, grid = load_recipe(options.recipe, []), tuple(map(int, options.grid.split("x")))
    seconds, operations = parts(recipe, grid)
    both = seconds.pop("network, both")
    seconds["network, backward"] = both - seconds["network, forward"]
    whole = sum(seconds.values())
    print(f"{options.recipe}, {options.grid}, {recipe.batch.global_} scans, one thread, torch {torch.__version__}")
    for name, value in seconds.items():
        print(f"{name:<18}{1e3 * value:>8.1f} ms  {100 * value / whole:>4.0f} %")
    print(f"{'step':<18}{1e3 * whole:>8.1f} ms")
    rates = operations / both / 1e9, products(SIDE)["rate"] / 1e9
    print("network: {:.0f} GFLOP/s; a product of two matrices: {:.0f} GFLOP/s".format(*rates))


if __name__ == "__main__":
    main()
