"""Pretraining of 3D encoders with contrastive losses that know a continuous proxy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.api import Run as Run
    from pretrain.api import pretrain as pretrain
    from pretrain.config import Recipe as Recipe
    from pretrain.encoders import ENCODERS as ENCODERS
    from pretrain.kernels import KERNELS as KERNELS
    from pretrain.losses import LOSSES as LOSSES
    from pretrain.readouts.add import add_readouts as add_readouts
    from pretrain.weights.embedder import Embedder as Embedder
    from pretrain.weights.encoder import Encoder as Encoder
    from pretrain.weights.encoder import embed as embed
    from pretrain.weights.write import export as export

# Public name -> the module that holds it, imported at the first use: `import pretrain` needs no heavy library.
_MODULES = {
    "ENCODERS": "pretrain.encoders",
    "Embedder": "pretrain.weights.embedder",
    "Encoder": "pretrain.weights.encoder",
    "KERNELS": "pretrain.kernels",
    "LOSSES": "pretrain.losses",
    "Recipe": "pretrain.config",
    "Run": "pretrain.api",
    "add_readouts": "pretrain.readouts.add",
    "embed": "pretrain.weights.encoder",
    "export": "pretrain.weights.write",
    "pretrain": "pretrain.api",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
