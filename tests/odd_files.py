"""Puts something else than a regular file in place of one."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

KINDS = ("named pipe", "folder", "socket", "device")


def put_in_place(path: Path, kind: str) -> None:
    """Replace ``path``, if it is there, by a thing of another kind; opening a pipe or ``/dev/zero`` would never end."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 letters
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)
