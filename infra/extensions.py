"""The folder of DeepSpeed's compiled collectives, and a build lock that survives a killed build.

DeepSpeed compiles ``deepspeed_shm_comm`` with torch's extension loader when the first process group starts. The loader
marks a running build by a file ``<op>/lock``. If the process is killed, the file stays and every later start waits for it
forever. Builds here also take an advisory lock of the operating system, which is released when a process dies. The holder
of that lock can therefore delete any ``<op>/lock`` as stale.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.files import locked_file, writable_folder


def extensions_folder() -> Path:
    """Return ``TORCH_EXTENSIONS_DIR`` as an existing folder. Raises UserError if it cannot be written, or
    if programs in it cannot run.

    If it is not set, set it to ``.cache`` in the checkout, or in the user's cache folder for an installed package.
    """
    chosen, checkout = os.environ.get("TORCH_EXTENSIONS_DIR"), Path(__file__).resolve().parent.parent
    if chosen is None and (checkout / "pyproject.toml").exists() and os.access(checkout, os.W_OK):
        chosen = str(checkout / ".cache" / "torch_extensions")
    folder = writable_folder("torch_extensions", chosen, "TORCH_EXTENSIONS_DIR", programs=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


@contextmanager
def exclusive_build() -> Iterator[Path]:
    """Hold the build lock of the extensions folder inside the block, and delete stale locks of killed builds."""
    folder = extensions_folder()
    with locked_file(folder / ".build"):
        for stale in folder.glob("*/lock"):
            stale.unlink(missing_ok=True)
        yield folder


@contextmanager
def hidden_compiler_checks() -> Iterator[None]:
    """Hide what the compiler and linker print while DeepSpeed tries which libraries exist, in a notebook too.

    DeepSpeed hides it by replacing the file descriptor of sys.stderr. In a notebook that is not descriptor 2, which the
    linker writes to.
    """
    try:
        in_notebook = sys.stderr.fileno() != 2
    except (OSError, ValueError, AttributeError):  # a stream without a descriptor
        in_notebook = True
    if not in_notebook:
        yield
        return
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
