"""A rank's memory on the CPU: what is freed stays for the next step, and nothing outlives the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from infra.distributed import free_port

TWICE = """
import resource
import torch
from pretrain.engine import engine
if {keep}:
    engine._keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(first, second)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is set")
def test_a_second_step_finds_the_memory_of_the_first():
    said = subprocess.run([sys.executable, "-c", TWICE.format(keep=True)], capture_output=True, text=True, check=True)
    first, second = map(int, said.stdout.split())
    assert second < first / 8, said.stdout  # one part in sixteen may not fit where it was


STARTED = """
from pretrain.engine import engine
engine.start_ranks()
print(engine.distributed.world_size())
engine.stop_ranks()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_a_rank_leaves_nothing_in_shared_memory():
    """DeepSpeed would leave 69 MB a rank, from every run, until the machine is started anew."""
    port = str(free_port())
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **given, "MASTER_PORT": port}
    said = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split()[-1] == "1"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
