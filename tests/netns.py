"""Two hosts on one machine: network namespaces joined by a veth pair, each with a host name of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian: iproute2, util-linux)"
    name = f"yw{os.getpid()}t"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "va", "type", "veth", "peer", "name", "vb")
        finally:
            _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no right to make network namespaces: {error.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """A namespace: ``name`` is what programs in it see as the host's name."""

    namespace: str
    name: str
    address: str
    core: int

    def command(self, command: list[str]) -> list[str]:
        """``command`` as run on this host, on one core, as though each host had its own."""
        named = 'hostname "$0" && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, self.name]
        return [*enter, "taskset", "-c", str(self.core), *command]


class Pair:
    """Hosts ``a`` (10.77.0.1) and ``b`` (10.77.0.2) and the cable between them."""

    interface = "cable"

    def __init__(self) -> None:
        prefix = f"yw{os.getpid()}"
        self.a = Host(f"{prefix}a", "host-a", "10.77.0.1", CORES[0])
        self.b = Host(f"{prefix}b", "host-b", "10.77.0.2", CORES[-1])

    def make(self) -> None:
        """Make both hosts and plug the cable in."""
        for host in (self.a, self.b):
            _ip("netns", "add", host.namespace)
        _ip("-n", self.a.namespace, "link", "add", self.interface, "type", "veth",
            "peer", "name", self.interface, "netns", self.b.namespace)  # fmt: skip
        for host in (self.a, self.b):
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", self.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        self.join()

    def join(self) -> None:
        """Plug the cable in."""
        for host in (self.a, self.b):
            _ip("-n", host.namespace, "link", "set", self.interface, "up")

    def cut(self) -> None:
        """Pull the cable out of host b: nothing passes any more, and no connection is told."""
        _ip("-n", self.b.namespace, "link", "set", self.interface, "down")

    def remove(self) -> None:
        """Remove both hosts, and with them the cable."""
        for host in (self.a, self.b):
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


@contextmanager
def two_hosts() -> Iterator[Pair]:
    """A pair of hosts for as long as the block runs."""
    pair = Pair()
    try:
        pair.make()
        yield pair
    finally:
        pair.remove()


def write_hostfile(path: Path, pair: Pair) -> Path:
    """A DeepSpeed hostfile with one rank on each host."""
    path.write_text("".join(f"{host.address} slots=1\n" for host in (pair.a, pair.b)))
    return path
