"""What this process's machine is doing, and which code it runs: figures and tags for the tracking store."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1e6


def memory_gb() -> float:
    """The most GPU memory that this process held so far where it has a GPU, else its resident memory; 10^9 bytes."""
    cuda = _cuda()
    return float(cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss) / 1e9


def system_figures(folder: Path) -> dict[str, float]:
    """Use of CPU, memory, network, GPU and the disk of ``folder``, under the names by which MLflow shows them.

    CPU use is the mean since the last call.
    """
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    if network is not None:
        figures["network_receive_megabytes"] = network.bytes_recv / MEGABYTE
        figures["network_transmit_megabytes"] = network.bytes_sent / MEGABYTE
    with suppress(OSError):
        disk = shutil.disk_usage(folder)
        figures["disk_usage_percentage"] = 100.0 * disk.used / disk.total
        figures["disk_available_megabytes"] = disk.free / MEGABYTE
    if cuda := _cuda():
        free, total = cuda.mem_get_info()
        figures["gpu_0_memory_usage_megabytes"] = (total - free) / MEGABYTE
        figures["gpu_0_memory_usage_percentage"] = 100.0 * (total - free) / total
        with suppress(ModuleNotFoundError, RuntimeError):  # asks pynvml, which a machine may lack
            figures["gpu_0_utilization_percentage"] = float(cuda.utilization())
    return {f"system/{name}": float(value) for name, value in figures.items()}


def git_tags(folder: Path) -> dict[str, str]:
    """Commit of the checkout that ``folder`` lies in, and whether files differ from it; empty for an installed package."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())) is None:
        return {}  # no checkout, or another project's that has this package in its virtual environment
    changed = _git(folder, "status", "--porcelain")
    return {
        "mlflow.source.git.commit": commit,
        "yaware.git_dirty": "unknown" if changed is None else str(bool(changed)).lower(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda() -> Any:
    """torch.cuda where this process uses a GPU, without importing torch for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
