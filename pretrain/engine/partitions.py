"""The part of the float32 weights that this rank's optimiser holds, for each of DeepSpeed's optimisers.

| DeepSpeed's optimiser         | used for                            | weights of a rank                             |
|-------------------------------|-------------------------------------|-----------------------------------------------|
| none (the plain one)          | stage 0, float32 parameters         | every parameter, whole                        |
| FP16_UnfusedOptimizer         | stage 0, bf16 parameters            | float32 copies of every parameter, whole      |
| DeepSpeedZeroOptimizer        | stages 1 and 2                      | a group's parameters end to end, cut by rank  |
| BF16_Optimizer                | stage 1, bf16, gradients in float32 | a group's parameters end to end, cut by rank  |
| DeepSpeedZeroOptimizer_Stage3 | stage 3                             | each parameter cut by rank, then end to end   |

Under stages 1 and 2 a cut may go through a parameter. All of this uses attributes that are internal to DeepSpeed 0.19.
`LAYOUTS` lists the known optimisers; any other one raises LibraryChanged, and so does a missing attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from infra.internals import internal, library_changed

deepspeed_internal = partial(internal, "deepspeed")


class Segment(NamedTuple):
    """A range of one flattened parameter, and its place in a tensor that an optimiser holds.

    The ``size`` entries of parameter ``name`` from ``start`` are those of the optimiser's tensor from ``offset``.
    """

    name: str
    start: int
    size: int
    offset: int


# A float32 tensor that the optimiser updates, and the segments of parameters in it.
Shard = tuple[torch.Tensor, list[Segment]]
ParameterNames = dict[nn.Parameter, str]


class Layout(NamedTuple):
    """How one optimiser stores the weights: ``shards(optimizer, names)``, and ``write_back(optimizer)`` to the network."""

    shards: Callable[[Any, ParameterNames], list[Shard]]
    write_back: Callable[[Any], None]


def local_shards(engine: Any) -> list[Shard]:
    """Return the float32 tensors that the engine's optimiser updates on this rank, in its order, with their segments."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return layout_of(engine).shards(engine.optimizer, names)


def write_back_weights(engine: Any) -> None:
    """Copy the float32 weights that the optimiser holds into the network's parameters. Collective."""
    layout_of(engine).write_back(engine.optimizer)


def layout_of(engine: Any) -> Layout:
    """Return the layout of the engine's optimiser; raises LibraryChanged if it is not one of `LAYOUTS`."""
    optimizer = engine.optimizer
    if optimizer is deepspeed_internal(engine, "basic_optimizer"):
        return PLAIN
    kind = type(optimizer).__name__
    if kind not in LAYOUTS:
        raise library_changed("deepspeed", f"unknown optimiser {kind}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def keeps_float32_copies(engine: Any) -> bool:
    """Whether the engine has 16-bit parameters under ZeRO stage 0, with float32 copies in its optimiser."""
    return layout_of(engine) is LAYOUTS["FP16_UnfusedOptimizer"]


def layout(engine: Any) -> list[Any]:
    """Describe the form of a checkpoint; DeepSpeed loads its files only if the form is the same.

    Returns the ZeRO stage, the number of ranks, the type of the parameters, the devices of `offload_devices`, and the
    number of entries of each tensor of `local_shards`.
    """
    dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    sizes = [tensor.numel() for tensor, _ in local_shards(engine)]
    return [int(engine.zero_optimization_stage()), dist.get_world_size(), dtype, offload_devices(engine), sizes]


def offload_devices(engine: Any) -> list[str]:
    """Return the devices to which the optimiser and the parameters are off-loaded: "none", "cpu" or "nvme" each.

    Raises LibraryChanged if DeepSpeed names another device.
    """
    devices = []
    for section in (engine.zero_offload_optimizer(), engine.zero_offload_param()):
        device = "none" if section is None else str(getattr(section.device, "value", section.device))
        if device not in ("none", "cpu", "nvme"):
            raise library_changed("deepspeed", f"unknown device {device!r} of off-load")
        devices.append(device)
    return devices


def stage3_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the first entry and the number of entries that a rank holds of a parameter of ``size`` under stage 3.

    All ranks have equally large slots; the last ones may be padded, and padding is not counted.
    """
    slot = -(-size // ranks)
    return rank * slot, max(0, min(slot, size - rank * slot))


def is_partitioned(engine: Any) -> bool:
    """Whether every rank holds only a part of each parameter (ZeRO stage 3)."""
    return int(engine.zero_optimization_stage()) == 3


def _whole_parameters(parameters: list[Any], tensors: list[torch.Tensor], names: ParameterNames) -> list[Shard]:
    pairs = zip(parameters, tensors, strict=True)
    return [(tensor, [Segment(names[parameter], 0, parameter.numel(), 0)]) for parameter, tensor in pairs]


def _plain_shards(optimizer: torch.optim.Optimizer, names: ParameterNames) -> list[Shard]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return _whole_parameters(parameters, parameters, names)


def _float32_copies(optimizer: Any, names: ParameterNames) -> list[Shard]:
    copies = [copy for group in deepspeed_internal(optimizer, "fp32_groups") for copy in group]
    parameters = [parameter for group in deepspeed_internal(optimizer, "fp16_groups") for parameter in group]
    return _whole_parameters(parameters, copies, names)


def _write_back_copies(optimizer: Any) -> None:
    groups = deepspeed_internal(optimizer, "fp32_groups"), deepspeed_internal(optimizer, "fp16_groups")
    for copies, parameters in zip(*groups, strict=True):
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.data.copy_(copy.data)


def _cut_groups(optimizer: Any, names: ParameterNames, *, tensors: str, groups: str) -> list[Shard]:
    """Return the shards of an optimiser that cuts each group by rank, from the attributes of these names."""
    pairs = zip(deepspeed_internal(optimizer, tensors), deepspeed_internal(optimizer, groups), strict=True)
    return [(flat, _segments_of_group(parameters, names)) for flat, parameters in pairs]


def _segments_of_group(parameters: list[Any], names: ParameterNames) -> list[Segment]:
    segments = []
    for parameter in parameters:
        mapping = deepspeed_internal(parameter, "_hp_mapping")
        if mapping is not None:  # None: this rank holds nothing of the parameter
            in_parameter = deepspeed_internal(mapping, "lp_fragment_address")
            in_shard = deepspeed_internal(mapping, "hp_fragment_address")
            segments.append(Segment(names[parameter], in_parameter.start, in_parameter.numel, in_shard.start))
    return segments


def _update_parameters(optimizer: Any) -> None:
    deepspeed_internal(optimizer, "update_lp_params")()


def _stage3_shards(optimizer: Any, names: ParameterNames) -> list[Shard]:
    flats, groups = (deepspeed_internal(optimizer, name) for name in ("fp32_partitioned_groups_flat", "fp16_groups"))
    return [(flat, _segments_end_to_end(parameters, names)) for flat, parameters in zip(flats, groups, strict=True)]


def _segments_end_to_end(parameters: list[Any], names: ParameterNames) -> list[Segment]:
    segments, offset = [], 0
    for parameter in parameters:
        size = deepspeed_internal(parameter, "ds_numel")
        start, count = stage3_range(size, dist.get_world_size(), dist.get_rank())
        segments.append(Segment(names[parameter], start, count, offset))
        offset += deepspeed_internal(parameter, "partition_numel")()
    return segments


def _write_back_stage3(optimizer: Any) -> None:
    float32, low_precision, partitions, unflatten, prologue, epilogue = (
        deepspeed_internal(optimizer, name)
        for name in (
            "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "fp16_partitioned_groups", "unflatten",
            "checkpoint_event_prologue", "checkpoint_event_epilogue",
        )
    )  # fmt: skip
    prologue()
    for target, source in zip(low_precision, float32, strict=True):
        target.data.copy_(source.data)
    for flat, group in zip(low_precision, partitions, strict=True):
        for partition, values in zip(group, unflatten(flat, group), strict=True):
            partition.data = values.data
    epilogue()


PLAIN = Layout(_plain_shards, lambda optimizer: None)  # the optimiser updates the network's own parameters
LAYOUTS = {
    "FP16_UnfusedOptimizer": Layout(_float32_copies, _write_back_copies),
    "DeepSpeedZeroOptimizer": Layout(
        partial(_cut_groups, tensors="single_partition_of_fp32_groups", groups="bit16_groups"), _update_parameters
    ),
    "BF16_Optimizer": Layout(
        partial(_cut_groups, tensors="fp32_groups_flat_partition", groups="bf16_groups"), _update_parameters
    ),
    "DeepSpeedZeroOptimizer_Stage3": Layout(_stage3_shards, _write_back_stage3),
}
