"""The names and shapes of weights: those that a network would have, without building it, and those that a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from infra.errors import UserError
from infra.files import regular_file
from pretrain.encoders import build_encoder

Shapes = dict[str, tuple[int, ...]]
KINDS = {
    "F16": "numbers",
    "BF16": "numbers",
    "F32": "numbers",
    "I64": "counts",
}  # types in a safetensors file that are read
MAKES_TENSORS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
# Functions by which layers fill their weights in place; none changes a shape.
FILLS = {
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, torch.Tensor.mul_, torch.Tensor.add_,
    torch.Tensor.clamp_,
}  # fmt: skip


class _WithoutMemory(TorchFunctionMode):
    """Within the block, new tensors have a shape but no content (torch's device ``meta``), and nothing is drawn for them.

    Numbers that a constructor counts with, such as those of torch.linspace, keep their content. Torch would import its
    compiler, 1.3 s of CPU, to draw the content that these tensors do not have.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in MAKES_TENSORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        filled = kwargs.get("tensor", args[0] if args else None)
        fills = function in FILLS or getattr(function, "__module__", "") == "torch.nn.init"
        if fills and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return function(*args, **kwargs)


def empty_state(name: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return an encoder's weights and buffers by name, with their shapes and without memory (torch's device ``meta``).

    Raises UserError as ``build_encoder`` does.
    """
    with _WithoutMemory():
        network = build_encoder(name, options)
    return network.state_dict()


def file_shapes(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Return shapes and types (F32, I64, ...) in the header of a safetensors file. Raises UserError if it is none."""
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return (
                {key: tuple(part.get_shape()) for key, part in parts.items()},
                {key: str(part.get_dtype()) for key, part in parts.items()},
            )
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a safetensors file ({reason}); export the encoder again") from None


def check_shapes(path: Path, name: str, options: dict[str, Any]) -> None:
    """Compare a safetensors file's header with the weights of an encoder, before memory is taken for either.

    Raises UserError, naming the first weight that is missing, unknown, of another shape or of another kind of type.
    """
    state, (found, types) = empty_state(name, options), file_shapes(path)
    expected = {key: tuple(value.shape) for key, value in state.items()}
    for key in [*expected, *(other for other in found if other not in expected)]:
        if expected.get(key) != found.get(key):
            raise UserError(
                f"{path}: weights do not fit {name}: {key[:100]} has shape {_shown(found.get(key))} in the file, "
                f"{_shown(expected.get(key))} in the network that config.json names"
            )

    for key, value in state.items():
        kind = "numbers" if value.is_floating_point() else "counts"
        if KINDS.get(types[key]) != kind:
            allowed = ", ".join(name for name, other in KINDS.items() if other == kind)
            raise UserError(
                f"{path}: {key[:100]} is of type {types[key]}; allowed: {allowed}; export the encoder again"
            )


def check_values(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Check the values of weights that fit: with NaN, infinite or only zero weights every scan has the same features or none.

    Raises UserError, naming the first weight with such a value.
    """
    numbers = {key: value for key, value in state.items() if value.is_floating_point()}
    for key, value in numbers.items():
        count = int((~torch.isfinite(value)).sum())
        if count:
            raise UserError(
                f"{path}: {count} of {value.numel()} values of {key[:100]} are NaN or infinite; export the encoder again"
            )
        if key.endswith("running_var") and bool((value < 0).any()):
            raise UserError(f"{path}: {key[:100]}, a variance, has negative values; export the encoder again")
    if numbers and not any(bool(value.any()) for value in numbers.values() if value.ndim > 1):
        raise UserError(f"{path}: all weights are 0; export the encoder again")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no entry" if shape is None else str(list(shape))
