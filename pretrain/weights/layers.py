"""Features of any block inside an encoder, and of several blocks in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from infra.errors import UserError, nearest
from pretrain.encoders import pooling as pool
from pretrain.encoders.pooling import as_map

# Poolings of a block's output (N, C, ...); pretrain.encoders.pooling defines them and the order of the features.
POOLINGS = ("mean", "max", "std", *pool.GRIDS, "none")
OWN = ("mean",)  # without a layer this stands for the encoder's own features
Block = tuple[str | None, tuple[str, ...]]  # layer and poolings


def block_names(network: nn.Module) -> list[str]:
    """Return the names of the blocks whose features can be read: the children of the trunk and their children.

    A list of blocks (a transformer's) has no output of its own: its members stand in its place.
    """
    names = []
    for name, block in _children(getattr(network, "trunk", network)):
        names.append(name)
        names += [f"{name}.{child}" for child, _ in _children(block)]
    return names


def main_blocks(network: nn.Module) -> list[str]:
    """Return the names of the blocks of the trunk that consist of several layers, in order; not its single layers."""
    blocks = _children(getattr(network, "trunk", network))
    prefix = ""
    while len(composite := [(name, block) for name, block in blocks if any(True for _ in block.children())]) == 1:
        prefix, blocks = f"{prefix}{composite[0][0]}.", _children(composite[0][1])  # a wrapper, as Swin's
    return [prefix + name for name, _ in composite]


def _children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(_named(block))


def _named(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", module) for inner, module in _named(child))
        else:
            yield name, child


def intermediate_features(
    network: nn.Module, layer: str | None, pooling: Sequence[str] = OWN
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from volumes (N, 1, D, H, W) to features (N, F) of one block of an encoder.

    A block's output (N, C, D, H, W) is pooled over its voxels; tokens (N, T, C) of a transformer are pooled over T, or put on
    their grid, without the class token, for the poolings that keep places.

    Args:
        network: the encoder.
        layer: name of a block (see ``block_names``); None: the encoder's own features if ``pooling`` is ``mean``, else its last
            map.
        pooling: ``POOLINGS``; the features of several poolings are concatenated.

    Raises:
        UserError: if the block or a pooling does not exist; in a call, if the block's map does not fit the pooling.
    """
    features = features_of_blocks(network, [(layer, tuple(pooling))])
    return network if layer is None and tuple(pooling) == OWN else lambda volumes: features(volumes)[0]


def features_of_blocks(network: nn.Module, blocks: Sequence[Block]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Return a function from volumes (N, 1, D, H, W) to the features (N, F) of each of several blocks, in one forward pass.

    Arguments and errors as ``intermediate_features``.
    """
    for layer, poolings in blocks:
        _check(network, layer, poolings)
    trunk = getattr(network, "trunk", network)

    def features(volumes_N1DHW: torch.Tensor) -> list[torch.Tensor]:
        """Return the pooled outputs (N, F) of the blocks."""
        pooled: dict[int, torch.Tensor] = {}
        multiple = getattr(network, "multiple", 1)
        patches = [-(-side // multiple) for side in volumes_N1DHW.shape[2:]]

        def note(number: int, output: object) -> None:
            # Pooled at once: the next layer may change the output in place, and the map is not kept.
            pooled[number] = _pool(output, blocks[number], patches, is_end=blocks[number][0] is None)

        handles = []
        for number, (layer, poolings) in enumerate(blocks):
            if layer is not None or poolings != OWN:
                block = trunk if layer is None else trunk.get_submodule(layer)
                handles.append(
                    block.register_forward_hook(lambda _, inputs, output, number=number: note(number, output))
                )
        try:
            own = network(volumes_N1DHW)
        finally:
            for handle in handles:
                handle.remove()
        return [pooled.get(number, own) for number in range(len(blocks))]

    return features


def _pool(output: object, block: Block, patches: Sequence[int], *, is_end: bool) -> torch.Tensor:
    layer, poolings = block
    if not isinstance(output, torch.Tensor) or output.ndim not in (3, 5):
        raise UserError(f"layer={layer!r} returns no single feature map; choose another block")
    # Blocks of a transformer have tokens (N, T, C); its end has them as (N, C, T).
    channels_first = output.transpose(1, 2) if output.ndim == 3 and not is_end else output
    channels_first = channels_first.float()
    return torch.cat(
        [
            pool.POOLINGS[name](as_map(channels_first, patches) if name in pool.SPATIAL else channels_first)
            for name in poolings
        ],
        dim=1,
    )


def _check(network: nn.Module, layer: str | None, poolings: Sequence[str]) -> None:
    for name in poolings:
        if name not in POOLINGS:
            raise UserError(f"pooling={name!r} is not known{nearest(name, POOLINGS)}; allowed: {', '.join(POOLINGS)}")
    if layer is None and tuple(poolings) != OWN and not hasattr(network, "trunk"):
        raise UserError(f"pooling={','.join(poolings)!r} needs an encoder with a trunk; give a layer")
    names = block_names(network)
    if layer is not None and layer not in {*names, *main_blocks(network)}:
        raise UserError(
            f"layer={layer!r} is not a block of this encoder{nearest(layer, names)}; its blocks: {', '.join(names)}"
        )
