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
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from data_pipeline.loading.augment import PRESETS, Augmentation
from data_pipeline.loading.augmentations.noise import noise_bank
from data_pipeline.loading.dali_graph import AugmentPipeline
from data_pipeline.loading.source import ViewSampler

SHAPE = (121, 145, 121)
PRESET = PRESETS["default"]
Transform = Callable[[torch.Tensor], torch.Tensor]


def single(settings: Augmentation, operator: str, p: float) -> Augmentation:
    """Return ``settings`` with one operator only, with probability ``p``."""
    return Augmentation(**{operator: replace(settings[operator], p=p)})


OPERATORS = ("flip", "affine", "crop", "blur", "noise", "cutout")


def volume() -> Any:
    """Return a smooth random volume (D, H, W), float16."""
    source = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    return ndimage.gaussian_filter(source, 3).astype(np.float16)


def clock(device: str) -> float:
    """Return CPU seconds of this process, or wall-clock seconds on a GPU after all its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ours(settings: Augmentation, scans: int, device: str) -> float:
    """Return the seconds per view of the DALI graph."""
    voxels, sampler, batch = volume(), ViewSampler(settings, SHAPE, 0), 2
    noise_bank(SHAPE, 0)  # built once per run, so it is not measured

    def source(step: int) -> list[list[Any]]:
        return [sampler.arrays(voxels, batch * step + index, 0) for index in range(batch)]

    kind = "gpu" if device == "cuda" else "cpu"
    pipeline = AugmentPipeline(source, settings, shape=SHAPE, batch=batch, device=kind, threads=1, prefetch=1)
    for _ in range(3):  # not measured: loads libraries and allocates buffers
        pipeline.run()
    started = clock(device)
    for _ in range(scans // batch):
        pipeline.run()
    seconds = clock(device) - started
    pipeline.close()
    return seconds / (2 * scans)


def by_transforms(build: Callable[[Augmentation], Transform], settings: Augmentation, scans: int, device: str) -> float:
    """Return the seconds per view of transforms of one (1, D, H, W) float32 volume."""
    voxels, transform = torch.from_numpy(volume().astype(np.float32))[None], build(settings)

    def two_views() -> None:
        scan = voxels.to(device)
        scored = (scan - scan.mean()) / scan.std()
        for _ in range(2):
            transform(scored.clone())

    two_views()
    started = clock(device)
    for _ in range(scans):
        two_views()
    return (clock(device) - started) / (2 * scans)


def monai_transform(settings: Augmentation) -> Transform:
    """Return MONAI's transforms for the operators in ``settings``."""
    from monai import transforms as m
    from monai.utils import set_determinism

    set_determinism(0)
    flip, affine, crop, blur, noise, cutout = (settings[name] for name in OPERATORS)
    draw, steps = np.random.default_rng(0), []
    box = m.Compose([
        m.RandSpatialCrop([round(n * crop.side) for n in SHAPE], random_size=False), m.Resize(SHAPE, mode="trilinear"),
    ])  # fmt: skip
    if flip.p:
        steps.append(m.RandFlip(flip.p, spatial_axis=0))
    if affine.p:
        steps.append(m.RandAffine(
            affine.p, rotate_range=[np.deg2rad(affine.degrees)] * 3, scale_range=[affine.zoom] * 3,
            translate_range=[affine.shift * n for n in SHAPE], mode="bilinear", padding_mode="border",
            spatial_size=SHAPE, cache_grid=True,
        ))  # fmt: skip
    if crop.p:
        steps.append(lambda view: box(view) if draw.random() < crop.p else view)
    if blur.p:
        steps.append(m.RandGaussianSmooth(blur.sigma, blur.sigma, blur.sigma, prob=blur.p))
    if noise.p:
        steps.append(m.RandGaussianNoise(noise.p, std=noise.sigma[1]))
    if cutout.p:
        size = [round(n * cutout.side) for n in SHAPE]
        steps.append(m.RandCoarseDropout(1, size, fill_value=0.0, prob=cutout.p))
    return m.Compose(steps)  # type: ignore[no-any-return]


def torchio_transform(settings: Augmentation) -> Transform:
    """Return TorchIO's transforms for the operators in ``settings``; TorchIO has no cutout."""
    import torchio as t

    torch.manual_seed(0)
    flip, affine, crop, blur, noise, _ = (settings[name] for name in OPERATORS)
    draw, steps = np.random.default_rng(0), []

    def boxed(view: torch.Tensor) -> torch.Tensor:
        if draw.random() >= crop.p:
            return view
        size = [round(n * crop.side) for n in SHAPE]
        low = [int(draw.integers(n - s + 1)) for n, s in zip(SHAPE, size, strict=True)]
        bounds = [v for a, n, s in zip(low, SHAPE, size, strict=True) for v in (a, n - s - a)]
        return t.Resize(SHAPE)(t.Crop(tuple(bounds))(view))  # type: ignore[no-any-return]

    if flip.p:
        steps.append(t.RandomFlip(axes=(0,), flip_probability=1.0, p=flip.p))
    if affine.p:
        shift = tuple(affine.shift * n for n in SHAPE)
        steps.append(t.RandomAffine(
            scales=affine.zoom, degrees=affine.degrees, translation=shift, isotropic=True, p=affine.p,
        ))  # fmt: skip
    if crop.p:
        steps.append(boxed)
    if blur.p:
        steps.append(t.RandomBlur(std=blur.sigma, p=blur.p))
    if noise.p:
        steps.append(t.RandomNoise(std=noise.sigma, p=noise.p))

    def all_of(view: torch.Tensor) -> torch.Tensor:
        for step in steps:
            view = step(view)
        return view

    return all_of


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
