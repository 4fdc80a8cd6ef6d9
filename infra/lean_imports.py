"""Imports of large libraries without the parts that are not needed here and that take seconds of every start."""

from __future__ import annotations

import atexit
import gc
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_own_process = False
# Objects that the imports of a command make at most. While there are fewer, nothing is searched for garbage.
OBJECTS_OF_IMPORTS = 2_000_000
_usual_thresholds = gc.get_threshold()


def own_process() -> None:
    """Say that this process runs a command of this project and nothing else; call it once, before large imports.

    `without_optional`, `pretrain.engine.importing.without_compiler` and `data_pipeline.shards.tar.tar_writer` then leave out
    what no command uses. In the process of another program, such as a notebook, they change nothing.

    Python does not collect cyclic garbage until `start_collecting` or two million objects: the imports of a rank make half a
    million that stay, and searching them again and again takes a seventh of its start. Nor is garbage collected when the
    process ends, which would take half a second; so close a file whose object is part of a reference cycle, or its last lines
    are lost.
    """
    global _own_process
    if not _own_process:
        atexit.register(gc.freeze)
    _own_process = True
    gc.set_threshold(OBJECTS_OF_IMPORTS, *_usual_thresholds[1:])


def start_collecting() -> None:
    """Collect cyclic garbage as usual from now on; long work calls it before it begins.

    What is no garbage now is left out of later searches.
    """
    if gc.get_threshold()[0] == OBJECTS_OF_IMPORTS:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_usual_thresholds)


def is_own_process() -> bool:
    """Whether `own_process` was called."""
    return _own_process


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let the import of these modules raise ImportError within the block, as if they were not installed.

    For libraries that use a module only if it is installed. A module that is already imported stays available.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]


@contextmanager
def without_optional(*names: str) -> Iterator[None]:
    """As `without` in a process that runs a command of this project; in other processes the modules are imported as usual.

    For optional parts of a library that another program may want.
    """
    with without(*(names if _own_process else ())):
        yield


def import_apart(name: str) -> Any:
    """Import and return a module in a thread of its own; raises what the import raises.

    For libraries that keep an error of their import with its traceback, as optuna does for optional packages. The frames in it
    lead to all callers, so that their variables, an engine or the arrays of a notebook, would never be freed.
    """
    if name in sys.modules:
        return sys.modules[name]
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(import_module, name).result()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Ignore tqdm's warning in a notebook without ipywidgets; this project draws its own progress."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        yield
