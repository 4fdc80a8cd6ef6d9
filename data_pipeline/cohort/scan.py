"""The record that every stage shares: one scan of one participant."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scan:
    """One image and what is known about it.

    ``age`` in years, NaN where missing; ``sex`` is ``F``, ``M`` or empty; ``extra`` holds every other column of the
    participants' table (numbers as float, text as str, missing as None). ``orientation`` is what was declared of an
    array file, which has no header of its own (``LAS``; empty: that of its known grid).
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

    @property
    def key(self) -> str:
        """``<dataset>_sub-<id>_ses-<id>[_run-<n>]``; no dots, at which WebDataset would cut the name."""
        run = f"_run-{self.run}" if self.run else ""
        return safe(f"{self.dataset}_sub-{self.participant_id}_ses-{self.session}{run}")

    @property
    def reported_path(self) -> str:
        """The file as reports may name it: its path, or a name made of the key if ids are pseudonyms."""
        return self.shown_as or str(self.path)


def safe(name: str) -> str:
    """``name`` with whatever a sample key may not hold (dots, slashes, spaces) made a hyphen."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
