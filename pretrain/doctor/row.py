"""What the doctor asks, and what it says: a request to every node, and a row for each check."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Request:
    """What every node is asked to look at.

    Attributes:
        hosts: ranks of each host by name, the master first; empty for this machine alone, or if SLURM chooses the hosts.
        recipe: name or path of a recipe and its overrides; empty for none.
        port: the master's port.
        seconds: how long a node waits for the others.
        gpus: GPUs that SLURM is asked for on each node, with a rank for each; 0 for none.
    """

    hosts: dict[str, int] = field(default_factory=dict)
    recipe: list[str] = field(default_factory=list)
    port: int = 29500
    seconds: float = 20.0
    gpus: int = 0

    def ranks_of(self, node: str) -> int:
        """Return the ranks of a node: its slots, or the GPUs that SLURM is asked for, or 1."""
        return self.hosts.get(node, max(1, self.gpus))

    def to_json(self) -> str:
        """Return the request as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Return the request that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Row:
    """A line of the doctor.

    Attributes:
        check: a key of CHECKS.
        state: OK, WARN or FAIL.
        text: what was found.
        fix: what to do; empty if nothing is wrong.
        node: the host; empty for all of them.
    """

    check: str
    state: str
    text: str
    fix: str = ""
    node: str = ""

    def line(self) -> str:
        """Return the row as a line of text."""
        where = f"{self.node}: " if self.node else ""
        return f"{self.state:<4} {self.check:<12} {where}{self.text}" + (f"; {self.fix}" if self.fix else "")


# What a node found, by host name; JSON.
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that the doctor looks at.

    Attributes:
        look: runs on every node, given the request; returns what it found, as JSON. An exception of it is a failed check.
            Those of `pretrain.doctor.network` also take the node's name and those of the others.
        judge: of what all nodes found, by host, and the request: the rows.
        where: "always", "nodes" (only if there are several) or "recipe" (only with a recipe).
    """

    look: Callable[..., Any]
    judge: Callable[[Found, Request], list[Row]]
    where: str = "always"


def on_each(judge: Callable[[Any], tuple[str, str, str]]) -> Callable[[Found, Request], list[Row]]:
    """Return a ``judge`` that judges every node by itself; ``judge`` returns (state, text, fix). Equal rows become one."""

    def rows(found: Found, request: Request) -> list[Row]:
        judged = {node: judge(value) for node, value in found.items()}
        if len(judged) > 1 and len(set(judged.values())) == 1:
            return [Row("", *next(iter(judged.values())), node="all")]
        return [Row("", *row, node=node if len(judged) > 1 else "") for node, row in judged.items()]

    return rows


def equal_everywhere(name: Callable[[Any], Any], what: str, fix: str) -> Callable[[Found, Request], list[Row]]:
    """Return a ``judge`` that compares ``name`` of what the nodes found with that of the first node."""

    def rows(found: Found, request: Request) -> list[Row]:
        (first, reference), *others = found.items()
        different = [
            Row("", FAIL, f"{what} {name(value)} differs from {name(reference)} on {first}", fix, node)
            for node, value in others
            if name(value) != name(reference)
        ]
        return different or [Row("", OK, f"{what} {name(reference)}", node="all" if others else "")]

    return rows
