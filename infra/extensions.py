"""Where DeepSpeed's compiled collectives live, and the lock that makes their build safe to kill.

DeepSpeed compiles ``deepspeed_shm_comm`` through torch's extension loader at the first start of a process group. That
loader marks a running build by a file ``<op>/lock``; a process killed meanwhile leaves it, and every later start waits
for it for ever. Here a build happens only under an advisory lock of the operating system, which a dying process gives
back by itself: whoever holds it knows that any ``<op>/lock`` is stale.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def extensions_folder() -> Path:
    """``TORCH_EXTENSIONS_DIR``; where it is not set, it becomes the checkout's ``.cache``, else one in the user's."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        checkout = Path(__file__).resolve().parent.parent
        if (checkout / "pyproject.toml").exists():
            folder = checkout / ".cache" / "torch_extensions"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "yaware" / "torch_extensions"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def exclusive_build() -> Iterator[Path]:
    """Hold the build lock of the extensions folder; locks that a killed build left are removed first."""
    folder = extensions_folder()
    with (folder / ".build").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink(missing_ok=True)
        yield folder
