"""3D encoders: (N, 1, D, H, W) -> (N, feature_size), behind one dictionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from infra.errors import UserError, nearest
from pretrain.encoders import networks
from pretrain.encoders.layers import NO_SYNC_ON_CPU, NORMS, POOLINGS, check_sides

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": networks.densenet121,
    "resnet18": networks.resnet18,
    "resnet50": networks.resnet50,
    "unet": networks.unet,
    "resenc-l": networks.resenc_l,
    "vit-small": networks.vit_small,
    "vit-base": networks.vit_base,
    "vit-large": networks.vit_large,
    "swin-unetr": networks.swin_unetr,
}
# Options that say how to train, not what the network computes: an encoder read for use is built without them.
TRAINING_ONLY = ("checkpointing", "compile")

_POOLINGS = [pooling for pooling in POOLINGS if pooling != "class"]
_VIT: dict[str, Sequence[str]] = {"norm": ("layer",), "pooling": ("class", *_POOLINGS)}
_CHOICES: dict[str, dict[str, Sequence[str]]] = {
    "vit-small": _VIT,
    "vit-base": _VIT,
    "vit-large": _VIT,
    "swin-unetr": {"norm": ("layer",), "pooling": _POOLINGS},
}
_CONVOLUTIONAL: dict[str, Sequence[str]] = {"norm": tuple(NORMS), "pooling": _POOLINGS}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_grid(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(type(side) is int and side > 0 for side in value)


_SWITCH = (lambda value: isinstance(value, bool), "true, false")
_RATE = (lambda value: _is_number(value) and 0 <= value < 1, "0 to below 1")
# What the other options may be: a test, and in words.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("checkpointing", "channels_last", "compile", "max_pool"), _SWITCH),
    **dict.fromkeys(("dropout", "drop_path"), _RATE),
    "width": (lambda value: _is_number(value) and 0.125 <= value <= 8, "0.125 to 8"),
    "grid": (_is_grid, "three sides in voxels, as [121, 145, 121]"),
}


def check_encoder(
    name: str, options: dict[str, Any], *, grid: Sequence[int] | None = None, training: bool = False
) -> None:
    """UserError where an encoder or an option is unknown or out of bounds; quick, MONAI is not imported.

    ``grid``: the shape of the volumes, to be large enough. ``training``: on this machine, so that it must be able to.
    """
    if name not in ENCODERS:
        raise UserError(f"encoder.name={name!r} is not known{nearest(name, ENCODERS)}; allowed: {', '.join(ENCODERS)}")
    defaults = ENCODERS[name].__kwdefaults__ or {}
    for option, value in options.items():
        if option not in defaults:
            hint = nearest(option, defaults)
            raise UserError(f"encoder.options.{option} is no option of {name}{hint}; allowed: {', '.join(defaults)}")
        _check_value(name, option, value)
    norm = options.get("norm", defaults["norm"])
    if options.get("compile") and options.get("checkpointing") and norm in ("batch", "sync-batch"):
        raise UserError(
            f"encoder.options.compile and .checkpointing do not go together with norm={norm!r} (torch.compile cannot hold "
            "the running statistics still in the second pass); choose norm group or instance, or one of the two"
        )
    if norm == "sync-batch" and training and not torch.cuda.is_available():
        raise UserError(NO_SYNC_ON_CPU)
    if grid is not None:
        check_sides(name, norm, networks.smallest_side(name, norm, options.get("max_pool", True)), tuple(grid))


def _check_value(name: str, option: str, value: Any) -> None:
    choices = _CHOICES.get(name, _CONVOLUTIONAL).get(option)
    if choices is None:
        fits, words = _ALLOWED[option]
        if not fits(value):
            raise UserError(f"encoder.options.{option}={value!r} is not possible; allowed: {words}")
    elif value not in choices:
        near = nearest(str(value), choices)
        of = "" if len(choices) > 1 else f" of {name}, a transformer"
        raise UserError(f"encoder.options.{option}={value!r} is not known{near}; allowed{of}: {', '.join(choices)}")


def build_encoder(name: str, options: dict[str, Any]) -> nn.Module:
    """The encoder ``name`` with ``options``; UserError as ``check_encoder``."""
    check_encoder(name, options)
    return ENCODERS[name](**options)
