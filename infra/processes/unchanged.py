"""Leave the process of a caller, such as a notebook, as it was: environment, handlers, warnings and random numbers."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Restore ``os.environ`` at the end of the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextmanager
def unchanged_handlers() -> Iterator[None]:
    """Restore ``sys.excepthook`` and the handler of SIGTERM, which only the main thread can set, at the end of the block."""
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        sys.excepthook = hook
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and handler is not None and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore ``os.environ``, the handlers, ``warnings.filters`` and the state of Python's ``random``.

    torch wraps the hook at every start of a process group, and libraries draw random numbers and add filters when they are
    imported.
    """
    state = random.getstate()
    with unchanged_environment(), unchanged_handlers(), warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(state)
