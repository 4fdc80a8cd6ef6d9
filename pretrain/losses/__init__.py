"""Contrastive losses: ``LOSSES`` by name, with the gather and the tiles that they use."""

from __future__ import annotations

from pretrain.losses.contrastive import LOSSES as LOSSES

__all__ = ["LOSSES"]
