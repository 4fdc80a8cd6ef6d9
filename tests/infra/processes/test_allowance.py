"""Cores and memory within the limits of control groups of both versions, as files of /proc and /sys would be."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from infra.processes.allowance import free_memory, total_memory, usable_cores

GIB = 2**30


def machine(root: Path, groups: str, **files: str) -> Path:
    """Write the lines of /proc/self/cgroup and files below /sys/fs/cgroup ("/" is "__" in their names, "." is "_dot_")."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def no_limits() -> tuple[int, int]:
    return len(os.sched_getaffinity(0)), int(psutil.virtual_memory().total)


def test_version_2_takes_the_least_limit_from_the_group_to_the_root(tmp_path):
    root = machine(
        tmp_path, "0::/system.slice/job_7/step\n",
        system_dot_slice__job_7__memory_dot_max=f"{2 * GIB}\n",
        system_dot_slice__job_7__memory_dot_current=f"{GIB}\n",
        system_dot_slice__job_7__memory_dot_stat=f"anon 7\ninactive_file {GIB // 4}\nactive_file {GIB // 8}\nfile 9\n",
        system_dot_slice__job_7__step__memory_dot_max="max\n",
        system_dot_slice__job_7__step__memory_dot_current=f"{GIB}\n",
        system_dot_slice__job_7__step__cpu_dot_max="50000 100000\n",
        system_dot_slice__cpu_dot_max="max 100000\n",
    )  # fmt: skip
    assert total_memory(root) == min(2 * GIB, no_limits()[1])
    assert free_memory(root) == min(GIB + GIB // 4 + GIB // 8, psutil.virtual_memory().available)
    assert usable_cores(root) == 1


def test_version_1_and_the_root_of_a_container_are_read(tmp_path):
    """The paths are the host's; only the container's own groups are mounted."""
    root = machine(
        tmp_path, "5:memory:/docker/0f3a\n4:cpu,cpuacct:/docker/0f3a\n0::/\n",
        memory__memory_dot_limit_in_bytes=f"{GIB}\n", memory__memory_dot_usage_in_bytes=f"{3 * GIB}\n",
        memory__memory_dot_stat=f"active_file {GIB}\ntotal_inactive_file 0\ntotal_active_file 0\n",
        **{"cpu,cpuacct__cpu_dot_cfs_quota_us": "10000\n", "cpu,cpuacct__cpu_dot_cfs_period_us": "100000\n"},
    )  # fmt: skip
    assert (total_memory(root), free_memory(root), usable_cores(root)) == (GIB, 0, 1)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu__cpu_dot_cfs_quota_us": "-1\n", "cpu__cpu_dot_cfs_period_us": "100000\n",
         "memory__memory_dot_limit_in_bytes": "9223372036854771712\n", "memory__memory_dot_usage_in_bytes": "1\n",
         "memory__memory_dot_stat": ""},
        {"cpu__cpu_dot_cfs_quota_us": "6400000\n", "cpu__cpu_dot_cfs_period_us": "100\n"},
    ],
    ids=["no files", "no limits", "more than the machine has"],
)  # fmt: skip
def test_without_a_limit_the_machine_decides(tmp_path, files):
    root = machine(tmp_path, "4:memory:/\n1:cpu:/\n0::/\n", **files)
    assert (usable_cores(root), total_memory(root)) == no_limits()
    assert abs(free_memory(root) - psutil.virtual_memory().available) < GIB


def test_without_control_groups_the_machine_decides(tmp_path):
    assert (usable_cores(tmp_path), total_memory(tmp_path)) == no_limits()


def test_this_machine_can_be_asked():
    assert 1 <= usable_cores() <= no_limits()[0]
    assert 0 <= free_memory() <= total_memory() <= no_limits()[1]
