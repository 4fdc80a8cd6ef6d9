"""Imports of large libraries without the parts that are not needed here and that take seconds of every start."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
def quiet_imports() -> Iterator[None]:
    """Ignore tqdm's warning in a notebook without ipywidgets; this project draws its own progress."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        yield
