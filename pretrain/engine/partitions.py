"""Which part of which parameter this rank's optimiser holds, under every ZeRO stage.

Stage 0 holds every parameter whole. Stages 1 and 2 lay a group's parameters end to end and cut the row by rank, so that a
cut may go through a parameter. Stage 3 cuts each parameter by rank and lays a rank's parts end to end. What is here goes
by DeepSpeed's own attributes (0.19); tests/distributed/test_engine_ranks.py holds it to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Piece(NamedTuple):
    """``size`` entries of parameter ``name`` (flattened) from ``start``; at ``offset`` in what the optimiser holds."""

    name: str
    start: int
    size: int
    offset: int


def held(engine: Any) -> list[tuple[torch.Tensor, list[Piece]]]:
    """The tensors that the engine's optimiser steps on this rank, float32, in its order, each with its pieces."""
    optimizer, names = engine.optimizer, {p: name for name, p in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [(flat, _end_to_end(parameters, names)) for flat, parameters in groups]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        return [(flat, _cut_by_rank(parameters, names)) for flat, parameters in groups]
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 with gradients summed in float32
        groups = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
        return [(flat, _cut_by_rank(parameters, names)) for flat, parameters in groups]
    if hasattr(optimizer, "fp32_groups"):  # bf16 under stage 0: float32 masters, whole
        masters = [p for group in optimizer.fp32_groups for p in group]
        parameters = [p for group in optimizer.fp16_groups for p in group]
    else:
        masters = parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(m, [Piece(names[p], 0, p.numel(), 0)]) for m, p in zip(masters, parameters, strict=True)]


def show_weights(engine: Any) -> None:
    """Bring the float32 weights that the optimiser holds into the network. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        for short, flat in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            short.data.copy_(flat.data)
        for flat, parts in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True):
            for part, fresh in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = fresh.data
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)


def layout(engine: Any) -> list[Any]:
    """A checkpoint's form: stage, ranks, type of the weights, where they lie, sizes of what each rank's optimiser holds."""
    dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    sizes = [tensor.numel() for tensor, _ in held(engine)]
    return [int(engine.zero_optimization_stage()), dist.get_world_size(), dtype, off_loaded(engine), sizes]


def off_loaded(engine: Any) -> list[str]:
    """Where optimiser and parameters are off-loaded to: ``none``, ``cpu`` or ``nvme``."""
    sections = engine.zero_offload_optimizer(), engine.zero_offload_param()
    return [
        "none" if section is None else str(getattr(section.device, "value", section.device)) for section in sections
    ]


def part_of(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """First entry and count of a rank's part of a parameter of ``size`` entries under stage 3."""
    each = -(-size // ranks)
    return rank * each, max(0, min(each, size - rank * each))


def _end_to_end(parameters: list[Any], names: dict[nn.Parameter, str]) -> list[Piece]:
    pieces, offset = [], 0
    for parameter in parameters:
        start, size = part_of(parameter.ds_numel, dist.get_world_size(), dist.get_rank())
        pieces.append(Piece(names[parameter], start, size, offset))
        offset += parameter.partition_numel()
    return pieces


def _cut_by_rank(parameters: list[Any], names: dict[nn.Parameter, str]) -> list[Piece]:
    pieces = []
    for parameter in parameters:
        mapping = parameter._hp_mapping
        if mapping is not None:
            whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces.append(Piece(names[parameter], whole.start, whole.numel, flat.start))
    return pieces
