"""What waits for the tracking store: entries kept in a file while the store does not answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.files import atomic_write

Entry = dict[str, Any]


class Spool:
    """Entries that wait for the store: JSON lines in a file, or a list in memory where no path is given."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._memory = path, list[Entry]()

    def read(self) -> list[Entry]:
        """All entries, oldest first; a last line cut short by a killed process is left out."""
        if self.path is None:
            return list(self._memory)
        entries = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                warn(f"{self.path} has a broken line, which is left out: {line[:60]}")
        return entries

    def append(self, entry: Entry) -> None:
        """Add one entry; a full disk costs the entry, not the training."""
        if self.path is None:
            self._memory.append(entry)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            warn(f"{self.path} cannot be written ({error}); an entry for MLflow is lost")

    def replace(self, entries: Sequence[Entry]) -> None:
        """Hold these entries only; an empty spool has no file."""
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
            warn(f"{self.path} cannot be written ({error}); its entries may be sent to MLflow twice")


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"yaware: warning: {text}", file=sys.stderr, flush=True)
