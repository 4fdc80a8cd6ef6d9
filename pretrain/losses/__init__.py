"""Contrastive losses. `LOSSES` maps a name to a loss function; the other modules are the parts that they share."""

from __future__ import annotations

from pretrain.losses.contrastive import LOSSES as LOSSES

__all__ = ["LOSSES"]
