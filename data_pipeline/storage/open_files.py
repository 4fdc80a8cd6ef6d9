"""File descriptors of the shards that a process reads from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.files import open_descriptor

MAX_OPEN = 256  # shards open at once in a process; many systems allow 1024 files


class OpenFiles:
    """Read-only descriptors of shards, opened at first use and closed in the order of opening above ``MAX_OPEN``.

    Pickling leaves the descriptors out: another process opens its own.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def get(self, shard: int, path: Callable[[], str | Path | None]) -> int | None:
        """Return the descriptor of a shard.

        Args:
            shard: the shard's number, under which its descriptor is kept.
            path: gives the file to open; called only if the shard is not open. If it returns None, so does ``get``.
        """
        if shard not in self._descriptors:
            file = path()
            if file is None:
                return None
            if len(self._descriptors) >= MAX_OPEN:
                self.close(next(iter(self._descriptors)))
            self._descriptors[shard] = open_descriptor(file)
        return self._descriptors[shard]

    def close(self, shard: int) -> None:
        """Close the descriptor of a shard if it is open."""
        if shard in self._descriptors:
            os.close(self._descriptors.pop(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
