"""The names and shapes of weights: those that a network would have, without building it, and those that a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from infra.errors import UserError
from pretrain.encoders import build_encoder

Shapes = dict[str, tuple[int, ...]]
MAKES_TENSORS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class _WithoutMemory(TorchFunctionMode):
    """Within the block, new tensors have a shape but no content (torch's device ``meta``).

    Numbers that a constructor counts with, such as those of torch.linspace, keep their content.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in MAKES_TENSORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def network_shapes(name: str, options: dict[str, Any]) -> Shapes:
    """Return the shapes of an encoder's weights and buffers by name. Takes no memory for them.

    Raises UserError as ``build_encoder`` does.
    """
    with _WithoutMemory():
        network = build_encoder(name, options)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def file_shapes(path: Path) -> Shapes:
    """Return the shapes in the header of a safetensors file. Raises UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a safetensors file ({reason}); export the encoder again") from None


def check_shapes(path: Path, name: str, options: dict[str, Any]) -> None:
    """Compare a safetensors file's header with the weights of an encoder, before memory is taken for either.

    Raises UserError, naming the first weight that is missing, unknown or of another shape.
    """
    expected, found = network_shapes(name, options), file_shapes(path)
    for key in [*expected, *(other for other in found if other not in expected)]:
        if expected.get(key) != found.get(key):
            raise UserError(
                f"{path}: weights do not fit {name}: {key[:100]} has shape {_shown(found.get(key))} in the file, "
                f"{_shown(expected.get(key))} in the network that config.json names"
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no entry" if shape is None else str(list(shape))
