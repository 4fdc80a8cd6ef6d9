"""Shards in object stores and on web servers, through fsspec: range reads, retries, and a local cache. Imports it lazily."""

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
from infra.errors import UserError

Result = TypeVar("Result")
BLOCK = 16 * 2**20  # bytes asked for at once where a whole shard is wanted
LONGEST_WAIT = 30.0
# A request that the server understood and refused; asking again changes nothing (408 and 429 ask to come back later).
REFUSED = frozenset(range(400, 500)) - {408, 425, 429}
FULL = (errno.ENOSPC, errno.EDQUOT)
_jitter = random.SystemRandom()  # a generator of its own: the training's random state is not touched


@dataclass(frozen=True)
class Access:
    """How remote shards are read.

    Args:
        cache: folder that keeps whole shards once read; None reads each scan by range, every time.
        cache_gb: the most that the cache may hold, in 10^9 bytes; None for no limit.
        retries: how often a failed read is tried again, after ``first_wait`` seconds, then twice that, and so on.
        timeout: seconds without an answer or a byte after which a read has failed.
    """

    cache: str | None = None
    cache_gb: float | None = None
    retries: int = 4
    timeout: float = 60.0
    first_wait: float = 0.5


class ReadFailed(OSError):
    """A read that failed for good; the text names what was read and at which attempt it was given up."""


def is_remote(url: str | Path) -> bool:
    """Whether this is a URL rather than a path."""
    return "://" in str(url)


def join(folder: str, name: str) -> str:
    """``name`` in ``folder``, both a path or a URL; an absolute ``name`` stands for itself."""
    if is_remote(name) or name.startswith("/") or not is_remote(folder):
        return name if is_remote(name) else str(Path(folder, name))
    scheme, separator, rest = folder.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(posixpath.join(rest, name))}"


def with_retries(action: Callable[[], Result], name: Callable[[], str], access: Access) -> Result:
    """``action()``, tried again where it fails; then ReadFailed, its text begun by ``name()``, or action's own UserError."""
    for attempt in range(1, access.retries + 2):
        try:
            return action()
        except Exception as error:  # every store's client raises kinds of its own
            if isinstance(error, ReadFailed) or (isinstance(error, UserError) and attempt > access.retries):
                raise
            if attempt > access.retries or _is_final(error):
                raise ReadFailed(
                    f"{name()}: attempt {attempt} of {access.retries + 1} failed: {_reason(error)}"
                ) from error
        time.sleep(min(LONGEST_WAIT, access.first_wait * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def read_whole(url: str, access: Access) -> bytes:
    """A remote file's content; one attempt."""
    content: bytes = filesystem(url, access).cat_file(url)
    return content


def read_range(url: str, start: int, stop: int, access: Access) -> bytes:
    """Bytes ``start`` to ``stop`` of a remote file; one attempt. OSError where the answer has another length."""
    payload: bytes = filesystem(url, access).cat_file(url, start=start, end=stop)
    if len(payload) > stop - start:
        raise OSError(f"asked for {stop - start} bytes, got {len(payload)}: the server does not know range requests")
    if len(payload) < stop - start:
        raise OSError(f"is cut short: asked for {stop - start} bytes, got {len(payload)}")
    return payload


def filesystem(url: str, access: Access) -> Any:
    """fsspec's file system for a URL. UserError for a protocol that is not known or whose package is missing."""
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
        store.retries = 1  # its own retries would multiply ours
    return store


def _http_options(timeout: float) -> dict[str, Any]:
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    # Bytes as stored: a server that compresses on the way would shift every range.
    return {"client_kwargs": {"timeout": limits, "headers": {"Accept-Encoding": "identity"}}}


def _s3_options(timeout: float) -> dict[str, Any]:
    # Credentials, region and AWS_ENDPOINT_URL come from the environment, as botocore reads them.
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
    """The shards of one manifest in a remote folder; goes to worker processes with the reader."""

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
        """``size`` bytes of a shard in which ``fault`` finds none, from the cache or by a range read.

        ReadFailed (an OSError) naming ``name()``, the offset and the attempt where no attempt gave them.
        """

        def described() -> str:
            return f"{name()}, offset {offset} in {join(self.root, self.names[number])}"

        def once() -> bytes:
            payload = read_range(join(self.root, self.names[number]), offset, offset + size, self.access)
            problem = fault(payload)
            if problem:
                raise OSError(problem)
            return payload

        if self.access.cache is not None:
            payload = self._from_cache(number, offset, size, described)
            if payload is not None and fault(payload) is None:
                return payload
            if payload is not None:  # the local disk has lost what was verified when it was written
                self._open.close(number)
                self._cache.path(self.sha256[number]).unlink(missing_ok=True)
        return with_retries(once, described, self.access)

    @property
    def _cache(self) -> ShardCache:
        limit = self.access.cache_gb
        return ShardCache(Path(str(self.access.cache)), None if limit is None else int(limit * 1e9))

    def _from_cache(self, number: int, offset: int, size: int, described: Callable[[], str]) -> bytes | None:
        try:
            descriptor = self._open.get(number, partial(self._cached, number, described))
        except FileNotFoundError:  # another data set's process made room just now
            return None
        return None if descriptor is None else os.pread(descriptor, size, offset)

    def _cached(self, number: int, described: Callable[[], str]) -> Path | None:
        cache, sha256 = self._cache, self.sha256[number]
        if number in self._did_not_fit and not cache.path(sha256).exists():
            return None
        url, size = join(self.root, self.names[number]), self.sizes[number]
        found = cache.fetch(
            sha256,
            size,
            frozenset(self.sha256),
            lambda part: _download(url, size, sha256, part, described, self.access),
        )
        if found is None:
            self._did_not_fit.add(number)
        return found


def _download(url: str, size: int, sha256: str, part: IO[bytes], described: Callable[[], str], access: Access) -> None:
    """Write a whole shard to ``part``, block by block, each retried by itself; its SHA-256 is checked at the end."""

    def block(start: int) -> bytes:
        stop = min(start + BLOCK, size)
        payload: bytes = filesystem(url, access).cat_file(url, start=start, end=stop)
        if start == 0 and len(payload) == size:
            return payload  # a server that does not know ranges; the whole is what is wanted
        if len(payload) != stop - start:
            raise OSError(f"asked for {stop - start} bytes of the shard, got {len(payload)}")
        return payload

    def whole() -> None:
        part.seek(0)
        digest, done = hashlib.sha256(), 0
        while done < size:
            payload = with_retries(partial(block, done), described, access)
            part.write(payload)
            digest.update(payload)
            done += len(payload)
        if digest.hexdigest() != sha256:
            raise OSError("the shard's content differs from its SHA-256 in manifest.json")

    with_retries(whole, described, access)


class RemoteFile(io.RawIOBase):
    """A remote file read from its beginning to its end, by blocks, each retried."""

    def __init__(self, url: str, access: Access) -> None:
        self.url, self.access, self.done = url, access, 0
        self.size: int = with_retries(lambda: int(filesystem(url, access).info(url)["size"]), lambda: url, access)

    def readable(self) -> bool:
        """True, as io asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the file goes."""
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


def open_file(place: str, access: Access) -> IO[bytes]:
    """A local file or a remote one, to be read once from the beginning."""
    if is_remote(place):
        return io.BufferedReader(RemoteFile(place, access), BLOCK)
    return open(place, "rb")


def remote_sum(url: str, access: Access) -> tuple[int, str]:
    """Size and SHA-256 of a remote file, read once."""
    digest, size = hashlib.sha256(), 0
    with open_file(url, access) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def list_tars(folder: str, access: Access) -> list[str]:
    """Names of the tars below a local or remote folder, relative to it, in order."""
    if not is_remote(folder):
        return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.tar"))
    store = filesystem(folder, access)
    base = store._strip_protocol(folder.rstrip("/")) + "/"
    found = with_retries(lambda: list(store.find(folder.rstrip("/") + "/")), lambda: folder, access)
    return sorted(path.removeprefix(base) for path in found if path.endswith(".tar"))
