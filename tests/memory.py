"""The peak memory of a process, from /proc.

``ru_maxrss`` of getrusage does not serve: a process inherits it from the one that started it.
"""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> None:
    """Let the peak memory of this process start anew at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(pid: int | str = "self") -> int:
    """Return the largest resident memory that a process has held since it started, or since ``reset_peak``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
