"""The SHA-256 of a file that something else reads."""

from __future__ import annotations

import hashlib
from typing import IO


class HashingStream:
    """A file that is read forward, with the SHA-256 and the size of what was read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes."""
        block = self.raw.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block
