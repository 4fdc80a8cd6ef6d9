"""The Python API of yaware: every public name, imported from its package at the first use.

>>> import yaware
>>> run = yaware.pretrain("demo-cpu")
>>> features = run.encoder().embed(["sub-01_T1w.nii.gz"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline import AUGMENTATIONS as AUGMENTATIONS
    from data_pipeline import Manifest as Manifest
    from data_pipeline import PrepareRecipe as PrepareRecipe
    from data_pipeline import TwoViewLoader as TwoViewLoader
    from data_pipeline import build_shards as build_shards
    from data_pipeline import prepare_cohort as prepare_cohort
    from data_pipeline import read_cohort as read_cohort
    from data_pipeline import simulate_cohort as simulate_cohort
    from evaluation import PROTOCOLS as PROTOCOLS
    from evaluation import Comparison as Comparison
    from evaluation import Reliability as Reliability
    from evaluation import compare as compare
    from evaluation import evaluate as evaluate
    from evaluation import reliability as reliability
    from pretrain import ENCODERS as ENCODERS
    from pretrain import KERNELS as KERNELS
    from pretrain import LOSSES as LOSSES
    from pretrain import Embedder as Embedder
    from pretrain import Encoder as Encoder
    from pretrain import Recipe as Recipe
    from pretrain import Run as Run
    from pretrain import add_readouts as add_readouts
    from pretrain import embed as embed
    from pretrain import export as export
    from pretrain import pretrain as pretrain

# Public name -> its package, imported at the first use: `import yaware` needs no other library.
_PACKAGES = {
    "AUGMENTATIONS": "data_pipeline",
    "Comparison": "evaluation",
    "ENCODERS": "pretrain",
    "Embedder": "pretrain",
    "Encoder": "pretrain",
    "KERNELS": "pretrain",
    "LOSSES": "pretrain",
    "Manifest": "data_pipeline",
    "PROTOCOLS": "evaluation",
    "PrepareRecipe": "data_pipeline",
    "Recipe": "pretrain",
    "Reliability": "evaluation",
    "Run": "pretrain",
    "TwoViewLoader": "data_pipeline",
    "add_readouts": "pretrain",
    "build_shards": "data_pipeline",
    "compare": "evaluation",
    "embed": "pretrain",
    "evaluate": "evaluation",
    "export": "pretrain",
    "prepare_cohort": "data_pipeline",
    "pretrain": "pretrain",
    "read_cohort": "data_pipeline",
    "reliability": "evaluation",
    "simulate_cohort": "data_pipeline",
}
__all__ = list(_PACKAGES)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return getattr(import_module(_PACKAGES[name]), name)
    raise AttributeError(f"module 'yaware' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
