"""A folder that keeps whole remote shards. Several processes of a machine can fill it at the same time.

A shard is stored under its SHA-256, so data sets share equal shards and no outdated shard is ever read. It is written to
``<sha256>.part``, which the writing process keeps locked, and renamed once its content is verified.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from infra.files import lock, locked_file, open_file


@dataclass(frozen=True)
class ShardCache:
    """A cache in ``folder`` that holds at most ``limit`` bytes of shards; None for no limit."""

    folder: Path
    limit: int | None = None

    def path(self, sha256: str) -> Path:
        """Return the path that a shard has in the cache, whether or not it is there."""
        return self.folder / f"{sha256}.tar"

    def fetch(
        self, sha256: str, size: int, keep: Collection[str], download: Callable[[IO[bytes]], None]
    ) -> Path | None:
        """Return the path of a shard's local copy, downloading it if it is missing; None if it does not fit.

        Other shards are removed to make room, the least recently used first, but none of ``keep``. One process downloads;
        others that need the same shard wait for it.

        Args:
            sha256: of the shard.
            size: of the shard, in bytes.
            keep: SHA-256 of the shards of this data set. Scans are drawn at random, so a removed shard would be needed as
                soon as the new one, and a cache smaller than the data set would download whole shards forever. Scans of a
                shard that does not fit are read by range instead.
            download: ``download(stream)`` writes the shard; what it raises is passed on.
        """
        final = self.path(sha256)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked_part(final) as part:
            if part is None:
                os.utime(final)  # the time of last use
                return final
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
    def _locked_part(self, final: Path) -> Iterator[IO[bytes] | None]:
        """Yield the locked, empty part file of a shard; None if the shard is there."""
        name = final.with_suffix(".part")
        while not final.exists():
            with open(name, "r+b", opener=_create) as part:
                # The kernel releases the lock when its process dies, so a killed download blocks no other process.
                lock(part)
                if not _has_name(part, name):
                    continue  # renamed or removed by the process that held the lock
                if final.exists():
                    name.unlink()
                    continue
                part.truncate(0)
                yield part
                return
        yield None

    def _make_room(self, part: IO[bytes], size: int, keep: Collection[str]) -> bool:
        """Reserve ``size`` bytes for ``part`` and return whether they fit. The cache's lock makes the limit exact."""
        with locked_file(self.folder / ".lock"):
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

    def _used(self, own_part: IO[bytes]) -> int:
        for path in self.folder.glob("*.part"):
            if str(path) != own_part.name:
                _remove_if_unlocked(path)
        # Parts are counted first: one that is renamed meanwhile is counted twice rather than not at all.
        return sum(_size(path) for pattern in ("*.part", "*.tar") for path in self.folder.glob(pattern))

    def _removable(self, keep: Collection[str]) -> list[Path]:
        shards = [path for path in self.folder.glob("*.tar") if path.stem not in keep]
        return sorted(shards, key=_last_used)


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


def _has_name(part: IO[bytes], name: Path) -> bool:
    """Return whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(part.fileno()), name.stat())
    except FileNotFoundError:
        return False


def _remove_if_unlocked(path: Path) -> None:
    """Remove the part file of a killed download, whose lock no process holds."""
    try:
        with open_file(path) as part:
            if lock(part, wait=False):  # without locks nobody knows whether a download still runs
                path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        pass
