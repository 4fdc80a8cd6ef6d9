"""nidl's own training: `YAwareContrastiveLearning`, DenseNet121, `.npy` files, torch's DataLoader and nidl's transforms.

Runs in the peers' environment, or where nidl is installed. ``paper`` holds the operators of the preset ``paper-all`` by name.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from tests.benchmarks.harness.measure import run_measured, tree_cpu

WARM_UP = 5  # first steps of a run, not counted
# Our precision -> Lightning's.
PRECISIONS = {"fp32": "32-true", "autocast": "bf16-mixed"}


class Scans(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Two augmented views (1, D, H, W) of each .npy file, and the age (1,)."""

    def __init__(self, files: list[Path], ages: Any, transform: Any) -> None:
        self.files, self.ages, self.transform = files, ages, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        volume = np.load(self.files[index])[None]
        views = [torch.from_numpy(np.ascontiguousarray(self.transform(volume), dtype=np.float32)) for _ in range(2)]
        return views, torch.tensor([self.ages[index]], dtype=torch.float32)


class Noise(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Two random views of a made-up scan that were drawn before."""

    def __init__(self, sides: tuple[int, ...], batch: int, length: int) -> None:
        source = torch.Generator().manual_seed(0)
        self.views, self.length = torch.randn(2, batch, 1, *sides, generator=source), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        place = index % self.views.shape[1]
        return [self.views[0, place], self.views[1, place]], torch.tensor([20.0 + index % 60])


def nidl_transform(shape: tuple[int, ...], paper: Mapping[str, Any]) -> Any:
    """Return nidl's transforms for the preset ``paper-all``."""
    from nidl.volume.transforms import augmentation, preprocessing

    box = {name: (paper[name].side ** 3,) * 2 for name in ("crop", "cutout")}
    steps = [
        preprocessing.ZNormalization(),
        augmentation.RandomFlip(axes=0, p=paper["flip"].p),
        augmentation.RandomResizedCrop(shape, scale=box["crop"], ratio=(1.0, 1.0), p=paper["crop"].p),
        augmentation.RandomGaussianBlur(sigma=tuple(paper["blur"].sigma), p=paper["blur"].p),
        augmentation.RandomGaussianNoise(std=tuple(paper["noise"].sigma), p=paper["noise"].p),
        augmentation.RandomErasing(scale=box["cutout"], ratio=(1.0, 1.0), p=paper["cutout"].p),
    ]

    def apply(volume: Any) -> Any:
        for step in steps:
            volume = step(volume)
        return volume

    return apply


def scans_of(folder: str | Path, length: int, paper: Mapping[str, Any]) -> Scans:
    """Return ``length`` scans, the files of a folder repeated, with made-up ages."""
    operators = {name: SimpleNamespace(**op) if isinstance(op, dict) else op for name, op in paper.items()}
    files = sorted(Path(folder).glob("*.npy"))
    ages = np.random.default_rng(0).uniform(6, 88, len(files))
    return Scans(
        (files * -(-length // len(files)))[:length],
        np.resize(ages, length),
        nidl_transform(np.load(files[0]).shape, operators),
    )


def train(
    loader: Any, *, steps: int, folder: str, precision: str, seconds: float | None = None, channels_last: bool = False
) -> list[tuple[float, float]]:
    """Train with nidl; return wall-clock and CPU seconds at the end of each step.

    Args:
        loader: of two views and ages.
        steps: stop after this many.
        folder: where Lightning may write.
        precision: ours.
        seconds: stop at the first step that ends so long after the first one; None trains ``steps`` steps.
        channels_last: give the network that layout; its kernels have it, too.
    """
    import pytorch_lightning as pl
    from nidl.estimators.ssl import YAwareContrastiveLearning
    from nidl.volume.backbones.densenet3d import densenet121

    ends: list[tuple[float, float]] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), tree_cpu()))
            if seconds is not None and ends[-1][0] - ends[0][0] > seconds:
                trainer.should_stop = True

    method = YAwareContrastiveLearning(
        densenet121(n_embedding=1024), proj_input_dim=1024, bandwidth=25.0, max_steps=steps, precision=PRECISIONS[precision],
        callbacks=[Clock()], enable_checkpointing=False, enable_progress_bar=False, logger=False, num_sanity_val_steps=0,
        lr_scheduler="none", default_root_dir=folder,
    )  # fmt: skip
    if channels_last:
        method.to(memory_format=torch.channels_last_3d)
    method.fit(loader)
    return ends


def nidl_case(
    folder: str, batch: int, workers: int, steps: int, precision: str, tf32: bool, paper: Mapping[str, Any]
) -> dict[str, float]:  # fmt: skip
    """Train with nidl in this process; return scans per second and the peak of GPU memory in bytes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    cuda = torch.cuda.is_available()
    loader = torch.utils.data.DataLoader(
        scans_of(Path(folder, "npy"), batch * steps, paper), batch, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=cuda,
    )  # fmt: skip
    ends = [wall for wall, _ in train(loader, steps=steps, folder=folder, precision=precision)]
    seconds = statistics.median(np.diff(ends[WARM_UP:])) if steps > WARM_UP + 2 else ends[-1] - ends[-2]
    return {"rate": batch / float(seconds), "bytes": torch.cuda.max_memory_allocated() if cuda else 0}


def per_step(ends: list[tuple[float, float]], skip: int) -> dict[str, float]:
    """Return mean wall-clock and CPU seconds of the steps after the first ``skip``."""
    counted = ends[skip:]
    steps = len(counted) - 1
    return {"wall": (counted[-1][0] - counted[0][0]) / steps, "cpu": (counted[-1][1] - counted[0][1]) / steps}


def step(sides: list[int], batch: int, steps: int, channels_last: bool = False) -> dict[str, float]:
    """Measure a training step on views that lie in memory; CPU and wall-clock seconds of a step."""
    loader = torch.utils.data.DataLoader(Noise(tuple(sides), batch, batch * (steps + 2)), batch)
    return per_step(train(loader, steps=steps + 2, folder=".", precision="fp32", channels_last=channels_last), 1)


def loading(folder: str, batch: int, steps: int, paper: Mapping[str, Any]) -> dict[str, float]:
    """Measure DataLoader and transforms without training, in this process; seconds of a scan (two views)."""
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(scans_of(folder, batch * (steps + 1), paper), batch, shuffle=True)
    batches = iter(loader)
    next(batches)
    started, used = time.perf_counter(), time.process_time()
    count = sum(len(ages) for _, ages in batches)
    return {"cpu": (time.process_time() - used) / count, "wall": (time.perf_counter() - started) / count}


def end_to_end(
    folder: str, batch: int, workers: int, seconds: float, paper: Mapping[str, Any], steps: int = 100_000
) -> dict[str, float]:  # fmt: skip
    """Train for ``seconds`` after the first step, or ``steps`` steps; seconds of a scan, and those of the start."""
    born = time.perf_counter() - (time.time() - psutil.Process().create_time())
    loader = torch.utils.data.DataLoader(
        scans_of(folder, batch * steps, paper), batch, shuffle=True, num_workers=workers, drop_last=True
    )
    ends = train(loader, steps=steps, folder=folder, precision="fp32", seconds=seconds)
    found = per_step(ends, min(WARM_UP, len(ends) - 2))
    return {
        "wall": found["wall"] / batch, "cpu": found["cpu"] / batch, "start": ends[0][0] - born, "start_cpu": ends[0][1],
        "steps": len(ends),
    }  # fmt: skip


def no_steps(folder: str, batch: int, paper: Mapping[str, Any]) -> dict[str, float]:
    """Come as far as the first step: libraries, scans, network and trainer."""
    loader = torch.utils.data.DataLoader(scans_of(folder, batch, paper), batch)
    train(loader, steps=0, folder=folder, precision="fp32")
    return {"cpu": 0.0, "wall": 0.0}


def start(folder: str, batch: int, paper: Mapping[str, Any]) -> dict[str, float]:
    """Run `no_steps` in a new process; CPU and wall-clock seconds of the whole process."""
    return _process("no_steps", {"folder": folder, "batch": batch, "paper": paper})


def whole(folder: str, batch: int, workers: int, steps: int, paper: Mapping[str, Any]) -> dict[str, float]:
    """Train ``steps`` steps in a new process; CPU and wall-clock seconds of the whole process."""
    arguments = {"folder": folder, "batch": batch, "workers": workers, "steps": steps, "paper": paper, "seconds": 1e9}
    return _process("end_to_end", arguments)


def _process(function: str, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Run a function of this module in a new process; CPU and wall-clock seconds of the whole process."""
    case = f"peers.nidl_training:{function}"
    command = [sys.executable, "-m", "tests.benchmarks.harness.case", case, json.dumps(arguments)]
    try:
        return run_measured(command, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip().splitlines()[-1]) from None
