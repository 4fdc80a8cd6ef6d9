"""The CPU side of the comparisons with a GPU."""

from __future__ import annotations

import os
import re


def without_gpu() -> list[str]:
    """Return the start of a command line for a program that sees no GPU and computes on one core.

    A training process takes as many threads as it has cores. Where several tests run at once, that is many times too many:
    on 16 cores 14 of them came to nothing within 300 s.
    """
    cores = sorted(os.sched_getaffinity(0))
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    core = cores[worker % len(cores)]
    return ["taskset", "--cpu-list", str(core), "env", "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu"]
