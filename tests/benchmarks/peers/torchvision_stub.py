"""A package with torchvision's names and nothing behind them, for libraries that import torchvision and do not need it here.

Every module below it exists, and every name in it is a class that has the names of the modes of interpolation and nothing else.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.0.0"
__path__: list[str] = []


# Members of torchvision's enumeration InterpolationMode, which others read when they are imported.
MODES = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


def _name(module: str, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__module__": module, **{mode: mode for mode in MODES}})


class _Names(MetaPathFinder, Loader):
    """Finds every module below this package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a module without content."""
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return None: the usual kind of module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module every name."""
        own = module.__name__
        module.__getattr__ = lambda name: _name(own, name)  # type: ignore[method-assign]


def __getattr__(name: str) -> type:
    return _name(__name__, name)


sys.meta_path.append(_Names())
