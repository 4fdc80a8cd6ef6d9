"""Scans that a build leaves out, and ``quarantine.tsv``, which lists them with their reasons."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.cohort.scan import Scan
from data_pipeline.volume.load import BadScan
from infra.files import atomic_write

COLUMNS = (
    "key",
    "path",
    "rule",
    "figure",
    "threshold",
    "reason",
)  # of quarantine.tsv, in the order of Removal's fields


@dataclass(frozen=True)
class Removal:
    """A scan that is left out: its key and file, the rule, the measured value, the rule's threshold, and the reason."""

    key: str
    path: str
    rule: str
    value: float | None
    threshold: float | None
    reason: str

    @classmethod
    def of(cls, scan: Scan, error: BadScan) -> Removal:
        """Make a removal from the error that a rule for single scans raised."""
        return cls(scan.key, scan.place, error.rule, error.figure, error.threshold, str(error))

    def to_json(self) -> list[Any]:
        """Return the fields as a list that JSON can hold."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Removal:
        """Read what ``to_json`` wrote."""
        return cls(*fields)

    def to_row(self) -> list[str]:
        """Return the cells of a row of quarantine.tsv; numbers have six significant digits, None is empty."""
        return [f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in astuple(self)]

    @classmethod
    def from_row(cls, cells: dict[str, str]) -> Removal:
        """Read a row of quarantine.tsv; a column that is missing or empty is None or an empty text."""
        value, threshold = (float(cells[name]) if cells.get(name) else None for name in ("figure", "threshold"))
        return cls(cells["key"], cells["path"], cells.get("rule") or "", value, threshold, cells["reason"])


def unlisted_participants(scans: Iterable[Scan]) -> list[Removal]:
    """Return a removal for each scan of a participant whom participants.tsv does not list."""
    return [Removal.of(scan, BadScan("participant is not in participants.tsv", "participant")) for scan in scans]


def write_quarantine(path: Path, removals: Iterable[Removal]) -> None:
    """Write quarantine.tsv: one row for each scan and reason, sorted by key."""
    unique = {(removal.key, removal.path, removal.rule, removal.reason): removal for removal in removals}
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(unique[identity].to_row() for identity in sorted(unique))


def read_quarantine(path: Path) -> list[Removal]:
    """Read quarantine.tsv; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [Removal.from_row(cells) for cells in csv.DictReader(stream, delimiter="\t")]
