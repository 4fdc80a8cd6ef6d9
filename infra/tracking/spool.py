"""A queue of entries for the tracking store, kept in a file while the store is unreachable."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.files import atomic_write, read_text

Entry = dict[str, Any]


class Spool:
    """Entries that are not yet in the store: JSON lines in the file ``path``, or a list in memory if ``path`` is None."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._memory = path, list[Entry]()

    def read(self) -> list[Entry]:
        """Return all entries, oldest first. Lines that are not JSON (a process was killed while writing) are skipped."""
        if self.path is None:
            return list(self._memory)
        entries = []
        lines = read_text(self.path).splitlines() if self.path.exists() else []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                warn(f"{self.path}: skipping a line that is not valid JSON: {line[:60]}")
        return entries

    def append(self, entry: Entry) -> None:
        """Add one entry. If the file cannot be written, warn and drop the entry: training must go on."""
        if self.path is None:
            self._memory.append(entry)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            warn(f"cannot write {self.path} ({error}); one entry for MLflow is lost")

    def replace(self, entries: Sequence[Entry]) -> None:
        """Replace the content by ``entries``; the file is removed if there are none."""
        self._memory = list(entries)
        if self.path is None:
            return
        try:
            if not entries:
                self.path.unlink(missing_ok=True)
                return
            with atomic_write(self.path, "w") as stream:
                stream.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            warn(f"cannot write {self.path} ({error}); its entries may be sent to MLflow twice")


def warn(text: str) -> None:
    """Print a one-line warning on stderr."""
    print(f"yaware: warning: {text}", file=sys.stderr, flush=True)
