"""Where the positions of a feature map lie: the centres of their receptive fields, from the kernels on the way.

Along an axis the centres lie at first, first + step, first + 2 step, ..., in voxels from the low face of the volume. The centre
of a voxel is its middle, that of a kernel the mean of what it covers:

    volume                first = 0.5                                                   step = 1
    after a kernel        first + step (dilation (kernel - 1) / 2 - padding)            step stride

    voxels                              | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
    kernel 2, stride 2                      1       3       5       7       as cells of equal size
    kernel 3, stride 2, padding 1         .5      2.5     4.5     6.5       half a voxel lower

So the position of a strided, padded convolution describes a place at the low side of its cell; after five of them it is half
a position. Where paths with different centres meet (a sum, channels side by side), the centre is their mean. Zeros beyond the
volume are counted as voxels.

A network whose kernels do not overlap, as a transformer on patches, divides the padded volume into equal cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from infra.errors import UserError
from pretrain.encoders.pooling import run_on_meta

SIDE = 64  # of the volume that is followed; the centres do not depend on it
_KERNELS = ("convolution", "max_pool3d_with_indices", "avg_pool3d")


class MapAxis(NamedTuple):
    """Centres of a map's positions along one axis: position i lies at ``first + i * step``, in voxels from the low face."""

    first: float
    step: float


Axes = tuple[MapAxis, MapAxis, MapAxis]  # of D, H, W


def map_axes(trunk: nn.Module, layer: str | None, *, multiple: int, name: str) -> Axes:
    """Return where the positions of a block's map lie in the padded volume. Nothing is computed but shapes.

    Args:
        trunk: (N, 1, D, H, W) -> a map (N, C, d, h, w) or tokens; with ``keep=(layer,)`` also the output of that block.
        layer: name of the block; None is the trunk's end.
        multiple: of which the padded sides are; the side of a patch, if the block has tokens.
        name: the encoder's name, for messages.

    Raises:
        UserError: if the network has an operation whose effect on the places of its map is not known.
    """
    volumes = torch.empty(1, 1, SIDE, SIDE, SIDE, device="meta")
    centres = _Centres(volumes)
    with centres:
        outputs = run_on_meta(trunk, volumes, *[] if layer is None else [(layer,)])
    output: torch.Tensor = outputs if layer is None else outputs[1]
    if not _overlapping(trunk):
        steps = [SIDE / positions for positions in output.shape[2:]] if output.ndim == 5 else [float(multiple)] * 3
        d, h, w = (MapAxis(step / 2, step) for step in steps)
        return d, h, w
    found = centres.of(output)
    if found is None:
        place = "the last map" if layer is None else f"the block {layer}"
        raise UserError(
            f"{name}: the receptive fields of {place} cannot be followed through its operations, so loss.dense and "
            "loss.reconstruction cannot tell where its positions lie; choose another block or encoder"
        )
    return found


def _overlapping(trunk: nn.Module) -> bool:
    """Whether a kernel is wider than its stride, or padded."""
    kinds = (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d)
    kernels = [module for module in trunk.modules() if isinstance(module, kinds)]
    return any(_three(k.kernel_size) != _three(k.stride) or any(_three(k.padding)) for k in kernels)


def _three(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * 3 if len(values) == 1 else values


class _Centres(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the centres of positions through the operations of a forward pass."""

    def __init__(self, volumes: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By the tensor's id; the tensor is kept, so that no other one gets its id.
        self._known: dict[int, tuple[torch.Tensor, Axes]] = {id(volumes): (volumes, (MapAxis(0.5, 1.0),) * 3)}

    def of(self, tensor: torch.Tensor) -> Axes | None:
        """Return the axes of a tensor; None if they are not known."""
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the axes of its results."""
        inputs = [
            leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor) and id(leaf) in self._known
        ]
        result = func(*args, **(kwargs or {}))
        if not inputs:
            return result
        axes, is_kernel = _mean([self._known[id(leaf)][1] for leaf in inputs]), func.overloadpacket.__name__ in _KERNELS
        if axes is not None and is_kernel:
            axes = _after_kernel(axes, func, args, kwargs or {})
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and (is_kernel or leaf.shape[-3:] == inputs[0].shape[-3:]):
                # An unknown operation, such as padding, changes the shape; its results have no axes.
                self._known.pop(id(leaf), None)
                if axes is not None:
                    self._known[id(leaf)] = (leaf, axes)
        return result


def _mean(paths: list[Axes]) -> Axes | None:
    """Return the mean of the centres of several paths; None if their steps differ."""
    along = [tuple(axes[axis] for axes in paths) for axis in range(3)]
    if any(len({axis.step for axis in axes}) > 1 for axes in along):
        return None
    d, h, w = (MapAxis(sum(axis.first for axis in axes) / len(axes), axes[0].step) for axes in along)
    return d, h, w


def _after_kernel(axes: Axes, func: Any, args: Any, kwargs: Any) -> Axes | None:
    """Return the axes after a convolution or pooling; None if it is a transposed one, or not of three dimensions."""
    names = [argument.name for argument in func._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    kernel = _three(given["kernel_size"] if "kernel_size" in given else given["weight"].shape[2:])
    if given.get("transposed") or len(kernel) != 3:
        return None
    strides = _three(given.get("stride") or kernel)
    paddings, dilations = _three(given.get("padding", 0)), _three(given.get("dilation", 1))
    d, h, w = (
        MapAxis(axis.first + axis.step * (dilation * (size - 1) / 2 - padding), axis.step * stride)
        for axis, size, stride, padding, dilation in zip(axes, kernel, strides, paddings, dilations, strict=True)
    )
    return d, h, w
