"""Shards in object stores and on web servers: range reads, retries, and a local cache.

Uses fsspec, which is imported lazily.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from data_pipeline.storage.cache import ShardCache
from data_pipeline.storage.open_files import OpenFiles
from infra import files
from infra.errors import UserError
from infra.internals import internal

Result = TypeVar("Result")
BLOCK = 16 * 2**20  # bytes per request when a whole shard is read
MAX_WAIT = 30.0  # seconds between two attempts
# The server understood and refused the request, so repeating it is useless (408 and 429 ask to try again later).
REFUSED = frozenset(range(400, 500)) - {408, 425, 429}
FULL = (errno.ENOSPC, errno.EDQUOT)
_jitter = random.SystemRandom()  # a separate generator, so that the training's random state does not change


@dataclass(frozen=True)
class Access:
    """How shards are read.

    Attributes:
        cache: folder that keeps whole remote shards once they are read; None reads each scan by range, every time.
        cache_gb: largest size of the cache in 10^9 bytes; None for no limit.
        retries: how often a failed read is repeated, the first time after ``first_wait`` seconds, then after twice as long,
            and so on.
        timeout: seconds without an answer or a byte after which a read has failed.
        first_wait: seconds before the first retry.
        unpacked: folder that keeps scans unpacked once they are read, also those of local shards; None keeps none.
        unpacked_gb: largest size of what it keeps for a manifest in 10^9 bytes; None for no limit.
    """

    cache: str | None = None
    cache_gb: float | None = None
    retries: int = 4
    timeout: float = 60.0
    first_wait: float = 0.5
    unpacked: str | None = None
    unpacked_gb: float | None = None


class ReadFailed(OSError):
    """A read that failed at every attempt; the message names what was read and the number of attempts."""


def is_remote(url: str | Path) -> bool:
    """Return whether this is a URL rather than a path."""
    return "://" in str(url)


def join(folder: str, name: str) -> str:
    """Return the path or URL of ``name`` in ``folder``; an absolute ``name`` is returned as it is."""
    if is_remote(name) or name.startswith("/") or not is_remote(folder):
        return name if is_remote(name) else str(Path(folder, name))
    scheme, separator, rest = folder.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(posixpath.join(rest, name))}"


def with_retries(action: Callable[[], Result], name: Callable[[], str], access: Access) -> Result:
    """Return ``action()``, repeated as ``access`` says if it fails.

    Args:
        action: one attempt.
        name: returns what is read, for the error message.
        access: number of retries and waiting times.

    Raises:
        ReadFailed: after the last attempt, or at once for an error that a retry cannot mend.
        UserError: after the last attempt, if ``action`` raised it.
    """
    for attempt in range(1, access.retries + 2):
        try:
            return action()
        except Exception as error:  # every store's client has its own exceptions
            if isinstance(error, ReadFailed) or (isinstance(error, UserError) and attempt > access.retries):
                raise
            if attempt > access.retries or _is_final(error):
                raise ReadFailed(
                    f"{name()}: attempt {attempt} of {access.retries + 1} failed: {_reason(error)}"
                ) from error
        time.sleep(min(MAX_WAIT, access.first_wait * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def read_whole(url: str, access: Access) -> bytes:
    """Return a remote file's content; one attempt."""
    content: bytes = filesystem(url, access).cat_file(url)
    return content


def read_range(url: str, start: int, stop: int, access: Access) -> bytes:
    """Return bytes ``start`` to ``stop`` of a remote file; one attempt. Raises OSError if the answer has another length."""
    payload: bytes = filesystem(url, access).cat_file(url, start=start, end=stop)
    if len(payload) > stop - start:
        raise OSError(f"requested {stop - start} bytes, got {len(payload)}: the server does not support range requests")
    if len(payload) < stop - start:
        raise OSError(f"is truncated: requested {stop - start} bytes, got {len(payload)}")
    return payload


def filesystem(url: str, access: Access) -> Any:
    """Return fsspec's file system for a URL. Raises UserError if the protocol is unknown or its package is missing."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        options = OPTIONS[protocol](access.timeout) if protocol in OPTIONS else {}
        store = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise UserError(f"{url}: {error}; install it with: pip install 'yaware[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; use a path, s3://, http:// or https://") from None
    if protocol in ("s3", "s3a"):
        store.retries = 1  # its retries would multiply with ours
    return store


def _http_options(timeout: float) -> dict[str, Any]:
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    # Without transfer compression, which would shift every range.
    return {"client_kwargs": {"timeout": limits, "headers": {"Accept-Encoding": "identity"}}}


def _s3_options(timeout: float) -> dict[str, Any]:
    # botocore reads credentials, region and AWS_ENDPOINT_URL from the environment.
    limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
    return {"config_kwargs": limits}


OPTIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "http": _http_options, "https": _http_options, "s3": _s3_options, "s3a": _s3_options,
}  # fmt: skip


def _is_final(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    return getattr(error, "status", None) in REFUSED or getattr(error, "errno", None) in FULL


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text and type(error) is not OSError else text or type(error).__name__


@dataclass
class ShardStore:
    """Reads the shards of a manifest in a remote folder; pickled to worker processes with the reader.

    ``names``, ``sizes`` (bytes) and ``sha256`` have a value for each shard.
    """

    root: str
    names: list[str]
    sizes: list[int]
    sha256: list[str]
    access: Access
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False)
    _did_not_fit: set[int] = field(default_factory=set, repr=False)

    def read(
        self, number: int, offset: int, size: int, fault: Callable[[bytes], str | None], name: Callable[[], str]
    ) -> bytes:
        """Return bytes of a shard, from the cache or with a range read.

        Args:
            number: of the shard.
            offset: first byte.
            size: number of bytes.
            fault: returns what is wrong with the bytes, or None; faulty bytes are read again.
            name: returns what is read, for the error message.

        Raises:
            ReadFailed: (an OSError) if no attempt gave intact bytes.
        """
        url = join(self.root, self.names[number])

        def described() -> str:
            """Name what is read, with its location."""
            return f"{name()}, offset {offset} in {url}"

        def read_once() -> bytes:
            """Read the range and check it."""
            payload = read_range(url, offset, offset + size, self.access)
            problem = fault(payload)
            if problem:
                raise OSError(problem)
            return payload

        if self.access.cache is not None:
            payload = self._from_cache(number, offset, size, described)
            if payload is not None and fault(payload) is None:
                return payload
            if payload is not None:  # the copy was verified when it was written and is damaged now
                self._open.close(number)
                self._cache.path(self.sha256[number]).unlink(missing_ok=True)
        return with_retries(read_once, described, self.access)

    @property
    def _cache(self) -> ShardCache:
        limit = self.access.cache_gb
        return ShardCache(Path(str(self.access.cache)), None if limit is None else int(limit * 1e9))

    def _from_cache(self, number: int, offset: int, size: int, described: Callable[[], str]) -> bytes | None:
        try:
            descriptor = self._open.get(number, partial(self._cached, number, described))
        except FileNotFoundError:  # a process with another data set has just removed it to make room
            return None
        return None if descriptor is None else os.pread(descriptor, size, offset)

    def _cached(self, number: int, described: Callable[[], str]) -> Path | None:
        cache, sha256 = self._cache, self.sha256[number]
        if number in self._did_not_fit and not cache.path(sha256).exists():
            return None
        url, size = join(self.root, self.names[number]), self.sizes[number]
        path = cache.fetch(
            sha256,
            size,
            frozenset(self.sha256),
            lambda part: _download(url, size, sha256, part, described, self.access),
        )
        if path is None:
            self._did_not_fit.add(number)
        return path


def _download(
    url: str, size: int, sha256: str, part_file: IO[bytes], described: Callable[[], str], access: Access
) -> None:
    """Write a whole shard to ``part_file``, block by block with retries for each block, and verify its SHA-256."""

    def read_block(start: int) -> bytes:
        """Read one block; a server without range requests sends the whole shard, which is accepted."""
        stop = min(start + BLOCK, size)
        payload: bytes = filesystem(url, access).cat_file(url, start=start, end=stop)
        if start == 0 and len(payload) == size:
            return payload
        if len(payload) != stop - start:
            raise OSError(f"requested {stop - start} bytes of the shard, got {len(payload)}")
        return payload

    def download_once() -> None:
        """Write the shard from its beginning. Raises OSError if a block or the SHA-256 is wrong."""
        part_file.seek(0)
        digest, done = hashlib.sha256(), 0
        while done < size:
            payload = with_retries(partial(read_block, done), described, access)
            part_file.write(payload)
            digest.update(payload)
            done += len(payload)
        if digest.hexdigest() != sha256:
            raise OSError("the shard's content differs from its SHA-256 in manifest.json")

    with_retries(download_once, described, access)


class RemoteFile(io.RawIOBase):
    """A remote file, read forward in blocks with retries for each block."""

    def __init__(self, url: str, access: Access) -> None:
        self.url, self.access, self.done = url, access, 0
        self.size: int = with_retries(lambda: int(filesystem(url, access).info(url)["size"]), lambda: url, access)

    def readable(self) -> bool:
        """Return True: this is a readable stream."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into ``buffer``; return how many, 0 at the end of the file."""
        stop = min(self.done + len(buffer), self.size)
        if stop == self.done:
            return 0
        payload = with_retries(
            partial(read_range, self.url, self.done, stop, self.access), lambda: f"{self.url}, offset {self.done}",
            self.access,
        )  # fmt: skip
        buffer[: len(payload)] = payload
        self.done = stop
        return len(payload)


def open_file(url: str, access: Access) -> IO[bytes]:
    """Open a local or remote file for one forward read."""
    if is_remote(url):
        return io.BufferedReader(RemoteFile(url, access), BLOCK)
    return files.open_file(url)


def list_tars(folder: str, access: Access) -> list[str]:
    """Return the sorted names of all tars below a local or remote folder, relative to it."""
    if not is_remote(folder):
        return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.tar"))
    store = filesystem(folder, access)
    base = internal("fsspec", store, "_strip_protocol")(folder.rstrip("/")) + "/"
    paths = with_retries(lambda: list(store.find(folder.rstrip("/") + "/")), lambda: folder, access)
    return sorted(path.removeprefix(base) for path in paths if path.endswith(".tar"))
