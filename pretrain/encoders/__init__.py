"""3D encoders: `ENCODERS` maps a name to a function that builds a module (N, 1, D, H, W) -> (N, feature_size)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from data_pipeline.volume.limits import is_too_large
from infra.distributed import accelerator
from infra.errors import UserError, nearest
from infra.lean_imports import quiet_imports, without_optional
from pretrain.encoders import networks
from pretrain.encoders.layers import NO_SYNC_ON_CPU, NORMS, check_sides
from pretrain.encoders.pooling import GRIDS, NONE_NEEDS_GRID
from pretrain.encoders.resnet import RESNETS

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": networks.densenet121,
    **RESNETS,
    "unet": networks.unet,
    "resenc-l": networks.resenc_l,
    "vit-small": networks.vit_small,
    "vit-base": networks.vit_base,
    "vit-large": networks.vit_large,
    "swin-unetr": networks.swin_unetr,
}
# Options of training that do not change what the network computes; an exported encoder is built without them.
TRAINING_ONLY = ("checkpointing", "compile")
# Packages that MONAI imports if they are installed, and that its networks do not use: 2.5 s of CPU.
_UNUSED_BY_NETWORKS = (
    "mlflow", "ignite", "matplotlib", "scipy", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal",
    "scipy.spatial", "scipy.stats", "jsonschema", "skimage", "sklearn", "nibabel", "itk", "pandas", "PIL", "optuna", "boto3",
    "botocore", "requests", "tensorboard", "tensorboardX", "transformers",
)  # fmt: skip

_POOLINGS = ["mean", "max", "mean+max", *GRIDS, "none"]
_VIT: dict[str, Sequence[str]] = {"norm": ("layer",), "pooling": ("class", "first", *_POOLINGS)}
_CHOICES: dict[str, dict[str, Sequence[str]]] = {
    "vit-small": _VIT,
    "vit-base": _VIT,
    "vit-large": _VIT,
    "swin-unetr": {"norm": ("layer",), "pooling": _POOLINGS, "merging": ("each", "published")},
}
_CONVOLUTIONAL: dict[str, Sequence[str]] = {
    "norm": tuple(NORMS), "pooling": _POOLINGS, "shortcut": ("projection", "padding"),
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_grid(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(type(side) is int and side > 0 for side in value)
        and not is_too_large(value)
    )


_SWITCH = (lambda value: isinstance(value, bool), "true, false")
_RATE = (lambda value: _is_number(value) and 0 <= value < 1, "0 to below 1")
# Option -> (check of its value, the allowed values in words).
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("checkpointing", "channels_last", "compile", "max_pool", "dilated"), _SWITCH),
    **dict.fromkeys(("dropout", "drop_path"), _RATE),
    "first_stride": (lambda value: type(value) is int and value in (1, 2), "1, 2"),
    "width": (lambda value: _is_number(value) and 0.125 <= value <= 8, "0.125 to 8"),
    "grid": (lambda value: value is None or _is_grid(value), "three sides in voxels, as [121, 145, 121]"),
}


def check_encoder(
    name: str, options: dict[str, Any], *, grid: Sequence[int] | None = None, training: bool = False
) -> None:
    """Check an encoder's name and options without importing MONAI.

    Args:
        name: a key of `ENCODERS`.
        options: keyword arguments of that encoder.
        grid: shape of the volumes, to check that they are large enough; None skips the check.
        training: check also that this machine can train the encoder.

    Raises:
        UserError: if the name or an option is unknown, or a value is not allowed.
    """
    if name not in ENCODERS:
        raise UserError(f"encoder.name={name!r} is not known{nearest(name, ENCODERS)}; allowed: {', '.join(ENCODERS)}")
    defaults = ENCODERS[name].__kwdefaults__ or {}
    for option, value in options.items():
        if option not in defaults:
            hint = nearest(option, defaults)
            raise UserError(
                f"encoder.options.{option} is not an option of {name}{hint}; allowed: {', '.join(defaults)}"
            )
        _check_value(name, option, value)
    if options.get("pooling") == "none" and options.get("grid", defaults["grid"]) is None:
        raise UserError(NONE_NEEDS_GRID)
    norm = options.get("norm", defaults["norm"])
    if options.get("compile") and options.get("checkpointing") and norm in ("batch", "sync-batch"):
        raise UserError(
            f"encoder.options.compile and .checkpointing cannot be combined with norm={norm!r} (torch.compile cannot keep "
            "the running statistics unchanged in the second pass); use norm group or instance, or only one of the two"
        )
    if norm == "sync-batch" and training and accelerator() != "cuda":
        raise UserError(NO_SYNC_ON_CPU)
    if grid is not None:
        check_sides(name, norm, networks.smallest_side(name, norm, options.get("max_pool", True)), tuple(grid))


def _check_value(name: str, option: str, value: Any) -> None:
    choices = _CHOICES.get(name, _CONVOLUTIONAL).get(option)
    if choices is None:
        is_allowed, allowed = _ALLOWED[option]
        if not is_allowed(value):
            raise UserError(f"encoder.options.{option}={value!r} is not possible; allowed: {allowed}")
    elif value not in choices:
        hint = nearest(str(value), choices)
        whose = "" if len(choices) > 1 else f" for {name}, a transformer"
        raise UserError(f"encoder.options.{option}={value!r} is not known{hint}; allowed{whose}: {', '.join(choices)}")


def build_encoder(name: str, options: dict[str, Any]) -> nn.Module:
    """Build the encoder ``name`` with ``options``; raises UserError as `check_encoder` does."""
    check_encoder(name, options)
    with quiet_imports(), without_optional(*_UNUSED_BY_NETWORKS):  # of MONAI
        return ENCODERS[name](**options)
