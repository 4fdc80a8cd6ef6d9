"""What a measurement was made on and with: processor, memory, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from infra.machine import git_tags, package_version

OURS = (
    "torch",
    "numpy",
    "deepspeed",
    "nvidia-dali-cuda130",
    "monai",
    "nibabel",
    "zstandard",
    "scikit-learn",
    "pandas",
    "ray",
)
WRITTEN = (":!docs/performance.md", ":!docs/figures/performance_*.png", ":!docs/benchmarks/performance*.json")
ROOT = Path(__file__).resolve().parents[3]
# Float32 operations of a core and clock cycle: two fused multiply-adds on vectors of 8 or 16 numbers.
PER_CYCLE = {"avx512f": 64, "avx2": 32}


def hardware() -> dict[str, Any]:
    """Return the processor, its cores that this process may use, its clock and vector width, and the memory."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", text)
    clock = re.search(r"cpu MHz\s*:\s*([\d.]+)", text)
    flags = set((re.search(r"flags\s*:\s*(.*)", text) or [""])[0].split())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    vector = next((flag for flag in PER_CYCLE if flag in flags), "")
    return {
        "processor": name[1] if name else platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "mhz": float(clock[1]) if clock else 0.0, "vectors": vector, "flops_per_cycle": PER_CYCLE.get(vector, 8),
        "memory_bytes": 1024 * int(memory[1]) if memory else 0, "system": f"{platform.system()} {platform.release()}",
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries on our side."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in OURS}}


def commit() -> tuple[str, str]:
    """Return the commit of the checkout and whether files differ from it ("true", "false" or "unknown")."""
    found = git_tags(ROOT).get("mlflow.source.git.commit", "unknown")
    return found, "unknown" if found == "unknown" else str(bool(_git("status", "--porcelain"))).lower()


def difference() -> str:
    """Return the text of what differs from the commit, so that a continued run notices a change."""
    return _git("diff", "HEAD")


def _git(*command: str) -> str:
    """Return what git prints about all files but those that a benchmark itself writes into docs."""
    done = subprocess.run(["git", *command, "--", ".", *WRITTEN], cwd=ROOT, capture_output=True, text=True)
    return done.stdout
