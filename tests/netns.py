"""Simulate two hosts on one machine: two network namespaces with own host names, joined by a veth pair."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))


def ip(arguments: str) -> None:
    """Run ``ip`` with space-separated arguments."""
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Return why this machine cannot create network namespaces, or None if it can."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian: iproute2, util-linux)"
    name = f"yw{os.getpid()}t"
    try:
        ip(f"netns add {name}")
        try:
            ip(f"-n {name} link add va type veth peer name vb")
        finally:
            ip(f"netns del {name}")
    except subprocess.CalledProcessError as error:
        return f"no permission to create network namespaces: {error.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace; programs in it see ``name`` as their host name."""

    namespace: str
    name: str
    address: str
    core: int

    def command(self, command: list[str]) -> list[str]:
        """Return ``command`` wrapped to run on this host, on the host's own core."""
        script = 'hostname "$0" && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, self.name]
        return [*enter, "taskset", "-c", str(self.core), *command]


class Pair:
    """Hosts ``a`` (10.77.0.1) and ``b`` (10.77.0.2), connected by a virtual cable."""

    interface = "cable"

    def __init__(self) -> None:
        prefix = f"yw{os.getpid()}"
        self.a = Host(f"{prefix}a", "host-a", "10.77.0.1", CORES[0])
        self.b = Host(f"{prefix}b", "host-b", "10.77.0.2", CORES[-1])

    def create(self) -> None:
        """Create both hosts and connect them."""
        for host in (self.a, self.b):
            ip(f"netns add {host.namespace}")
        cable = self.interface
        ip(f"-n {self.a.namespace} link add {cable} type veth peer name {cable} netns {self.b.namespace}")
        for host in (self.a, self.b):
            ip(f"-n {host.namespace} address add {host.address}/24 dev {cable}")
            ip(f"-n {host.namespace} link set lo up")
        self.connect()

    def connect(self) -> None:
        """Plug the cable in."""
        for host in (self.a, self.b):
            ip(f"-n {host.namespace} link set {self.interface} up")

    def cut(self) -> None:
        """Unplug the cable at host b: packets are lost, and open connections get no error."""
        ip(f"-n {self.b.namespace} link set {self.interface} down")

    def remove(self) -> None:
        """Remove both hosts; the cable goes with them."""
        for host in (self.a, self.b):
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


@contextmanager
def two_hosts() -> Iterator[Pair]:
    """Yield a pair of hosts that exists inside the block."""
    pair = Pair()
    try:
        pair.create()
        yield pair
    finally:
        pair.remove()


def write_hostfile(path: Path, pair: Pair) -> Path:
    """Write a DeepSpeed hostfile with one rank on each host, and return its path."""
    path.write_text("".join(f"{host.address} slots=1\n" for host in (pair.a, pair.b)))
    return path
