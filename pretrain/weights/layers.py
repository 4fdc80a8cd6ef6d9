"""Features of any block inside an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from infra.errors import UserError, nearest

# (N, C, T) -> (N, C)
POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda values: values.mean(dim=2),
    "max": lambda values: values.amax(dim=2),
    "std": lambda values: values.std(dim=2, correction=0),
}


def block_names(network: nn.Module) -> list[str]:
    """Return the names of the blocks whose features can be read: the children of the trunk and their children."""
    trunk = getattr(network, "trunk", network)
    names = []
    for name, block in trunk.named_children():
        names.append(name)
        names += [f"{name}.{child}" for child, _ in block.named_children()]
    return names


def intermediate_features(
    network: nn.Module, layer: str | None, pooling: Sequence[str] = ("mean",)
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from volumes (N, 1, D, H, W) to features (N, F) of one block of an encoder.

    A block's output (N, C, D, H, W) is pooled over its voxels; tokens (N, T, C) of a transformer are pooled over T.

    Args:
        network: the encoder.
        layer: name of a block (see ``block_names``); None returns the encoder's own features, without pooling.
        pooling: keys of ``POOLINGS``; the features of several poolings are concatenated.

    Raises:
        UserError: if the block or a pooling does not exist.
    """
    for name in pooling:
        if name not in POOLINGS:
            raise UserError(f"--pooling={name} is not known{nearest(name, POOLINGS)}; allowed: {', '.join(POOLINGS)}")
    if layer is None:
        return network
    names = block_names(network)
    if layer not in names:
        raise UserError(
            f"--layer={layer} is not a block of this encoder{nearest(layer, names)}; its blocks: {', '.join(names)}"
        )
    block = getattr(network, "trunk", network).get_submodule(layer)

    def features(volumes_N1DHW: torch.Tensor) -> torch.Tensor:
        """Return the pooled output (N, F) of the block."""
        outputs: list[torch.Tensor] = []
        handle = block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            network(volumes_N1DHW)
        finally:
            handle.remove()
        output = outputs.pop()
        values_NCT = output.transpose(1, 2) if output.ndim == 3 else output.flatten(2)
        return torch.cat([POOLINGS[name](values_NCT.float()) for name in pooling], dim=1)

    return features
