"""System metrics of this machine and the version of the code, for the tracking store."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from infra.files import read_bytes

MEGABYTE = 1e6


def memory_gb() -> float:
    """Return the peak GPU memory of this process if it uses a GPU, else its resident memory, in 10^9 bytes."""
    cuda = _cuda()
    return float(cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss) / 1e9


def system_metrics(folder: Path) -> dict[str, float]:
    """Return the use of CPU, memory, network, GPU and the disk of ``folder``, under MLflow's names (``system/...``).

    CPU use is the mean since the last call.
    """
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    metrics = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    if network is not None:
        metrics["network_receive_megabytes"] = network.bytes_recv / MEGABYTE
        metrics["network_transmit_megabytes"] = network.bytes_sent / MEGABYTE
    with suppress(OSError):
        disk = shutil.disk_usage(folder)
        metrics["disk_usage_percentage"] = 100.0 * disk.used / disk.total
        metrics["disk_available_megabytes"] = disk.free / MEGABYTE
    if cuda := _cuda():
        free, total = cuda.mem_get_info()
        metrics["gpu_0_memory_usage_megabytes"] = (total - free) / MEGABYTE
        metrics["gpu_0_memory_usage_percentage"] = 100.0 * (total - free) / total
        with suppress(ModuleNotFoundError, RuntimeError):  # needs pynvml, which may be missing
            metrics["gpu_0_utilization_percentage"] = float(cuda.utilization())
    return {f"system/{name}": float(value) for name, value in metrics.items()}


def git_tags(folder: Path) -> dict[str, str]:
    """Return tags with the git commit of the checkout that contains ``folder`` and whether files differ from it.

    Empty for an installed package.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())) is None:
        return {}  # no checkout, or the checkout of a project that has this package in its virtual environment
    changed = _git(folder, "status", "--porcelain")
    return {
        "mlflow.source.git.commit": commit,
        "yaware.git_dirty": "unknown" if changed is None else str(bool(changed)).lower(),
    }


def code_version() -> str:
    """Return yaware's version with a digest of the source files that a training runs, for example ``0.1.0, code 3f2a9c01``."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for package in ("infra", "data_pipeline", "pretrain"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + read_bytes(path) + b"\0")
    return f"{package_version('yaware')}, code {digest.hexdigest()[:8]}"


def package_version(name: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cuda() -> Any:
    """Return torch.cuda if this process uses a GPU, else None; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
