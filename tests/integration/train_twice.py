"""Calls ``train`` five times in one process and prints as JSON what it left behind: python -m tests.integration.train_twice
SHARDS FOLDER."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from infra.extensions import extensions_folder
from pretrain.config import Recipe
from pretrain.run import loop
from pretrain.train import train

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENGINES = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "ContrastiveModel")


def state() -> dict[str, Any]:
    """What a call must leave as it found it."""
    return {
        "signals": [str(signal.getsignal(number)) for number in SIGNALS],
        "wakeup": _wakeup_fd(),
        "environ": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
        "excepthook": repr(sys.excepthook),
        "random": hash(random.getstate()),
        "warning filters": len(warnings.filters),
    }


def held() -> dict[str, int]:
    """What the process holds; the first call adds the imported libraries' own, so that only calls after it can be compared."""
    gc.collect()
    found = [kept for kept in gc.get_objects() if type(kept) is torch.Tensor or type(kept) is torch.nn.Parameter]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return {
        "engines": sum(type(kept).__name__ in ENGINES for kept in gc.get_objects()),
        "tensor bytes": sum(storages.values()),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "OS threads": len(list(Path("/proc/self/task").iterdir())),
    }


def _wakeup_fd() -> int:
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found)
    return found


def recipe_of(shards: str, folder: Path, name: str, stage: int) -> Recipe:
    return Recipe.load("demo-cpu").with_(
        data={"shards": shards, "workers": 0, "device": "cpu"}, run={"output": folder / name, "name": name},
        encoder={"options": {"width": 0.25, "norm": "group"}}, batch={"global": 8}, train={"steps": 3},
        deepspeed={"zero_optimization.stage": stage}, monitor={"every_epochs": 1, "split": "downstream", "max_scans": 20},
    )  # fmt: skip


def main(shards: str, folder: Path) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a handler of the user's own
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    os.environ.pop("DS_ACCELERATOR", None)
    before, after, holds = state(), {}, {}
    train(recipe_of(shards, folder, "first", 1))
    after["first"], holds["first"] = state(), held()
    train(recipe_of(shards, folder, "again", 1))
    holds["again"] = held()
    plain = loop.train_step

    def failing(*given: Any, **options: Any) -> Any:
        raise ValueError("in the middle of a run")

    loop.train_step = failing
    try:
        train(recipe_of(shards, folder, "failed", 0))
    except ValueError:
        after["failed"] = state()
    holds["failed"] = held()
    loop.train_step = plain
    problems: list[str] = []

    def in_a_thread() -> None:
        train(recipe_of(shards, folder, "second", 3))
        try:
            train(recipe_of(shards, folder, "second", 3).with_(optimizer={"lr": 0.5}))
        except UserError as error:
            problems.append(str(error))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    after["second, in a thread"], holds["stage 3"] = state(), held()
    print("RESULT", json.dumps({"before": before, "after": after, "held": holds, "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
