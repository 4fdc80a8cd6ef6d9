"""A row of the comparison: what is measured, by which sides, how often."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

ROUND = "{round}"  # as an argument: the number of the round, from 0
UNITS = {"s": 1.0, "ms": 1e3}  # a second


@dataclass(frozen=True)
class Side:
    """One of the programs that a row compares.

    Attributes:
        name: short name, for example ``nidl``.
        case: MODULE:FUNCTION below tests.benchmarks.
        arguments: of the function. ``{data}`` in a text is the folder of the prepared data; ROUND is the round's number.
        peer: it runs in the peers' environment.
        note: what differs from the other sides, for the page.
        needs: prepared data (`tests.benchmarks.harness.table.DATA`) that this side reads, beside the row's.
    """

    name: str
    case: str
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: bool = False
    note: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: of the row, for ``--rows`` and for its file.
        section: of the page.
        title: what one unit of work is.
        unit: of the numbers on the page, ``s`` or ``ms``.
        sides: the first is ours; the others are compared with it.
        seconds: how long the row is expected to take on two idle cores.
        metric: ``cpu`` or ``wall``: what ratios compare.
        rounds: how often each side runs in an attempt.
        repeats: how often the row is measured again if the spread is too large.
        threads: of every library.
        needs: prepared data that all sides read.
        note: for the page.
        optional: runs only if ``--rows`` names it.
    """

    name: str
    section: str
    title: str
    unit: str
    sides: tuple[Side, ...]
    seconds: float
    metric: str = "cpu"
    rounds: int = 3
    repeats: int = 1
    threads: int = 1
    needs: tuple[str, ...] = ()
    note: str = ""
    optional: bool = False

    def description(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        described = {**asdict(self), "scale": UNITS[self.unit]}
        described["expected_seconds"] = described.pop("seconds")
        return described

    def fingerprint(self, *more: str) -> str:
        """Return a digest of the row and of ``more``, such as the commit; a result with another one is not used again."""
        text = json.dumps([self.description(), *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
