"""What the other packages share: settings, the command line, tracking, Ray, ranks and files."""

from __future__ import annotations

import os as _os
import tempfile as _tempfile
from pathlib import Path as _Path


def _name_user_and_home() -> None:
    """Set LOGNAME and HOME for a user whom the system does not know, as in a container started with a number.

    MONAI, MLflow, Ray and torch ask for the name when they are imported, and end with a KeyError; others would make a folder
    that is called ``~``.
    """
    import pwd

    try:
        pwd.getpwuid(_os.getuid())
    except KeyError:
        if not any(_os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            _os.environ["LOGNAME"] = f"user{_os.getuid()}"
        if not _os.environ.get("HOME"):
            home = _Path(_tempfile.gettempdir()) / f"yaware-{_os.getuid()}"
            home.mkdir(mode=0o700, exist_ok=True)
            if home.is_symlink() or home.stat().st_uid != _os.getuid():  # somebody else made it
                home = _Path(_tempfile.mkdtemp(prefix="yaware-"))
            _os.environ["HOME"] = str(home)


_name_user_and_home()
