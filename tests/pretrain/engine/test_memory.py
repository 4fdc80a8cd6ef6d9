"""Memory of a rank on the CPU: freed memory is kept for the next step, and no shared memory is left behind."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from infra.distributed import free_port

ALLOCATE_REPEATEDLY = """
import resource
import torch
from infra.processes.kept_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(12)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the options of glibc's malloc are set")
def test_later_steps_reuse_the_memory_of_the_first():
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE_REPEATEDLY.format(keep=True)], capture_output=True, text=True, check=True
    )
    first, *later = map(int, done.stdout.split())
    # Blocks are aligned, so one of the later steps may need a block or two more, when a small object has come to lie
    # between them. Returned memory would cost every later step as much as the first.
    assert sum(later) < first / 2, done.stdout


START_AND_STOP = """
from pretrain.engine import engine
engine.start_ranks()
print(engine.distributed.world_size())
engine.stop_ranks()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_a_rank_leaves_no_file_in_shared_memory():
    """By default DeepSpeed leaves 69 MB per rank in /dev/shm after every run, until the next reboot."""
    port = str(free_port())
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **variables, "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", START_AND_STOP], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split()[-1] == "1"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
