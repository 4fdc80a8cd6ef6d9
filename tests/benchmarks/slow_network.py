"""Hosts (network namespaces, as root) on a network of some bandwidth and delay: ``slow_hosts(3, mbit=1000, delay_ms=1)``.

Every host has a TUN device, and a process of its own passes packets on: after the time that the sender's card would need for
them, and after the delay. So no queueing discipline of the kernel is needed; netem, which does the same, is often not built in.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from infra.processes.with_parent import command_with_parent
from tests.netns import ip

INTERFACE, NETWORK, MTU = "cable", "10.78.0.", 60000
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
ROUNDS = 30  # of a byte, to measure a round trip
QUEUE_BYTES = 16 * 2**20  # a card that is so much behind drops packets; a sender's own queue holds as much


def address_of(host: int) -> str:
    """Return the address of a host by its number."""
    return f"{NETWORK}{host + 1}"


@contextmanager
def slow_hosts(count: int, *, mbit: float, delay_ms: float) -> Iterator[list[str]]:
    """Yield the namespaces of ``count`` hosts whose cards send ``mbit`` megabits per second, ``delay_ms`` apart."""
    names = [f"yws{os.getpid()}h{number}" for number in range(count)]
    relay = None
    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        command = [sys.executable, "-m", "tests.benchmarks.slow_network", str(mbit), str(delay_ms), *names]
        relay = subprocess.Popen(command_with_parent(command), stdout=subprocess.PIPE)
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"ready\n"
        yield names
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def reached(namespaces: list[str], *, mbit: float) -> dict[str, float]:
    """Return what the link of the first two hosts reaches: ``mbit`` of a long transfer, ``round_trip_ms`` of a byte."""
    size = int(min(100e6, max(1e6, mbit * 1e6 / 8)))  # a second's worth
    programs = (
        f"import socket; s = socket.create_server(('{address_of(0)}', 7777)); print('ready', flush=True)\n"
        f"c = s.accept()[0]\nfor _ in range({ROUNDS}): c.sendall(c.recv(1))\n"
        f"left = {size}\nwhile left: left -= len(c.recv(min(left, 1 << 20)))\nc.sendall(b'.')",
        "import json, socket, statistics, time\n"
        f"c = socket.create_connection(('{address_of(0)}', 7777)); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        f"times = []\nfor _ in range({ROUNDS}):\n    t = time.perf_counter(); c.sendall(b'.'); c.recv(1)\n"
        "    times.append(time.perf_counter() - t)\n"
        f"t = time.perf_counter(); c.sendall(bytes({size})); c.recv(1); t = time.perf_counter() - t\n"
        f"print(json.dumps({{'mbit': {size} * 8e-6 / t, 'round_trip_ms': 1e3 * statistics.median(times)}}))",
    )
    server, client = (
        ["ip", "netns", "exec", name, sys.executable, "-c", code]
        for name, code in zip(namespaces, programs, strict=False)
    )
    with subprocess.Popen(command_with_parent(server), stdout=subprocess.PIPE) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == b"ready\n"
        done = subprocess.run(client, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _device(namespace: str, host: int) -> int:
    """Create a host's device and return its file descriptor."""
    libc, home = ctypes.CDLL(None, use_errno=True), os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert libc.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI))
        assert libc.setns(home, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(there)
        os.close(home)
    ip(f"-n {namespace} address add {address_of(host)}/24 dev {INTERFACE}")
    ip(f"-n {namespace} link set {INTERFACE} mtu {MTU} txqueuelen 10000 up")
    return device


def relay(namespaces: list[str], bytes_per_second: float, delay: float) -> None:
    """Pass packets between the hosts until this process is ended."""
    devices = [_device(name, number) for number, name in enumerate(namespaces)]
    own = {bytes(map(int, address_of(number).split("."))): device for number, device in enumerate(devices)}
    free = dict.fromkeys(devices, 0.0)  # when a card has sent what it holds
    waiting: list[tuple[float, int, int, bytes]] = []
    print("ready", flush=True)
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(waiting)
            with suppress(OSError):
                os.write(target, packet)
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select(devices, [], [], pause)[0]:
            with suppress(BlockingIOError):
                packet = os.read(device, 65536)
                reached, now = own.get(packet[16:20]), time.monotonic()
                if reached is None or packet[0] >> 4 != 4 or free[device] > now + QUEUE_BYTES / bytes_per_second:
                    continue
                free[device] = max(now, free[device]) + len(packet) / bytes_per_second
                number += 1
                heapq.heappush(waiting, (free[device] + delay, number, reached, packet))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mbit", type=float)
    parser.add_argument("delay_ms", type=float)
    parser.add_argument("namespaces", nargs="+")
    given = parser.parse_args()
    relay(given.namespaces, given.mbit * 1e6 / 8, given.delay_ms / 1e3)
