"""MONAI's and TorchIO's transforms for this project's operators, with the same probabilities; for the peers' environment.

``settings`` maps an operator's name to its settings (``p``, ``sigma``, ``side``, ...), as `data_pipeline` has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from tests.benchmarks.harness.measure import measured

SHAPE = (121, 145, 121)
OPERATORS = ("flip", "affine", "crop", "blur", "noise", "cutout")
Transform = Callable[[torch.Tensor], torch.Tensor]


def volume(shape: tuple[int, ...] = SHAPE) -> Any:
    """Return a smooth random volume (D, H, W), float16."""
    source = np.random.default_rng(0).random(shape, dtype=np.float32)
    return ndimage.gaussian_filter(source, 3).astype(np.float16)


def clock(device: str) -> float:
    """Return CPU seconds of this process, or wall-clock seconds on a GPU after all its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def two_views(build: Callable[[Any], Transform], settings: Any, device: str) -> Callable[[], None]:
    """Return a function that z-scores a scan and transforms it twice, after its first call."""
    voxels, transform = torch.from_numpy(volume().astype(np.float32))[None], build(settings)

    def run() -> None:
        scan = voxels.to(device)
        scored = (scan - scan.mean()) / scan.std()
        for _ in range(2):
            transform(scored.clone())

    run()
    return run


def by_transforms(build: Callable[[Any], Transform], settings: Any, scans: int, device: str) -> float:
    """Return the seconds per view of transforms of one (1, D, H, W) float32 volume."""
    run = two_views(build, settings, device)
    started = clock(device)
    for _ in range(scans):
        run()
    return (clock(device) - started) / (2 * scans)


def monai_transform(settings: Any, seed: int = 0) -> Transform:
    """Return MONAI's transforms for the operators in ``settings``."""
    from monai import transforms as m
    from monai.utils import set_determinism

    set_determinism(seed)
    flip, affine, crop, blur, noise, cutout = (settings[name] for name in OPERATORS)
    draw, steps = np.random.default_rng(seed), []
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


def torchio_transform(settings: Any, seed: int = 0) -> Transform:
    """Return TorchIO's transforms for the operators in ``settings``; TorchIO has no cutout."""
    import torchio as t

    torch.manual_seed(seed)
    flip, affine, crop, blur, noise, _ = (settings[name] for name in OPERATORS)
    draw, steps = np.random.default_rng(seed), []

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


def cost(kind: str, settings: dict[str, dict[str, Any]], scans: int, seed: int = 0) -> dict[str, float]:
    """Measure two views of ``scans`` scans with the transforms of ``kind``, "monai" or "torchio"; seconds of a view."""
    torch.set_num_threads(1)
    build = {"monai": monai_transform, "torchio": torchio_transform}[kind]
    build = partial(build, seed=seed)
    run = two_views(build, {name: SimpleNamespace(**values) for name, values in settings.items()}, "cpu")
    return measured(lambda: [run() for _ in range(scans)], 2 * scans)
