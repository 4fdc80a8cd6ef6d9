"""The sockets on which processes listen, from /proc/net/tcp and tcp6."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from contextlib import suppress

import psutil


def addresses(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the addresses on which any of the processes listens."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def reachable(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the addresses on which other hosts reach one of the processes; some process must listen at all."""
    found = addresses(processes)
    assert found, "nothing listens"
    loopback = {text for text in found if (ipaddress.ip_address(text.removeprefix("::ffff:"))).is_loopback}
    return found - loopback
