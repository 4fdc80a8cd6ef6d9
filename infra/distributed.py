"""Who am I among the ranks: read from the launcher's environment, with no import of torch until a group is needed."""

from __future__ import annotations

import os
import socket
from typing import Any


def rank() -> int:
    """Global rank, 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this host, 0 outside a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks, 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on global rank 0, the one that prints, logs and moves pointers."""
    return rank() == 0


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def single_process_environment() -> dict[str, str]:
    """What torch.distributed needs to make a group of one, where no launcher set it."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    values["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's ``value`` (whatever pickles) on every rank. Collective."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def reduce_scalars(values: list[float], operation: str = "sum") -> list[float]:
    """Reduce a few float64 figures over all ranks (``sum``, ``max`` or ``min``); one collective."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    operations: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(tensor, op=operations[operation])
    return [float(value) for value in tensor.tolist()]
