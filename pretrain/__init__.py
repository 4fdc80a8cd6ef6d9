"""Pretraining of 3D encoders with contrastive losses that know a continuous proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.weights.encoder import Encoder as Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import pretrain` costs nothing and needs none of the heavy libraries.
    if name == "Encoder":
        from pretrain.weights.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
