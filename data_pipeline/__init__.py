"""From a cohort of scans to exact batches of augmented views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.loading.loader import TwoViewLoader as TwoViewLoader
    from data_pipeline.shards.build import build_shards as build_shards
    from data_pipeline.storage.manifest import Manifest as Manifest

__all__ = ["Manifest", "TwoViewLoader", "build_shards"]
_HOMES = {"Manifest": "storage.manifest", "TwoViewLoader": "loading.loader", "build_shards": "shards.build"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import data_pipeline` needs neither pandas nor DALI.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"data_pipeline.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
