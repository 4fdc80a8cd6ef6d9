"""The cores and the memory that this process may use: those of the machine, within the limits of its control groups.

A container, a SLURM job or a Kubernetes pod may use less than the machine has. Linux keeps these limits in control groups
(cgroups, https://docs.kernel.org/admin-guide/cgroup-v2.html), of version 1 or 2; neither ``os.cpu_count`` nor the free memory
of the machine tells them. Every group on the way to the root limits those below it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from infra.errors import UserError
from infra.files import read_text

ROOT = Path("/")
MOUNT = Path("sys/fs/cgroup")
# Version -> files of a group's memory: the limit, what is used, and the beginning of the lines of memory.stat with what can be
# reclaimed: files that were read, which the kernel drops when memory is needed.
MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}  # fmt: skip


def usable_cores(root: Path = ROOT) -> int:
    """Return how many cores this process may keep busy: those it may run on, at most its CPU quota rounded up; 1 or more."""
    allowed = float(len(os.sched_getaffinity(0)))
    for version, group in _groups("cpu", root):
        with suppress(OSError, ValueError, UserError):
            if version == 2:
                quota, period = read_text(group / "cpu.max").split()
            else:
                quota, period = (read_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if float(quota) > 0:  # version 1 says -1 for no limit, version 2 "max", which is no number
                allowed = min(allowed, float(quota) / float(period))
    return max(1, math.ceil(allowed))


def free_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that new processes here could use."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in _memory_limits(root):
        free = min(free, max(0, limit - used))
    return free


def total_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process and those beside it in its groups may use in all."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits(root))])


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and used bytes of each group with a limit; files that the kernel can drop are not counted as used."""
    for version, group in _groups("memory", root):
        limit_file, used_file, prefix = MEMORY_FILES[version]
        with suppress(OSError, ValueError, UserError):
            limit, used = (int(read_text(group / name)) for name in (limit_file, used_file))
            lines = (line.split() for line in read_text(group / "memory.stat").splitlines())
            dropped = (f"{prefix}inactive_file", f"{prefix}active_file")
            yield limit, max(0, used - sum(int(line[1]) for line in lines if line[0] in dropped))


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of this process's groups that the controller may limit, from its own to the root."""
    try:
        lines = read_text(root / "proc/self/cgroup").splitlines()
    except (OSError, UserError):  # not Linux, or no /proc
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            version, mount = 1, root / MOUNT / controllers
            mount = mount if mount.is_dir() else root / MOUNT / controller
        elif not controllers:
            version, mount = 2, root / MOUNT
        else:
            continue
        # In a container the path may be the host's, of which only the container's own group is mounted, as the root.
        own = mount / path.lstrip("/")
        for group in (own, *own.parents):
            if group == mount or mount in group.parents:
                yield version, group
