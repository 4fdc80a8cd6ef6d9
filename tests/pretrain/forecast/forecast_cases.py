"""Whole training steps on real ranks whose memory and traffic are read from the kernel's counters.

Neither is counted as the forecast counts: memory is the growth of the process's resident memory (VmHWM of /proc), with every
tensor in pages of its own that go back to the kernel when it is freed; traffic is what the process has written to its sockets
(wchar of /proc/self/io), TCP being gloo's only way between these ranks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.config import Recipe, load_recipe
from pretrain.engine import engine
from pretrain.kernels import KERNELS
from pretrain.model import build_model
from pretrain.run.objective import Objective
from pretrain.run.step import train_step
from tests import memory

# Options of glibc's mallopt, from malloc.h: tensors of 64 KiB and more get pages of their own, which are unmapped when the
# tensor is freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
OWN_PAGES = {M_TRIM_THRESHOLD: 65536, M_MMAP_THRESHOLD: 65536, M_ARENA_MAX: 1}
QUIET_SECONDS = 0.1
_warm: set[tuple[str, ...]] = set()  # the options whose first step this process has made


def written_bytes() -> int:
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured_step(group: Any, rank: int, options: Sequence[str], grid: Sequence[int], scans: int) -> list[int]:
    """Return the peak bytes of this rank above those of an idle one, and the bytes that it sends in a step."""
    if not _warm:
        for option, value in OWN_PAGES.items():
            assert ctypes.CDLL(None).mallopt(option, value)
    if tuple(options) not in _warm:
        # The first step with some options loads code and libraries, starts threads and connects the ranks. None of it is the
        # network's memory, and the resident memory counts it: 2 to 5 MiB, depending on what the process has run before.
        _measure(group, rank, load_recipe("demo-cpu", list(options)), (32, 32, 32), scans)
        _warm.add(tuple(options))
    return _measure(group, rank, load_recipe("demo-cpu", list(options)), grid, scans)


def _measure(group: Any, rank: int, recipe: Recipe, grid: Sequence[int], scans: int) -> list[int]:
    world = torch.distributed.get_world_size(group)
    recipe.batch.global_ = scans * world
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or small tensors would take pages that earlier ones have left
    empty = resident_bytes()
    trained = engine.build_engine(recipe, build_model(recipe), lambda step: 1.0)
    objective = Objective(recipe.loss.name, KERNELS["gaussian"](bandwidth=5.0), {"temperature": 0.1}, None, False)
    source = torch.Generator().manual_seed(rank)
    batch = {
        "views": torch.randn(2, scans, 1, *grid, generator=source),
        "proxies": torch.rand(scans, 1, generator=source),
    }
    sent = []
    for step in range(2):  # the first one makes the optimiser's state
        torch.distributed.barrier(group)
        time.sleep(QUIET_SECONDS)
        before = written_bytes()
        memory.reset_peak()
        train_step(trained, objective.loss, batch, step, torch.float32, recipe.batch.micro)
        time.sleep(QUIET_SECONDS)
        sent.append(written_bytes() - before)
    used = memory.peak_bytes() - empty
    engine.close_engine(trained)
    return [used, sent[-1]]
