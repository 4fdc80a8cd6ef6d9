"""``CHECKS``: all that the doctor looks at. An entry says what a node returns, and how the answers of all nodes are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pretrain.doctor import hardware, network, services, software
from pretrain.doctor.row import FAIL, WARN, Check, Found, Request, Row, equal_everywhere, on_each


def _judge_python(found: Found, request: Request) -> list[Row]:
    rows = on_each(software.judge_python)(found, request)
    if len(found) > 1 and all(row.state != FAIL for row in rows):
        return equal_everywhere(str, "Python", "install the same environment on every node")(found, request)
    return rows


CHECKS: dict[str, Check] = {
    "python": Check(software.look_python, _judge_python),
    "compiler": Check(software.look_compiler, on_each(software.judge_compiler)),
    "packages": Check(software.look_packages, on_each(software.judge_packages)),
    "environment": Check(software.look_packages, software.judge_same_packages, where="nodes"),
    "checkout": Check(software.look_checkout, software.judge_checkout, where="nodes"),
    "collectives": Check(software.look_collectives, on_each(software.judge_collectives)),
    "devices": Check(hardware.look_devices, hardware.judge_devices),
    "driver": Check(hardware.look_devices, on_each(hardware.judge_driver)),
    "memory": Check(hardware.look_memory, hardware.judge_memory),
    "disk": Check(hardware.look_disk, on_each(hardware.judge_disk)),
    "shm": Check(hardware.look_shm, hardware.judge_shm),
    "interface": Check(network.look_interfaces, on_each(network.judge_interfaces), where="nodes"),
    "ports": Check(network.look_exchange, network.judge_ports, where="nodes"),
    "clock": Check(network.look_exchange, network.judge_clock, where="nodes"),
    "shards": Check(services.look_shards, services.judge_shards, where="recipe"),
    "tracking": Check(services.look_tracking, on_each(services.judge_tracking), where="recipe"),
}


def asked(request: Request, nodes: int) -> Iterator[tuple[str, Check]]:
    """Yield the checks that a request asks for: some need several nodes, some a recipe."""
    for name, check in CHECKS.items():
        if (
            check.where == "always"
            or (check.where == "nodes" and nodes > 1)
            or (check.where == "recipe" and request.recipe)
        ):
            yield name, check


def look_at_all(request: Request, own: str, nodes: list[str]) -> dict[str, Any]:
    """Run on a node: return what it found by check, ``{"found": value}`` or ``{"problem": one line}``.

    The exchange of messages comes first, because all nodes must do it at the same time.
    """
    checks = sorted(asked(request, len(nodes)), key=lambda entry: entry[1].look is not network.look_exchange)
    by_function: dict[Callable[..., Any], dict[str, Any]] = {}
    answers = {}
    for name, check in checks:
        if check.look not in by_function:
            by_function[check.look] = _look(check, request, own, nodes)
        answers[name] = by_function[check.look]
    return answers


def _look(check: Check, request: Request, own: str, nodes: list[str]) -> dict[str, Any]:
    try:
        if check.where == "nodes" and check.look in (network.look_exchange, network.look_interfaces):
            return {"found": check.look(request, own, [node for node in nodes if node != own])}
        return {"found": check.look(request)}
    except Exception as error:  # a check that cannot be made is a finding, and the others are still made
        return {"problem": " ".join(f"{error}".split()) or type(error).__name__}


def judge_all(answers: dict[str, dict[str, Any]], request: Request) -> list[Row]:
    """Return the rows of all checks, of what the nodes answered by host name and check."""
    rows: list[Row] = []
    for name, check in asked(request, max(len(answers), len(request.hosts))):
        given = {node: answer[name] for node, answer in answers.items() if name in answer}
        problems = {node: answer["problem"] for node, answer in given.items() if "problem" in answer}
        found = {node: answer["found"] for node, answer in given.items() if "found" in answer}
        several = len(answers) > 1
        rows += [Row(name, FAIL, text, node=node if several else "") for node, text in problems.items()]
        if found:
            only = next(iter(found)) if several and len(found) == 1 else ""
            rows += [replace(row, check=name, node=row.node or only) for row in check.judge(found, request)]
    return rows


def status_of(rows: list[Row]) -> int:
    """Return the exit status: 1 if anything failed, else 0; warnings do not count."""
    return 1 if any(row.state == FAIL for row in rows) else 0


def summary(rows: list[Row]) -> str:
    """Return how many rows failed and warn."""
    failed, warned = (sum(row.state == state for row in rows) for state in (FAIL, WARN))
    return f"{len(rows)} checks: {failed} failed, {warned} warnings"
