"""From a cohort of scans to exact batches of augmented views."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.cohort.read import read_cohort as read_cohort
    from data_pipeline.loading.augment import AUGMENTATIONS as AUGMENTATIONS
    from data_pipeline.loading.loader import TwoViewLoader as TwoViewLoader
    from data_pipeline.prepare.driver import prepare_cohort as prepare_cohort
    from data_pipeline.prepare.settings import PrepareRecipe as PrepareRecipe
    from data_pipeline.shards.build import build_shards as build_shards
    from data_pipeline.simulation.cohort import simulate_cohort as simulate_cohort
    from data_pipeline.storage.manifest import Manifest as Manifest

# Public name -> the module that holds it, imported at the first use: `import data_pipeline` needs neither pandas nor DALI.
_MODULES = {
    "AUGMENTATIONS": "data_pipeline.loading.augment",
    "Manifest": "data_pipeline.storage.manifest",
    "PrepareRecipe": "data_pipeline.prepare.settings",
    "TwoViewLoader": "data_pipeline.loading.loader",
    "build_shards": "data_pipeline.shards.build",
    "prepare_cohort": "data_pipeline.prepare.driver",
    "read_cohort": "data_pipeline.cohort.read",
    "simulate_cohort": "data_pipeline.simulation.cohort",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
