"""Load a checkpoint on another number of ranks, or under another ZeRO stage, precision or off-load, than it was written.

DeepSpeed cuts its files by rank, differently in each stage. Its universal checkpoint joins the state of Adam only, and
loads it only into the same family of stages (1 and 2, or 3). Here rank 0 joins the parts into whole parameters, with all
state that the optimiser keeps of each, in one temporary safetensors file; every rank then reads from it what its own
optimiser holds. Files of an unknown form raise UserError, naming what is unknown.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from infra import distributed
from infra.errors import UserError
from infra.files import regular_file
from infra.internals import set_internal
from pretrain.engine.partitions import (
    Segment,
    deepspeed_internal,
    is_partitioned,
    local_shards,
    offload_devices,
    stage3_range,
    write_back_weights,
)
from pretrain.engine.safe_load import read_file

# First part of a name in the joined file: state of a parameter, a scalar state (Adam's step), or a buffer of the network.
STATE, SCALAR, BUFFER = "state", "scalar", "buffer"
WEIGHTS = "fp32"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# The state of each kind of DeepSpeed's loss scaler; "NoneType" is an optimiser without one.
SCALER_STATE: dict[str, tuple[str, ...]] = {
    "NoneType": (),
    "LossScaler": ("cur_scale",),
    "DynamicLossScaler": ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"),
}
# The state of one tensor of an optimiser by name (weights under WEIGHTS), and the segments of parameters in the tensor.
Stored = tuple[dict[str, Any], list[Segment]]


class _UnknownForm(Exception):
    """A file of a checkpoint is not of a form that is known here."""


def load_resharded(folder: Path, stage: int, engine: Any) -> None:
    """Load checkpoint ``folder``, written under ZeRO ``stage``, into an engine of any ranks and stage. Collective.

    Raises:
        UserError: if this run off-loads to nvme, or the checkpoint cannot be read or is of another network.
    """
    if "nvme" in offload_devices(engine):
        raise UserError(
            f"{folder} was written on other ranks or under another ZeRO stage, which does not go with off-load to nvme; "
            "resume with device cpu in deepspeed.zero_optimization.offload_optimizer and offload_param"
        )
    temporary = folder.parent / f".unfinished-whole-{folder.name}"
    joined: list[Any] = [None]
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        joined = [_join(folder, stage, engine.parameter_order, temporary / "state.safetensors")]
    dist.broadcast_object_list(joined, src=0)
    if isinstance(joined[0], str):
        raise UserError(joined[0])
    _load_tensors(engine, temporary / "state.safetensors", folder)
    _load_remaining(engine, joined[0])
    dist.barrier()
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)


def _join(folder: Path, stage: int, order: Sequence[str], out: Path) -> dict[str, Any] | str:
    """Write the whole parameters of a checkpoint to ``out``; return the remaining state, or an error message."""
    try:
        model = read_file(next(iter(sorted(folder.glob("*model_states.pt")))))
        stored, scaler = _read_optimizers(folder, stage, model, order)
        tensors = dict(_join_segments(stored))
        tensors |= {f"{BUFFER}/{name}": model["module"][name].contiguous() for name in model["buffer_names"]}
        counters = {name: model[name] for name in COUNTERS}
        remaining = {"counters": counters, "schedule": model["lr_scheduler"], "scaler": scaler}
    except (StopIteration, KeyError, IndexError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
            _UnknownForm) as error:  # fmt: skip
        return f"checkpoint {folder} cannot be read as one of ZeRO stage {stage}: {type(error).__name__}: {error}"
    save_file(tensors, out)
    return remaining


def _read_optimizers(
    folder: Path, stage: int, model: dict[str, Any], order: Sequence[str]
) -> tuple[Iterator[Stored], dict[str, Any]]:
    """Return what the optimiser of each rank held, rank by rank, and the state of the loss scaler."""
    if stage == 0:
        return _read_stage0(model, model.get("parameter_order", order)), {}
    paths = sorted(folder.glob("*optim_states.pt"), key=lambda path: int(path.name.split("_pp_rank_")[1].split("_")[0]))
    read = _read_stage3 if stage == 3 else _read_stages1_2
    scaler = read_file(paths[0])["optimizer_state_dict"].get("loss_scaler")
    return read(paths, model), _scaler_state(scaler)


def _scaler_state(scaler: Any) -> dict[str, Any]:
    """Return the state of a loss scaler, with its class under "kind"."""
    kind = type(scaler).__name__
    if kind not in SCALER_STATE:
        raise _UnknownForm(f"unknown loss scaler {kind}; known are {', '.join(SCALER_STATE)}")
    return {"kind": kind, **{name: getattr(scaler, name) for name in SCALER_STATE[kind]}}


def _read_stage0(model: dict[str, Any], order: Sequence[str]) -> Iterator[Stored]:
    optimizer = model["optimizer"]
    if set(optimizer) == {"state", "param_groups"}:  # torch's own optimiser on float32 parameters
        states, weights = optimizer["state"], [model["module"][name] for name in order]
    elif {"optimizer_state_dict", "fp32_groups"} <= set(optimizer):  # float32 copies of 16-bit parameters
        states = optimizer["optimizer_state_dict"]["state"]
        weights = [copy for group in optimizer["fp32_groups"] for copy in group]
    else:
        raise _UnknownForm(f"unknown optimiser state with the keys {', '.join(map(str, optimizer))}")
    _check_numbers(states, len(order))
    for number, (name, values) in enumerate(zip(order, weights, strict=True)):
        yield {**states.get(number, {}), WEIGHTS: values}, [Segment(name, 0, values.numel(), 0)]


def _read_stages1_2(paths: Sequence[Path], model: dict[str, Any]) -> Iterator[Stored]:
    """The parts of one parameter follow each other in the order of the ranks."""
    entries_read: dict[str, int] = {}
    for path in paths:
        saved = read_file(path)["optimizer_state_dict"]
        flats, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
        _check_numbers(states, len(flats))
        for number, fragments in enumerate(saved["param_slice_mappings"]):
            segments = []
            for name, fragment in fragments.items():
                start = entries_read.get(name, 0)
                segments.append(Segment(name, start, fragment.numel, fragment.start))
                entries_read[name] = start + fragment.numel
            yield {**states.get(number, {}), WEIGHTS: flats[number]}, segments


def _read_stage3(paths: Sequence[Path], model: dict[str, Any]) -> Iterator[Stored]:
    for rank, path in enumerate(paths):
        saved = read_file(path)["optimizer_state_dict"]
        states, flats = saved["optimizer_state_dict"]["state"], saved["fp32_flat_groups"]
        _check_numbers(states, len(flats))
        for number, shapes in enumerate(model["param_shapes"]):
            sizes = [prod(shape) for shape in shapes.values()]
            offsets = list(accumulate((-(-size // len(paths)) for size in sizes), initial=0))[:-1]
            segments = [
                Segment(name, *stage3_range(size, len(paths), rank), offset)
                for name, size, offset in zip(shapes, sizes, offsets, strict=True)
            ]
            yield {**states.get(number, {}), WEIGHTS: flats[number]}, segments


def _check_numbers(states: dict[Any, Any], count: int) -> None:
    """Refuse states that are not keyed by tensor number; they would be ignored. Raises _UnknownForm."""
    unknown = [key for key in states if key not in range(count)]
    if unknown:
        raise _UnknownForm(f"optimiser state under {unknown[0]!r}, not under the numbers of its {count} tensors")


def _join_segments(stored: Iterator[Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the joined file, tensor) for every state of every parameter, flat and whole, or a scalar."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for state, segments in stored:
        for key, value in state.items():
            for segment in segments:
                if not torch.is_tensor(value) or value.ndim == 0:
                    if value is not None:
                        pieces[f"{SCALAR}/{key}/{segment.name}"] = [(0, torch.as_tensor(value))]
                    continue
                piece = value.detach().reshape(-1)[segment.offset : segment.offset + segment.size]
                pieces.setdefault(f"{STATE}/{key}/{segment.name}", []).append((segment.start, piece))
    for name, pairs in pieces.items():
        ordered = [piece for _, piece in sorted(pairs, key=lambda pair: pair[0])]
        yield name, (ordered[0].clone() if name.startswith(SCALAR) else torch.cat(ordered))


@torch.no_grad()
def _load_tensors(engine: Any, path: Path, folder: Path) -> None:
    """Fill this rank's optimiser from the joined file, and the network from the optimiser. Collective."""
    optimizer, whole_sizes = engine.basic_optimizer, _whole_sizes(engine)
    with safe_open(regular_file(path), framework="pt") as joined:
        stored_states: dict[str, list[tuple[str, str]]] = {}
        for name in joined.keys():  # noqa: SIM118
            kind, *rest = name.split("/")
            if kind != BUFFER:
                stored_states.setdefault(rest[1], []).append((kind, rest[0]))
        for tensor, segments in local_shards(engine):
            state: dict[str, torch.Tensor] = {}
            for segment in segments:
                if segment.name not in stored_states:
                    raise UserError(f"checkpoint {folder} lacks {segment.name}; it is of another network")
                for kind, key in stored_states[segment.name]:
                    stored = joined.get_tensor(f"{kind}/{key}/{segment.name}")
                    if kind == SCALAR:
                        state[key] = stored.clone()
                        continue
                    if stored.numel() != whole_sizes[segment.name]:
                        raise UserError(
                            f"checkpoint {folder} has {stored.numel()} entries of {segment.name}, this run's network has "
                            f"{whole_sizes[segment.name]}; it is of another network"
                        )
                    target = state.setdefault(key, torch.zeros_like(tensor, dtype=torch.float32))
                    values = stored[segment.start :][: segment.size].to(target)
                    target.view(-1)[segment.offset : segment.offset + segment.size] = values
            tensor.copy_(state.pop(WEIGHTS, tensor))
            optimizer.state[tensor] = state
        for name, buffer in engine.module.named_buffers():
            if f"{BUFFER}/{name}" in joined.keys():  # noqa: SIM118
                buffer.copy_(joined.get_tensor(f"{BUFFER}/{name}"))
    write_back_weights(engine)


def _whole_sizes(engine: Any) -> dict[str, int]:
    """Return the number of entries of every whole parameter of the network."""
    parameters = dict(engine.module.named_parameters())
    if is_partitioned(engine):
        return {name: int(deepspeed_internal(parameter, "ds_numel")) for name, parameter in parameters.items()}
    return {name: parameter.numel() for name, parameter in parameters.items()}


def _load_remaining(engine: Any, remaining: dict[str, Any]) -> None:
    """Restore the counters, the learning-rate schedule and, in fp16, the loss scale."""
    for name, value in remaining["counters"].items():
        set_internal("deepspeed", engine, name, value)
    engine.lr_scheduler.load_state_dict(remaining["schedule"])
    for group, lr in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    state = dict(remaining["scaler"])
    kind = state.pop("kind", None)
    scaler = deepspeed_internal(engine.optimizer, "loss_scaler") if engine.fp16_enabled() else None
    if scaler is not None and type(scaler).__name__ == kind:
        for name, value in state.items():
            set_internal("deepspeed", scaler, name, value)
