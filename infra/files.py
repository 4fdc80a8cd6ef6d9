"""Where files may be written; write them atomically, lock them, and compute their digests."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from infra.errors import UserError

P = TypeVar("P", bound="str | os.PathLike[str]")
# What flock raises on file systems without locks: some mounts of NFS, Lustre without -o flock, some FUSE file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


SHORT = 40  # letters of a temporary folder: the path of a socket has at most 107, of which Ray needs about 65


def writable_folder(
    name: str, explicit: str | os.PathLike[str] | None = None, option: str = "", *, programs: bool = False
) -> Path:
    """Return a folder for what this program keeps between commands; it exists, and files can be made in it.

    The first of these that can be written: ``$XDG_CACHE_HOME/yaware/NAME``, ``~/.cache/yaware/NAME``, and
    ``$TMPDIR/yaware-UID/NAME``, which belongs to this user alone.

    Args:
        name: of the folder, for example ``evaluations``.
        explicit: a folder that the user chose; no other is tried.
        option: how the user chose it, or could, for the message: ``--storage``.
        programs: the folder is for compiled programs; the system must allow to run them there (no mount with noexec), and
            ``/tmp`` and ``/var/tmp`` are tried too.

    Raises:
        UserError: if the chosen folder, or none of them, can be written.
    """
    verb = "used" if programs else "written"
    if explicit is not None:
        problem = _unusable(Path(explicit), programs)
        if problem:
            raise UserError(f"{option}={os.fspath(explicit)} cannot be {verb} ({problem}); choose another folder")
        return Path(explicit)
    tried = []
    for folder in _candidates(programs):
        problem = _unusable(folder / name, programs)
        if not problem:
            return folder / name
        tried.append(f"{folder}: {problem}")
    choose = f"give {option}, or set" if option else "set"
    raise UserError(f"no folder can be {verb} for {name} ({'; '.join(tried)}); {choose} XDG_CACHE_HOME to one that can")


def check_output(path: str | os.PathLike[str], option: str) -> None:
    """Raise UserError if a file or folder cannot be made at ``path``, before the work whose result it is to hold.

    Its nearest existing parent must be a folder that can be written. ``option`` is how the user chose it, or could.
    """
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    if problem := _unusable(parent):
        raise UserError(f"{option}={os.fspath(path)} cannot be written ({problem}: {parent}); choose another place")


def _candidates(programs: bool) -> Iterator[Path]:
    """The folders of this program in the user's cache and in the temporary folder."""
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "yaware"
    with suppress(RuntimeError):  # no HOME, and a user that the system does not know
        yield Path.home() / ".cache" / "yaware"
    for temporary in _temporary_folders(programs):
        own = temporary / f"yaware-{os.getuid()}"
        with suppress(OSError):
            own.mkdir(mode=0o700, exist_ok=True)
        # Anyone may make a folder of this name first.
        if own.is_dir() and not own.is_symlink() and own.stat().st_uid == os.getuid():
            yield own


def _temporary_folders(programs: bool) -> Iterator[Path]:
    with suppress(OSError):  # no temporary folder can be written
        yield Path(tempfile.gettempdir())
    yield from (Path("/tmp"), Path("/var/tmp")) if programs else ()


def _unusable(folder: Path, programs: bool = False) -> str:
    """Make a folder and a file in it; return what is wrong, or an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        noexec = programs and os.statvfs(folder).f_flag & os.ST_NOEXEC
        return "mounted with noexec, programs in it cannot run" if noexec else ""
    except OSError as error:
        return error.strerror or str(error)


def short_temporary_folder(option: str, letters: int = SHORT) -> Path:
    """Return a temporary folder whose path has at most so many letters, for sockets in it.

    Raises UserError if there is none; ``option`` is the variable that sets it.
    """
    for folder in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        if len(str(folder)) <= letters and folder.is_dir() and not _unusable(folder):
            return folder
    raise UserError(
        f"TMPDIR={tempfile.gettempdir()} is too long for sockets (at most {letters} letters), and /tmp cannot be written; set "
        f"{option} to a short folder"
    )


UNFINISHED_FILE = ".yaware.tmp"  # the end of the name of a file that is being written
_cleaned: set[tuple[int, Path]] = set()  # (process, folder): where this process has removed what killed ones left


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; after the block, flush it to disk and rename it to ``path``.

    If the block raises, ``path`` is not created, and an older file at ``path`` stays unchanged. The temporary file is locked;
    those that killed processes of this host have left in the folder are removed at the first write of this process there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (os.getpid(), target.parent) not in _cleaned:
        _cleaned.add((os.getpid(), target.parent))
        remove_left(target.parent)
    handle, new = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent)
    temporary = Path(new)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            with suppress(OSError):
                lock(stream, wait=False)
            # It gets this name once it is locked; until then no other process takes it for one that was left.
            temporary = temporary.rename(temporary.with_suffix(f".{host_tag()}{UNFINISHED_FILE}"))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            # mkstemp creates private files; give shards and reports the permissions that open() would give.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@cache
def host_tag() -> str:
    """Return eight letters that tell the running systems apart that may write to one folder: a digest of Linux's boot id.

    On some shared file systems a lock holds on one host only, so what looks unlocked there may be another host's.
    """
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        host = platform.node().encode()
    return hashlib.sha256(host).hexdigest()[:8]


def remove_left(folder: Path, name: str = "") -> None:
    """Remove this host's temporary files in a folder that no process locks: killed ones left them. Without locks they stay.

    ``name`` is the beginning of the names of the files that were being written.
    """
    for path in folder.glob(f".{glob.escape(name)}*.{host_tag()}{UNFINISHED_FILE}"):
        with suppress(OSError), path.open("r+b") as stream:  # locked, of another user, or removed meanwhile
            if lock(stream, wait=False):
                path.unlink()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON with sorted keys, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.write("\n")


MAX_JSON_BYTES = 2**26  # of one file
# What a path may be instead of a regular file, by the type in its mode.
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def other_kind(path: str | os.PathLike[str]) -> str:
    """Return what is at ``path`` instead of a regular file, for example "a named pipe"; empty if there is one, or nothing."""
    try:
        return _kind(Path(path).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""


def regular_file(path: P) -> P:
    """Return ``path``; raises UserError if something else than a regular file is there.

    Opening a pipe or a device may wait forever. A path where nothing is raises nothing: the caller's way to open it says so.
    """
    _refuse(path, other_kind(path))
    return path


def open_descriptor(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; return its descriptor.

    Raises UserError if something else is there, else as ``open`` does.
    """
    return _open_regular(path, os.O_RDONLY)


def open_for_update(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and writing, and make it if there is none; return its descriptor.

    Raises UserError if something else is there, else as ``open`` does.
    """
    return _open_regular(path, os.O_RDWR | os.O_CREAT)


def _open_regular(path: str | os.PathLike[str], flags: int) -> int:
    regular_file(path)  # a socket cannot even be opened
    handle = os.open(
        path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666
    )  # without waiting for a pipe's writer
    try:
        _refuse(path, _kind(os.fstat(handle).st_mode))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _kind(mode: int) -> str:
    return "" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


def _refuse(path: str | os.PathLike[str], kind: str) -> None:
    if kind:
        raise UserError(f"{os.fspath(path)} is {kind}, not a file; give or restore the file")


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading, as bytes. Raises UserError if something else is there, else as ``open`` does."""
    return os.fdopen(open_descriptor(path), "rb")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file. Raises as ``open_file``."""
    with open_file(path) as stream:
        return stream.read()


def read_text(path: str | os.PathLike[str], errors: str = "strict") -> str:
    """Return the UTF-8 text of a regular file, each end of line as ``\\n``. Raises as ``open_file``, and UnicodeDecodeError."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8", errors=errors) as stream:
        return stream.read()


def read_object(path: str | os.PathLike[str], fix: str) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most 64 MB.

    Raises UserError, with ``fix`` as its last words, if the file holds something else; else as ``open_file``.
    """
    with open_file(path) as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    try:
        content = json.loads(text.decode()) if len(text) <= MAX_JSON_BYTES else "more than 64 MB"
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)} is not valid JSON ({str(error)[:100]}); {fix}") from None
    if not isinstance(content, dict):
        raise UserError(f"{os.fspath(path)} holds {repr(content)[:60]}, not an object; {fix}")
    return content


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits. Raises as ``open_file``."""
    with open_file(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_folder(path: str | os.PathLike[str]) -> None:
    """Flush a directory to disk, so that a rename inside it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int | IO[Any], *, wait: bool = True) -> bool:
    """Take the exclusive lock of an open file or folder and return True; False if its file system has no locks.

    The kernel releases the lock when the process ends, however it ends. Without locks the caller goes on: the user must
    then not start two commands at a time. Raises BlockingIOError if another process holds the lock and ``wait`` is False.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno == errno.EACCES:
            raise BlockingIOError(error.errno, error.strerror) from None
        raise
    return True


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of the file ``path`` inside the block; the file is made, and stays."""
    with path.open("ab") as stream:
        lock(stream)
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
