"""Pretraining with the proxies as labels, such as the paper's baseline "age supervision".

A recipe chooses a loss of `SUPERVISED` by name like one of `pretrain.losses.LOSSES`; data and engine are the same.
B = scans of this rank, D = size of the projector's output, P = proxies, W = ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.kernels import Kernel
from pretrain.losses.gather import Gather, SingleProcess


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
    """Return the mean squared error of the standardised proxies, predicted by the first P outputs of the projector.

        L = 1/(2 K) Σ_v Σ_b Σ_p (z_vbp - (y_bp - center_p) / scale_p)²        K = number of known proxies of all ranks

    As for the contrastive losses, the mean over the ranks of the values, and of the gradients, is that of the whole batch.

    Args:
        views: (2, B, D) outputs of the projector.
        proxies: (B, P), NaN if missing; a missing proxy adds no error.
        center: (P,) means of the proxies over the training scans, see `target_scale`.
        scale: (P,) their standard deviations.
        kernel: not used.
        gather: how to reach the other ranks; None is a single process.
        subjects: not used.

    Raises:
        UserError: if D < P.
    """
    ranks, count = gather or SingleProcess(), proxies.shape[1]
    if views.shape[-1] < count:
        raise UserError(f"projector.out={views.shape[-1]} is too small for {count} proxies; give at least {count}")
    targets = (proxies - center.to(proxies)) / scale.to(proxies)
    known = ~targets.isnan()
    errors = (views[..., :count].to(targets.dtype) - targets.nan_to_num()).square() * known
    return errors.sum() * ranks.world_size / (2 * ranks.sum(known.sum()).clamp(min=1))


def target_scale(values: Tensor) -> dict[str, Any]:
    """Return ``center`` and ``scale`` (P,) of `regression` from the proxies (N, P) of the training scans, ignoring NaN.

    Raises:
        UserError: if a proxy does not have at least two different values.
    """
    known = [column[~column.isnan()].double() for column in values.T]
    if any(len(column) < 2 or float(column.std()) == 0.0 for column in known):
        raise UserError("loss.name=regression needs scans with different values of every proxy in loss.proxies")
    return {"center": torch.stack([c.mean() for c in known]), "scale": torch.stack([c.std() for c in known])}


SUPERVISED: dict[str, Callable[..., Tensor]] = {"regression": regression}
