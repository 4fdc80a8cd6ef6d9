"""Who owns a file or folder, and who else may write to it."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from infra.errors import UserError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def own_folder(path: Path) -> Path:
    """Create ``path`` for its owner alone, or check an existing folder; return it.

    Raises UserError, naming the path and the fix, if the folder or anything in it belongs to another user, if others may
    write to it, or if everybody may replace a folder above it.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for above in path.absolute().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise UserError(f"{path} is below {above}, where everybody may write and rename; choose another folder")
    reached = path.lstat().st_mode & (stat.S_IXGRP | stat.S_IXOTH)
    for entry in _tree(path):
        status = entry.lstat()
        if status.st_uid != os.geteuid():
            raise UserError(
                f"{entry} belongs to {user_name(status.st_uid)}, not to {user_name(os.geteuid())}, and may hold anything; "
                f"remove {path}, or choose another folder"
            )
        # Others cannot reach what lies in a folder of mode 700, whatever the umask of Ray's processes made of it.
        if stat.S_ISDIR(status.st_mode) and status.st_mode & OTHERS_WRITE and (reached or entry == path):
            raise UserError(
                f"{entry} has mode {stat.S_IMODE(status.st_mode):o}: others may write to it; remove it, or look at what it "
                f"holds and run chmod go-w {entry}"
            )
    return path


def foreign_owner(path: Path) -> str | None:
    """Return "PATH belongs to USER" for the first entry of another user at or below ``path``; None if this user owns all.

    Links are followed: what is read is what their target holds.
    """
    for entry in _tree(path):
        for status in (entry.lstat(), entry.stat() if entry.exists() else entry.lstat()):
            if status.st_uid != os.geteuid():
                return f"{entry} belongs to {user_name(status.st_uid)}"
    return None


def user_name(number: int) -> str:
    """Return a user's name, or "user 1234" if the system has no name for the number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _tree(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        yield from sorted(path.rglob("*"))
