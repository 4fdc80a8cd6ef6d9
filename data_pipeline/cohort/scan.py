"""The record of one scan, shared by all stages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scan:
    """One image of one participant.

    Attributes:
        path: the image's file.
        dataset: name of the data set.
        participant_id: without ``sub-``.
        session: without ``ses-``.
        run: without ``run-``; empty if there is only one.
        site: empty if missing.
        age: in years; NaN if missing.
        sex: ``F``, ``M``, ``O`` or empty.
        extra: the other columns of the participants' table: numbers as float, text as str, None if missing.
        orientation: declared orientation of an .npy array, for example ``LAS``; empty for that of its known grid.
        shown_as: the name of the file in reports if ids are pseudonyms.
        unlisted: why no table lists the scan; empty if one does, or if none lists its participant.
    """

    path: Path
    dataset: str
    participant_id: str
    session: str = "1"
    run: str = ""
    site: str = ""
    age: float = float("nan")
    sex: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    orientation: str = ""
    shown_as: str = ""
    unlisted: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """``<dataset>_sub-<id>_ses-<id>[_run-<n>]``, without dots, because WebDataset cuts names at a dot."""
        run = f"_run-{self.run}" if self.run else ""
        return safe_name(f"{self.dataset}_sub-{self.participant_id}_ses-{self.session}{run}")

    @property
    def reported_path(self) -> str:
        """The file as reports may name it: its path, or a name made of the key if ids are pseudonyms."""
        return self.shown_as or str(self.path)


def safe_name(name: str) -> str:
    """Replace every character that a sample key must not contain (dots, slashes, spaces) by a hyphen."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def array_orientations(scans: Iterable[Scan]) -> dict[str, str]:
    """Return the declared orientation of the .npy arrays of each data set that has any; empty for that of the shape."""
    return {scan.dataset: scan.orientation for scan in scans if scan.path.suffix == ".npy"}


def bytes_of(scans: Iterable[Scan]) -> int:
    """Return the size of the files of scans; a file that cannot be found counts as empty."""
    total = 0
    for scan in scans:
        with suppress(OSError):
            total += scan.path.stat().st_size
    return total
