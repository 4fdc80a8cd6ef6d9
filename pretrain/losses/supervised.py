"""Pretraining with the proxies as labels: the paper's baseline "age supervision", in a contrastive loss's place.

`SUPERVISED` stands beside `pretrain.losses.LOSSES`; the same recipe, data and engine serve both.
B = scans of this rank, D = size of the projector's output, P = proxies, W = ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel
from pretrain.losses.gather import Alone, Gather


def regression(
    views: Tensor,
    proxies: Tensor,
    *,
    center: Tensor,
    scale: Tensor,
    kernel: Kernel | None = None,
    gather: Gather | None = None,
    subjects: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the proxies, standardised, predicted by the projector's first P outputs.

        L = 1/(2 K) Σ_v Σ_b Σ_p (z_vbp - (y_bp - center_p) / scale_p)²        K = known proxies of all ranks

    ``views`` (2, B, D) and ``proxies`` (B, P), NaN where missing, which gives no error. ``center`` and ``scale`` (P,) are
    those of the scans trained on. Kernel and subjects play no part. The mean of the ranks' values, and of their gradients,
    is that of the whole batch, as of the contrastive losses. UserError where D < P.
    """
    ranks, count = gather or Alone(), proxies.shape[1]
    if views.shape[-1] < count:
        raise UserError(f"projector.out={views.shape[-1]} is too small for {count} proxies; give at least {count}")
    targets = (proxies - center.to(proxies)) / scale.to(proxies)
    known = ~targets.isnan()
    errors = (views[..., :count].to(targets.dtype) - targets.nan_to_num()).square() * known
    return errors.sum() * ranks.world_size / (2 * ranks.sum(known.sum()).clamp(min=1))


def target_scale(values: Tensor) -> dict[str, Any]:
    """``center`` and ``scale`` of the proxies (N, P) of the scans to be trained on, NaN left out."""
    known = [column[~column.isnan()].double() for column in values.T]
    if any(len(column) < 2 or float(column.std()) == 0.0 for column in known):
        raise UserError("loss.name=regression needs scans with different values of every proxy in loss.proxies")
    return {"center": torch.stack([c.mean() for c in known]), "scale": torch.stack([c.std() for c in known])}


SUPERVISED: dict[str, Callable[..., Tensor]] = {"regression": regression}
