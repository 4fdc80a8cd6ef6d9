"""A checkpoint on another number of ranks, under another ZeRO stage, precision or off-load, than it was written with.

DeepSpeed's files are cut by rank, each stage in its own way, and its universal checkpoint joins Adam's state alone and
loads it into the same family of stages alone (1 and 2, or 3). Here rank 0 joins the parts into whole parameters, with
whatever state the optimiser keeps of each (one safetensors file, removed afterwards), and every rank takes from it what
its own optimiser is to hold.
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
from pretrain.engine.partitions import Piece, held, off_loaded, part_of, show_weights

# Names in the joined file: state of a parameter, a scalar of it (Adam's step), and a buffer of the network.
STATE, SCALAR, BUFFER = "state", "scalar", "buffer"
WEIGHTS = "fp32"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Stored = tuple[dict[str, Any], list[Piece]]


def load_resharded(folder: Path, stage: int, engine: Any) -> None:
    """Load checkpoint ``folder``, written under ZeRO ``stage``, whatever this run's ranks and stage. Collective."""
    if "nvme" in off_loaded(engine):
        raise UserError(
            f"{folder} was written on other ranks or under another ZeRO stage, which does not go with off-load to nvme; "
            "resume with device cpu in deepspeed.zero_optimization.offload_optimizer and offload_param"
        )
    joined = folder.parent / f".unfinished-whole-{folder.name}"
    rest: list[Any] = [None]
    if distributed.is_main():
        shutil.rmtree(joined, ignore_errors=True)
        joined.mkdir()
        rest = [_join(folder, stage, engine.parameter_order, joined / "state.safetensors")]
    dist.broadcast_object_list(rest, src=0)
    if isinstance(rest[0], str):
        raise UserError(rest[0])
    _take(engine, joined / "state.safetensors", folder)
    _take_rest(engine, rest[0])
    dist.barrier()
    if distributed.is_main():
        shutil.rmtree(joined, ignore_errors=True)


def _join(folder: Path, stage: int, order: Sequence[str], out: Path) -> dict[str, Any] | str:
    """Write the whole parameters of a checkpoint; what else the engine goes on with, or what is wrong with the files."""
    try:
        model = _read(next(iter(sorted(folder.glob("*model_states.pt")))))
        stored, scaler = _parts(folder, stage, model, order)
        tensors = dict(_whole(stored))
        tensors |= {f"{BUFFER}/{name}": model["module"][name].contiguous() for name in model["buffer_names"]}
    except (StopIteration, KeyError, IndexError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        return f"checkpoint {folder} cannot be read as one of ZeRO stage {stage}: {type(error).__name__}: {error}"
    save_file(tensors, out)
    counters = {name: model[name] for name in COUNTERS if name in model}
    return {"counters": counters, "schedule": model["lr_scheduler"], "scaler": scaler}


def _parts(folder: Path, stage: int, model: dict[str, Any], order: Sequence[str]) -> tuple[Iterator[Stored], Any]:
    """What each rank's optimiser held, rank by rank, and the state of the loss scaler."""
    if stage == 0:
        return _kept_whole(model, model.get("parameter_order", order)), {}
    paths = sorted(folder.glob("*optim_states.pt"), key=lambda path: int(path.name.split("_pp_rank_")[1].split("_")[0]))
    read = _kept_by_parameter if stage == 3 else _kept_by_row
    scaler = _read(paths[0])["optimizer_state_dict"].get("loss_scaler")
    return read(paths, model), {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}


def _kept_whole(model: dict[str, Any], order: Sequence[str]) -> Iterator[Stored]:
    optimizer = model["optimizer"]
    base = optimizer.get("optimizer_state_dict", optimizer)
    masters = [master for group in optimizer.get("fp32_groups", []) for master in group]
    for number, name in enumerate(order):
        weights = masters[number] if masters else model["module"][name]
        yield {**base["state"].get(number, {}), WEIGHTS: weights}, [Piece(name, 0, weights.numel(), 0)]


def _kept_by_row(paths: Sequence[Path], model: dict[str, Any]) -> Iterator[Stored]:
    """Stages 1 and 2: the ranks' parts of a parameter follow each other."""
    so_far: dict[str, int] = {}
    for path in paths:
        saved = _read(path)["optimizer_state_dict"]
        flats, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
        for number, fragments in enumerate(saved["param_slice_mappings"]):
            pieces = []
            for name, fragment in fragments.items():
                pieces.append(Piece(name, so_far.get(name, 0), fragment.numel, fragment.start))
                so_far[name] = so_far.get(name, 0) + fragment.numel
            yield {**states.get(number, {}), WEIGHTS: flats[number]}, pieces


def _kept_by_parameter(paths: Sequence[Path], model: dict[str, Any]) -> Iterator[Stored]:
    for rank, path in enumerate(paths):
        saved = _read(path)["optimizer_state_dict"]
        states = saved["optimizer_state_dict"]["state"]
        for number, shapes in enumerate(model["param_shapes"]):
            sizes = [prod(shape) for shape in shapes.values()]
            offsets = accumulate((-(-size // len(paths)) for size in sizes), initial=0)
            pieces = [
                Piece(name, *part_of(size, len(paths), rank), offset)
                for name, size, offset in zip(shapes, sizes, offsets, strict=False)
            ]
            yield {**states.get(number, {}), WEIGHTS: saved["fp32_flat_groups"][number]}, pieces


def _read(path: Path) -> dict[str, Any]:
    # The run's own files, checked against their sums; DeepSpeed pickles objects of its own in them.
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return saved


def _whole(stored: Iterator[Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the joined file, tensor): every state of every parameter, flat and whole, or a scalar."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for state, pieces in stored:
        for key, value in state.items():
            for piece in pieces:
                if not torch.is_tensor(value) or value.ndim == 0:
                    if value is not None:
                        parts[f"{SCALAR}/{key}/{piece.name}"] = [(0, torch.as_tensor(value))]
                    continue
                part = value.detach().reshape(-1)[piece.offset : piece.offset + piece.size]
                parts.setdefault(f"{STATE}/{key}/{piece.name}", []).append((piece.start, part))
    for name, pairs in parts.items():
        ordered = [part for _, part in sorted(pairs, key=lambda pair: pair[0])]
        yield name, (ordered[0].clone() if name.startswith(SCALAR) else torch.cat(ordered))


@torch.no_grad()
def _take(engine: Any, path: Path, folder: Path) -> None:
    """Fill this rank's optimiser, and the network from it. Collective."""
    optimizer = engine.basic_optimizer
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    with safe_open(path, framework="pt") as joined:
        known: dict[str, list[tuple[str, str]]] = {}
        for name in joined.keys():  # noqa: SIM118
            kind, *middle = name.split("/")
            if kind != BUFFER:
                known.setdefault(middle[1], []).append((kind, middle[0]))
        for tensor, pieces in held(engine):
            state: dict[str, torch.Tensor] = {}
            for piece in pieces:
                if piece.name not in known:
                    raise UserError(f"checkpoint {folder} lacks {piece.name}; it is of another network")
                for kind, key in known[piece.name]:
                    stored = joined.get_tensor(f"{kind}/{key}/{piece.name}")
                    if kind == SCALAR:
                        state[key] = stored.clone()
                        continue
                    if stored.numel() != sizes[piece.name]:
                        raise UserError(
                            f"checkpoint {folder} has {stored.numel()} entries of {piece.name}, this run's network has "
                            f"{sizes[piece.name]}; it is of another network"
                        )
                    into = state.setdefault(key, torch.zeros_like(tensor, dtype=torch.float32))
                    into.view(-1)[piece.offset : piece.offset + piece.size] = stored[piece.start :][: piece.size].to(
                        into
                    )
            tensor.copy_(state.pop(WEIGHTS, tensor))
            optimizer.state[tensor] = state
        for name, buffer in engine.module.named_buffers():
            if f"{BUFFER}/{name}" in joined.keys():  # noqa: SIM118
                buffer.copy_(joined.get_tensor(f"{BUFFER}/{name}"))
    show_weights(engine)


def _take_rest(engine: Any, rest: dict[str, Any]) -> None:
    for name, value in rest["counters"].items():
        setattr(engine, name, value)
    engine.lr_scheduler.load_state_dict(rest["schedule"])
    for group, lr in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in rest["scaler"].items():
        if hasattr(scaler, name) and engine.fp16_enabled():
            setattr(scaler, name, value)
