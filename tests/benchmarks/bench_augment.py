"""Cost of augmentation: `python -m tests.benchmarks.bench_augment [--device cpu|cuda] [--quick]`.

Measures CPU seconds per view (wall-clock seconds with --device cuda) for two views of the preset `default` at 121x145x121 in
one thread. The DALI graph, including the sampling of parameters and noise, is compared with MONAI's transforms, and with
TorchIO's if it is installed, for the same operators with the same probabilities. All include the z-score; none includes
reading. A second table gives each operator alone, applied to every view, and its cost at the preset's probability.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from data_pipeline.loading.augment import PRESETS, Augmentation
from data_pipeline.loading.augmentations.noise import noise_bank
from data_pipeline.loading.dali_graph import AugmentPipeline
from data_pipeline.loading.source import ViewSampler
from tests.benchmarks.peers.transforms import (
    OPERATORS,
    SHAPE,
    by_transforms,
    clock,
    monai_transform,
    torchio_transform,
    volume,
)

PRESET = PRESETS["default"]
BATCH = 2  # scans


def single(settings: Augmentation, operator: str, p: float) -> Augmentation:
    """Return ``settings`` with one operator only, with probability ``p``."""
    return Augmentation(**{operator: replace(settings[operator], p=p)})


@contextmanager
def graph(
    settings: Augmentation, device: str, shape: tuple[int, ...] = SHAPE, batch: int = BATCH, seed: int = 0
) -> Iterator[Callable[[], Any]]:
    """Give a function that augments the two views of a batch of scans in the DALI graph, after its first calls."""
    voxels, sampler = volume(shape), ViewSampler(settings, shape, seed)
    noise_bank(shape, 0)  # built once per run, so it is not measured

    def source(step: int) -> list[list[Any]]:
        return [sampler.arrays(voxels, batch * step + index, 0) for index in range(batch)]

    kind = "gpu" if device == "cuda" else "cpu"
    pipeline = AugmentPipeline(source, settings, shape=shape, batch=batch, device=kind, threads=1, prefetch=1)
    try:
        for _ in range(3):  # not measured: loads libraries and allocates buffers
            pipeline.run()
        yield pipeline.run
    finally:
        pipeline.close()


def ours(settings: Augmentation, scans: int, device: str) -> float:
    """Return the seconds per view of the DALI graph."""
    with graph(settings, device) as run:
        started = clock(device)
        for _ in range(scans // BATCH):
            run()
        return (clock(device) - started) / (2 * scans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few scans, to check that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    scans, scans_per_operator, device = (4, 2, chosen.device) if chosen.quick else (30, 8, chosen.device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    kinds: dict[str, Callable[[Augmentation, int], float]] = {
        "DALI graph": lambda settings, n: ours(settings, n, device),
        "MONAI": lambda settings, n: by_transforms(monai_transform, settings, n, device),
    }
    if find_spec("torchio") and device == "cpu":
        kinds["TorchIO"] = lambda settings, n: by_transforms(torchio_transform, settings, n, device)
    unit = "ms" if device == "cuda" else "CPU ms"
    print(f"{name}, torch {torch.__version__}, one thread; {SHAPE[0]}x{SHAPE[1]}x{SHAPE[2]}, {unit} per view")
    print(f"\nPreset default, {scans} scans, two views each")
    whole = {kind: 1e3 * cost(PRESET, scans) for kind, cost in kinds.items()}
    for kind, value in whole.items():
        print(f"{kind:<12}{value:>9.1f}   {value / whole['MONAI']:.2f} of MONAI's")
    if "TorchIO" not in kinds:
        print(
            "TorchIO      not measured: " + ("not installed (pip install torchio)" if device == "cpu" else "CPU only")
        )
    else:
        print("             TorchIO has no cutout: without it")

    def best(cost: Callable[[Augmentation, int], float], settings: Augmentation) -> float:
        return 1e3 * min(cost(settings, scans_per_operator) for _ in range(2))  # other load can only add time

    nothing = {kind: best(cost, Augmentation()) for kind, cost in kinds.items()}
    header = "".join(f"{kind:>12}{'x p':>8}" for kind in kinds)
    print("\nEach operator alone on every view, above z-score and copies; x p: times its probability")
    print(f"{'operator':<12}{'p':>6}{header}")
    print(f"{'z-score':<12}{'':>6}" + "".join(f"{nothing[kind]:>12.1f}{nothing[kind]:>8.1f}" for kind in kinds))
    for operator in OPERATORS:
        p = PRESET[operator].p
        values = {kind: best(cost, single(PRESET, operator, 1.0)) - nothing[kind] for kind, cost in kinds.items()}
        print(f"{operator:<12}{p:>6.2f}" + "".join(f"{v:>12.1f}{p * v:>8.1f}" for v in values.values()))


if __name__ == "__main__":
    main()
