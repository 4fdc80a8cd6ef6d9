"""The network between the nodes: ports in both directions, clocks, and the interfaces that gloo and NCCL would take.

Every node listens on the master's port and on one that the system chooses, as gloo, NCCL and the watchdog do, and connects to
both of every other node. The answer on the first port holds the node's time, and the number of its second port.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import psutil

from infra.distributed import address_towards, is_loopback
from pretrain.doctor.row import FAIL, OK, WARN, Found, Request, Row

TRY_SECONDS, PAUSE = 3.0, 0.2
# Above the first, logs of the nodes do not line up; above the second, logins (munge, Kerberos, TLS) begin to fail.
SKEW_WARNED, SKEW_REFUSED = 1.0, 60.0


class _Listeners:
    """Two listening sockets that answer until they are closed.

    Attributes:
        problem: why the master's port cannot be listened on; empty if it can.
        heard: names of the nodes that have reached both ports.
    """

    def __init__(self, port: int, stack: ExitStack) -> None:
        self.problem, self.reached = "", dict[str, set[str]]()
        self._chosen = self._listen(0, "chosen", stack)
        try:
            self._listen(port, "master", stack)
        except OSError as error:
            self.problem = error.strerror or str(error)

    @property
    def heard(self) -> set[str]:
        """Return the nodes that have reached every port."""
        return {name for name, ports in self.reached.items() if len(ports) == 2}

    def _listen(self, port: int, kind: str, stack: ExitStack) -> int:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(1024)
        threading.Thread(target=self._serve, args=(listener, kind), daemon=True).start()
        return int(listener.getsockname()[1])

    def _serve(self, listener: socket.socket, kind: str) -> None:
        with suppress(OSError):  # closed
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=self._answer, args=(connection, kind), daemon=True).start()

    def _answer(self, connection: socket.socket, kind: str) -> None:
        with suppress(OSError, ValueError), connection:
            connection.settimeout(TRY_SECONDS)
            name = connection.makefile("r", encoding="utf-8").readline().strip()
            connection.sendall(json.dumps({"time": time.time(), "port": self._chosen}).encode() + b"\n")
            self.reached.setdefault(name, set()).add(kind)


def _ask(host: str, port: int, own: str) -> dict[str, float]:
    """Return a node's answer, with the offset of its clock from this one's and the offset's uncertainty in seconds."""
    with socket.create_connection((host, port), timeout=TRY_SECONDS) as connection:
        connection.settimeout(TRY_SECONDS)
        before = time.time()
        connection.sendall(f"{own}\n".encode())
        answer = json.loads(connection.makefile("r", encoding="utf-8").readline())
        after = time.time()
    return {"port": answer["port"], "offset": answer["time"] - (before + after) / 2, "error": (after - before) / 2}


def _reach(host: str, port: int, own: str, deadline: float) -> dict[str, Any]:
    """Try both ports of a node until they answer or the time is over; return its clock, and why a port did not answer."""
    found: dict[str, Any] = {"master": "no answer", "chosen": "not tried", "offset": None}
    chosen = 0
    while True:
        try:
            if found["master"]:
                answer = _ask(host, port, own)
                found |= {"master": "", "offset": answer["offset"], "error": answer["error"]}
                chosen = int(answer["port"])
            _ask(host, chosen, own)
            found["chosen"] = ""
            return found
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error) or "no answer"
            found["chosen" if chosen else "master"] = text
        if time.monotonic() > deadline:
            return found
        time.sleep(PAUSE)


def look_exchange(request: Request, own: str, others: list[str]) -> dict[str, Any]:
    """Exchange a message with every other node in both directions. All nodes must do this at the same time."""
    deadline, peers = time.monotonic() + request.seconds, dict[str, Any]()
    with ExitStack() as stack:
        listeners = _Listeners(request.port, stack)

        def reach(host: str) -> None:
            peers[host] = _reach(host, request.port, own, deadline)

        threads = [threading.Thread(target=reach, args=(host,), daemon=True) for host in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline + 2 * TRY_SECONDS - time.monotonic()))
        while not set(others) <= listeners.heard and time.monotonic() < deadline:
            time.sleep(0.05)
        unheard = sorted(set(others) - listeners.heard)
    return {"busy": listeners.problem, "peers": peers, "unheard": unheard}


def judge_ports(found: Found, request: Request) -> list[Row]:
    """Fail if a node cannot listen on the master's port, or cannot reach a port of another one."""
    rows, nodes = [], list(found)
    for node, value in found.items():
        if value["busy"]:
            fix = "end what listens there, or take another --port, and --master_port for the job"
            rows.append(Row("", FAIL, f"cannot listen on port {request.port}: {value['busy']}", fix, node))
        for peer in (other for other in nodes if other != node and not found[other]["busy"]):
            reached = value["peers"].get(peer, {"master": "not tried", "chosen": ""})
            port = (
                f"port {request.port}"
                if reached["master"]
                else "a port that the system chooses"
                if reached["chosen"]
                else ""
            )
            if port:
                fix = f"open TCP ports {request.port} and 1024 to 65535 from {node} to {peer}"
                text = f"cannot reach {port} of {peer}: {reached['master'] or reached['chosen']}"
                rows.append(Row("", FAIL, text, fix, node))
    return rows or [
        Row("", OK, f"port {request.port} and chosen ones, between all nodes in both directions", node="all")
    ]


def judge_clock(found: Found, request: Request) -> list[Row]:
    """Warn if a node's clock is a second from the first node's, fail from a minute on."""
    first, *others = found
    rows = []
    for node in others:
        forth, back = (found[a]["peers"].get(b, {}) for a, b in ((first, node), (node, first)))
        measured = [
            (sign * seen["offset"], seen["error"]) for sign, seen in ((1, forth), (-1, back)) if seen.get("offset")
        ]
        if not measured:
            rows.append(Row("", WARN, f"not known: no port between it and {first} answers", "see ports", node))
            continue
        offset, error = min(measured, key=lambda pair: pair[1])
        late = abs(offset) - error
        state = FAIL if late > SKEW_REFUSED else WARN if late > SKEW_WARNED else OK
        if state != OK:
            text = f"{offset:+.1f} s from the clock of {first}"
            rows.append(Row("", state, text, "start chrony or ntpd on every node", node))
    return rows or [Row("", OK, f"within {SKEW_WARNED:g} s of {first}", node="all")]


def look_interfaces(request: Request, own: str, others: list[str]) -> dict[str, Any]:
    """Return the interfaces and their addresses, the one towards the other nodes, and what gloo and NCCL are told."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    addresses = {
        name: [address.address for address in found if address.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
        if name in up
    }
    address, route = "", ""
    with suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    for peer in others[:1]:
        with suppress(OSError):
            local = address_towards(peer)
            route = next((name for name, own_addresses in addresses.items() if local in own_addresses), "")
    return {"addresses": addresses, "hostname": socket.gethostname(), "address": address, "route": route,
            "gloo": os.environ.get("GLOO_SOCKET_IFNAME", ""), "nccl": os.environ.get("NCCL_SOCKET_IFNAME", "")}  # fmt: skip


def judge_interfaces(value: dict[str, Any]) -> tuple[str, str, str]:
    """Fail if gloo or NCCL would take an interface that does not exist, has no IPv4 address, or that other nodes cannot reach;
    warn if one takes another interface than the one that leads to the other nodes."""
    addresses, route = value["addresses"], value["route"]
    instead = f"set GLOO_SOCKET_IFNAME={route or 'the interface between the nodes'} on every node"
    gloo = value["gloo"].split(",")[0]
    if gloo and (problem := _unusable(gloo, addresses)):
        return FAIL, f"GLOO_SOCKET_IFNAME={gloo} {problem}", instead
    if not gloo:
        if not value["address"]:
            return FAIL, f"the host's name {value['hostname']} has no address, so gloo finds no interface", instead
        gloo = next((name for name, own in addresses.items() if value["address"] in own), "")
        if is_loopback(value["address"]) or not gloo:
            return FAIL, f"the host's name stands for {value['address']}, where gloo would listen", instead
    for_nccl = instead.replace("GLOO", "NCCL")
    nccl = _nccl(value["nccl"], [name for name, own in addresses.items() if own])
    if not nccl:
        without = _nccl(value["nccl"], list(addresses))
        return FAIL, f"NCCL_SOCKET_IFNAME={value['nccl']} {_unusable(without or value['nccl'], addresses)}", for_nccl
    text = f"gloo takes {gloo}, NCCL {nccl}"
    if _is_loopback(addresses.get(nccl, ["127.0.0.1"])):  # without any other interface, NCCL takes lo
        return FAIL, f"{text}, which is the loopback and reaches no other node", for_nccl
    if route and route not in (gloo, nccl):
        return WARN, f"{text}; the other nodes are reached by {route}", f"{instead}, and NCCL_SOCKET_IFNAME={route}"
    if route and not gloo == nccl == route:
        return WARN, f"{text}; the other nodes are reached by {route}", instead if gloo != route else for_nccl
    return OK, text, ""


def _is_loopback(own_addresses: list[str]) -> bool:
    return bool(own_addresses) and all(is_loopback(address) for address in own_addresses)


def _unusable(name: str, addresses: dict[str, list[str]]) -> str:
    """Return why an interface cannot carry messages to other nodes; empty if it can."""
    if name not in addresses:
        return f"is no interface with an address (found: {', '.join(n for n, own in addresses.items() if own)})"
    if not addresses[name]:
        usable = ", ".join(n for n, own in addresses.items() if own)
        return f"is the interface {name}, which has no IPv4 address (with one: {usable})"
    return "is the loopback, which reaches no other node" if _is_loopback(addresses[name]) else ""


def _nccl(told: str, names: list[str]) -> str:
    """Return the interface that NCCL takes: the first that fits NCCL_SOCKET_IFNAME; InfiniBand first if it is not set."""
    if not told:
        usable = [name for name in names if not name.startswith(("lo", "docker"))]
        return next((name for name in usable if name.startswith("ib")), usable[0] if usable else "lo")
    exclude, exact = told.startswith("^"), told.lstrip("^").startswith("=")
    wanted = told.lstrip("^=").split(",")
    fits = [any(name == w if exact else name.startswith(w) for w in wanted) for name in names]
    return next((name for name, fit in zip(names, fits, strict=True) if fit != exclude), "")
