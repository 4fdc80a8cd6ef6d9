"""Temporary folders that do not stay after a kill: the next one that is made removes those whose process has ended.

A process that is killed, or that ends by ``os._exit``, removes nothing itself. Every folder holds a locked file; the kernel
releases the lock with the process, whichever container it ran in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infra.errors import UserError
from infra.files import host_tag, lock, open_file

PREFIX, SHORT_PREFIX, LOCK = "yaware-scratch-", "yw-", ".lock"


@contextmanager
def scratch_folder(title: str, beside: Path | None = None, *, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder in TMPDIR, only for this user and inside the block; remove those that killed processes have left.

    On a file system without locks the others are left alone, since their processes may still run.

    Args:
        title: a word for the folder's name, for example ``voxels``.
        beside: make the folder beside this path instead, with a hidden name: for a result that is renamed to this path.
        parent: make the folder in this one instead, with a short name, for sockets in it.

    Raises:
        UserError: if no temporary folder can be written.
        OSError: if no folder can be made beside ``beside``.
    """
    # Beside a result, which other hosts may see too, only folders of this host are removed; see `host_tag`.
    prefix = f".{PREFIX}{host_tag()}-" if beside else SHORT_PREFIX if parent else PREFIX
    try:
        parent = beside.parent if beside else parent or Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=f".{prefix}{title}-", dir=parent))
    except OSError as error:
        if beside is not None:
            raise
        raise UserError(
            f"TMPDIR: no temporary folder can be written ({error.strerror or error}); set TMPDIR to one that can"
        ) from None
    with (folder / LOCK).open("wb") as held:
        if lock(held):
            _remove_left(parent, prefix)
        # It gets its final name once it is locked; until then no other process takes it for one that was left.
        final = parent / folder.name.removeprefix(".")
        folder.rename(final)
        try:
            yield final
        finally:
            shutil.rmtree(final, ignore_errors=True)


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove this user's scratch folders that no process locks."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # locked, or another process has removed it
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with open_file(folder / LOCK) as stream:
                if lock(stream, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
