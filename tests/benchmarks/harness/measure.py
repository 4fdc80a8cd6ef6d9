"""What a case measures of itself: CPU and wall-clock seconds, memory. It needs psutil, in every environment."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

FIELDS = ("user", "system", "children_user", "children_system")


def tree_cpu(root: psutil.Process | None = None) -> float:
    """Return the CPU seconds of a process, by default this one, of those below it, and of those that they waited for."""
    seconds, root = 0.0, root or psutil.Process()
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += sum(getattr(times, field) for field in FIELDS)
    return seconds


def children_cpu() -> float:
    """Return the CPU seconds of all processes that this one has started and waited for, and of those below them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_measured(command: Sequence[str], **options: Any) -> dict[str, float]:
    """Run a program; return the CPU and wall-clock seconds of its process and of those below it.

    ``options`` are those of `subprocess.run`. Raises subprocess.CalledProcessError if it fails.
    """
    return measured(lambda: subprocess.run(command, check=True, **options), cpu=children_cpu)


def until_first_line(command: list[str], beginning: str) -> tuple[float, float]:
    """Start a process and stop it at its first line; return its CPU seconds and its seconds until then."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline() if process.stdout else ""
        seconds, used = time.perf_counter() - started, psutil.Process(process.pid).cpu_times()
        process.terminate()
        if not line.startswith(beginning):
            raise RuntimeError(f"the first line of {command} is {line!r}")
    return used.user + used.system, seconds


def measured(work: Callable[[], Any], units: int = 1, cpu: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Run ``work``, which does ``units`` units; return CPU and wall-clock seconds of one of them."""
    started, used = time.perf_counter(), cpu()
    work()
    return {"cpu": (cpu() - used) / units, "wall": (time.perf_counter() - started) / units}


def back_memory(size: int) -> None:
    """Use ``size`` bytes in huge pages and free them, so that memory taken within the next two seconds costs what it should.

    The kernel of a virtual machine reports free huge pages to the host, which takes them back; the first process that uses
    such a page again waits for the host. Which process that is would be chance.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk. Needs no rights, and Linux."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that were not written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def fetched_bytes() -> int:
    """Return the bytes that this process has caused to be read from a disk, those of mapped files too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def free_bytes() -> int:
    """Return the available memory of the machine in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def limit_memory(share: float = 0.8) -> None:
    """Let allocations above a share of the free memory fail in this process, before the kernel ends some process."""
    limit = int(share * free_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
