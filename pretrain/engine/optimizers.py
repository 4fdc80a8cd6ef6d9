"""The optimiser of a recipe: groups of parameters, each with its own learning rate, and the algorithm."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimizerSection
from pretrain.engine.layerwise import Lamb, Lars, LayerWise

# Names of the encoders' blocks; the number grows with the depth. ViT's `blocks.` count from 0, all others from 1.
_BLOCK = re.compile(r"^trunk\.(?:transformer\.)?(?:denseblock|transition|layers?|stage|down_|blocks\.)(\d+)\.")
# The ViT's last norm comes after the last block and trains at the full rate.
_AFTER_BLOCKS = "trunk.norm."


def depth_of(name: str) -> int | None:
    """Return the depth of an encoder's parameter: 0 for the stem, then 1, 2, … for the blocks, None after the last block."""
    block = _BLOCK.match(name)
    if block is None:
        return None if name.startswith(_AFTER_BLOCKS) else 0
    return int(block[1]) + ("blocks." in block[0])


def parameter_groups(model: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """Group the model's parameters by learning rate, the full rate first; each group has ``lr``, ``params`` and ``names``.

    With ``layer_decay`` d, the projector trains at the full rate, the encoder's last block at d times that rate, the block
    before it at d squared times, and so on down to the stem (Clark et al. 2020; BEiT and MAE use it for fine-tuning). LAMB
    and LARS do not scale biases and norms and do not decay them. A learned temperature is in a group without weight decay,
    which would pull it towards 1.
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
        unscaled = layer_wise and parameter.ndim <= 1
        group = groups.setdefault((power, learned, unscaled), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    for (power, learned, unscaled), group in groups.items():
        group["lr"] = settings.lr * (settings.layer_decay or 1.0) ** power
        if learned or unscaled:
            group["weight_decay"] = 0.0
        if layer_wise:
            group["scaled"] = not unscaled
    return [groups[key] for key in sorted(groups)]


def build_optimizer(settings: OptimizerSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimiser: one of torch's, or LAMB or LARS of this package, which torch lacks.

    DeepSpeed's own optimisers are not used, since they need a second compilation.
    """
    parameters = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    constructors: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(parameters, betas=settings.betas, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, betas=settings.betas, **common),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
        "lamb": lambda: Lamb(parameters, betas=settings.betas, **common),
        "lars": lambda: Lars(parameters, **common),
    }
    return constructors[settings.name]()


__all__ = ["LayerWise", "build_optimizer", "depth_of", "parameter_groups"]
