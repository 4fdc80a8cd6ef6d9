"""Access to names inside a library that are not part of its public interface.

A library may rename such a name in any release. Every access goes through these functions, so that a missing name stops
the program with one clear line; `getattr` with a default, or an assignment to a new name, would go on with wrong results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LibraryChanged(RuntimeError):
    """The installed version of a library differs inside from the version that this code was written for."""


def library_changed(library: str, found: str) -> LibraryChanged:
    """Return the error that says what was ``found`` in the installed version of ``library`` (an imported package)."""
    version = getattr(sys.modules.get(library), "__version__", "of an unknown version")
    return LibraryChanged(f"{library} {version}: {found}; install a version within the limits of pyproject.toml")


def internal(library: str, owner: Any, name: str) -> Any:
    """Return attribute ``name`` of an object of ``library``; raises LibraryChanged if the object does not have it."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = getattr(owner, "__name__", type(owner).__name__)
        raise library_changed(library, f"{kind} has no attribute {name!r}, which is needed here") from error


def set_internal(library: str, owner: Any, name: str, value: Any) -> None:
    """Set an attribute that the object already has; raises LibraryChanged if the object does not have it."""
    internal(library, owner, name)
    setattr(owner, name, value)


@contextmanager
def replaced_internal(library: str, owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within the block and restore it afterwards; raises LibraryChanged if it does not exist."""
    original, own = internal(library, owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:  # the attribute is the class's
            delattr(owner, name)
