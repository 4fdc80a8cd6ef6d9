"""The optimiser of a recipe: groups of parameters with rates of their own, and the choice of algorithm."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.config import Optimizer
from pretrain.engine.layerwise import Lamb, Lars, LayerWise

# Blocks of the encoders, deeper with the number; ViT's `blocks.` count from 0, the others from 1.
_BLOCK = re.compile(r"^trunk\.(?:transformer\.)?(?:denseblock|transition|layers?|stage|down_|blocks\.)(\d+)\.")
# Behind the last block, at the full rate: the ViT's last norm.
_BEHIND = "trunk.norm."


def depth_of(name: str) -> int | None:
    """How deep in the encoder its parameter ``name`` lies: 0 the stem, then the blocks in order; None behind the last."""
    block = _BLOCK.match(name)
    if block is None:
        return None if name.startswith(_BEHIND) else 0
    return int(block[1]) + ("blocks." in block[0])


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The model's parameters by learning rate, the full rate first: groups of ``lr``, ``params`` and their ``names``.

    With ``layer_decay`` d the projector trains at the full rate, the encoder's last block at d times it, the one before
    at d squared, and so on down to the stem (Clark et al. 2020; BEiT and MAE fine-tune so). LAMB and LARS leave biases
    and norms unscaled and without decay. A learned temperature is a group of its own without decay, which would pull it
    towards 1.
    """
    depths = {name: depth_of(name) for name, _ in model.encoder.named_parameters()}  # type: ignore[union-attr]
    deepest = max((depth for depth in depths.values() if depth is not None), default=0)
    layer_wise = settings.name in ("lamb", "lars")
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths.get(name.removeprefix("encoder.")) if name.startswith("encoder.") else None
        power = 0 if settings.layer_decay is None or depth is None else deepest + 1 - depth
        learned = name.startswith("temperature.")
        plain = layer_wise and parameter.ndim <= 1
        group = groups.setdefault((power, learned, plain), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    for (power, learned, plain), group in groups.items():
        group["lr"] = settings.lr * (settings.layer_decay or 1.0) ** power
        if learned or plain:
            group["weight_decay"] = 0.0
        if layer_wise:
            group["scaled"] = not plain
    return [groups[key] for key in sorted(groups)]


def build_optimizer(settings: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's own optimisers, and LAMB and LARS, which it lacks; DeepSpeed's would be compiled a second time."""
    parameters = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(parameters, betas=settings.betas, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, betas=settings.betas, **common),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
        "lamb": lambda: Lamb(parameters, betas=settings.betas, **common),
        "lars": lambda: Lars(parameters, **common),
    }
    return kinds[settings.name]()


__all__ = ["LayerWise", "build_optimizer", "depth_of", "parameter_groups"]
