"""A folder that keeps whole remote shards, filled by any number of processes of a node at once.

A shard lies under its SHA-256, so data sets share what they have in common and nothing stale is ever read. It is written
as ``<sha256>.part``, which the writing process holds locked, and renamed when its content is verified.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class ShardCache:
    """``folder`` holds at most ``limit`` bytes of shards (None: no limit)."""

    folder: Path
    limit: int | None = None

    def path(self, sha256: str) -> Path:
        """Where a shard lies, if it is there."""
        return self.folder / f"{sha256}.tar"

    def fetch(
        self, sha256: str, size: int, keep: Collection[str], download: Callable[[IO[bytes]], None]
    ) -> Path | None:
        """A shard's local copy, which ``download(stream)`` fills where it is missing; None where it does not fit.

        To make room, the least recently used shards that are not in ``keep`` (those of the same data set) are removed.
        Those of the same data set stay: scans are drawn at random, so the shard removed is as soon needed as the shard
        fetched, and a cache smaller than the data would fetch whole shards for ever. What does not fit is read by range.
        One process downloads; others that need the same shard wait for it.
        """
        final = self.path(sha256)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._own_part(final) as part:
            if part is None:
                return _touched(final)
            try:
                if not self._make_room(part, size, keep):
                    return None
                download(part)
                part.flush()
                os.fsync(part.fileno())
                os.replace(part.name, final)
            finally:
                Path(part.name).unlink(missing_ok=True)
        return final

    @contextmanager
    def _own_part(self, final: Path) -> Iterator[IO[bytes] | None]:
        """The locked, empty part file of a shard; None once the shard is there."""
        name = final.with_suffix(".part")
        while not final.exists():
            with open(name, "r+b", opener=_create) as part:
                # The kernel gives the lock up when its process dies, so a killed download blocks nobody.
                fcntl.flock(part, fcntl.LOCK_EX)
                if not _is_at(part, name):
                    continue  # renamed or removed by the process that held the lock
                if final.exists():
                    name.unlink()
                    continue
                part.truncate(0)
                yield part
                return
        yield None

    def _make_room(self, part: IO[bytes], size: int, keep: Collection[str]) -> bool:
        """Reserve ``size`` bytes for ``part``, under the cache's own lock, so that the limit holds for all processes."""
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.limit is not None:
                used = self._used(part)
                for path in self._removable(keep):
                    if used + size <= self.limit:
                        break
                    used -= _size(path)
                    path.unlink(missing_ok=True)
                if used + size > self.limit:
                    return False
            try:
                os.posix_fallocate(part.fileno(), 0, max(1, size))
            except OSError:  # the disk is full
                return False
            return True

    def _used(self, mine: IO[bytes]) -> int:
        for path in self.folder.glob("*.part"):
            if str(path) != mine.name:
                _remove_if_dead(path)
        # Parts first: one that is renamed meanwhile counts twice rather than not at all.
        return sum(_size(path) for pattern in ("*.part", "*.tar") for path in self.folder.glob(pattern))

    def _removable(self, keep: Collection[str]) -> list[Path]:
        shards = [path for path in self.folder.glob("*.tar") if path.stem not in keep]
        return sorted(shards, key=_last_used)


def _touched(path: Path) -> Path:
    os.utime(path)  # when it was last used
    return path


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _last_used(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed by its process just now
        return 0


def _is_at(part: IO[bytes], name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(part.fileno()), name.stat())
    except FileNotFoundError:
        return False


def _remove_if_dead(path: Path) -> None:
    """Remove what a killed download left: nobody holds its lock."""
    try:
        with open(path, "rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        pass
