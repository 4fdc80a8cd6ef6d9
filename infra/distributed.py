"""Rank and world size from the launcher's environment, and small collectives. torch is imported only by the latter."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.errors import UserError

FIRST_PORT, PORTS = 20000, 10000  # below the ports that the system gives to outgoing connections (32768 on)


def rank() -> int:
    """Return the global rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank on this host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is global rank 0, which prints, logs and moves pointers."""
    return rank() == 0


def accelerator() -> str:
    """Return the device that this process trains on, as DeepSpeed chooses it: "cuda" or "cpu".

    It is that of DS_ACCELERATOR if it is set; otherwise "cuda" if torch sees a GPU. Raises UserError for another value.
    """
    import torch

    chosen = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cuda", "cpu"):
        raise UserError(f"DS_ACCELERATOR={chosen} is not supported; allowed: cuda, cpu, or unset")
    return chosen


def adopt_slurm() -> None:
    """Set torch's environment variables from SLURM's if ``srun`` started this process and no other launcher did."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_environment(os.environ))


def slurm_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of ``srun``.

    The master is the first host of the job step, and its port is derived from the job's number, unless MASTER_ADDR and
    MASTER_PORT are set. Raises UserError, naming the variable, if one is missing or cannot be read.
    """

    def of_step(name: str) -> str:
        # A job step on a part of the job has its own numbers; otherwise the job's are used.
        for candidate in (name.replace("SLURM_", "SLURM_STEP_", 1), *SLURM_OTHER_NAMES.get(name, ()), name):
            if variables.get(candidate):
                return variables[candidate]
        raise UserError(f"{name} is not set although SLURM_PROCID is; start with srun, or set RANK and WORLD_SIZE")

    try:
        tasks = int(of_step("SLURM_NTASKS"))
        node = int(variables.get("SLURM_NODEID") or 0)
        job = int(variables.get("SLURM_JOB_ID") or 0)
        rank, local = int(variables["SLURM_PROCID"]), int(of_step("SLURM_LOCALID"))
    except ValueError as error:
        raise UserError(f"a variable of SLURM is not a number: {error}; start with srun") from None
    environment = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(tasks)}
    if "SLURM_TASKS_PER_NODE" in variables or "SLURM_STEP_TASKS_PER_NODE" in variables:
        environment["LOCAL_WORLD_SIZE"] = str(expand_counts(of_step("SLURM_TASKS_PER_NODE"))[node])
    environment["MASTER_ADDR"] = variables.get("MASTER_ADDR") or expand_hosts(of_step("SLURM_NODELIST"))[0]
    environment["MASTER_PORT"] = variables.get("MASTER_PORT") or str(FIRST_PORT + job % PORTS)
    return environment


def slurm_attempt(variables: Mapping[str, str] = os.environ) -> str:
    """Return which start of which job of SLURM this is: "1234.0", and "1234.1" after a requeue; empty outside SLURM."""
    job = variables.get("SLURM_JOB_ID", "")
    return f"{job}.{variables.get('SLURM_RESTART_COUNT') or 0}" if job else ""


SLURM_OTHER_NAMES = {
    "SLURM_NTASKS": ("SLURM_STEP_NUM_TASKS",),
    "SLURM_NODELIST": ("SLURM_JOB_NODELIST",),
}


def expand_hosts(text: str) -> list[str]:
    """Expand SLURM's short form of a list of hosts: ``a[1-2,09],b`` -> a1, a2, a09, b. Raises UserError if it is wrong."""
    hosts: list[str] = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for part in re.findall(r"\[[^\[\]]*\]|[^\[\]]+", pattern):
            choices = _numbers(part[1:-1]) if part.startswith("[") else [part]
            names = [name + choice for name in names for choice in choices]
        hosts += names
    if not hosts or text.count("[") != text.count("]") or any(not name.strip() for name in hosts):
        raise UserError(f"SLURM_JOB_NODELIST={text!r} cannot be read; it looks like node[01-03,07],gpu5")
    return hosts


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise UserError(f"SLURM_JOB_NODELIST holds [{ranges}], which is not a list of numbers such as [01-03,07]")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """Expand SLURM's short form of tasks per host: ``2(x3),1`` -> 2, 2, 2, 1. Raises UserError if it is wrong."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if not match:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r} cannot be read; it looks like 8(x4),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def address_towards(host: str) -> str:
    """Return the IPv4 address of the interface by which this host reaches another one. Raises OSError if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # of a datagram socket: chooses the interface and sends nothing
        return str(probe.getsockname()[0])


def free_port(address: str = "127.0.0.1") -> int:
    """Return a random TCP port from ``FIRST_PORT`` on that is free on an address, or on all if it is empty.

    Raises UserError if there is none.

    A port that the system chooses could be taken by any outgoing connection before it is used.
    """
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.randrange(FIRST_PORT, FIRST_PORT + PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind((address, port))
            return port
    raise UserError(f"no free TCP port from {FIRST_PORT} to {FIRST_PORT + PORTS} on {address or 'all addresses'}; "
                    "end what listens there")  # fmt: skip


def single_process_environment() -> dict[str, str]:
    """Return the variables that torch.distributed needs; those that no launcher set are those of a single rank."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    values["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    if is_loopback(values["MASTER_ADDR"]) and "GLOO_SOCKET_IFNAME" not in os.environ:
        values |= loopback_of_gloo()
    return values


def is_loopback(address: str) -> bool:
    """Return whether an address or a host name is that of the loopback interface, which other hosts do not reach."""
    return address == "localhost" or address.startswith("127.")


def loopback_of_gloo() -> dict[str, str]:
    """Return the variable that lets gloo listen on the loopback interface; none where its name is not ``lo``."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}


def broadcast(value: Any) -> Any:
    """Return rank 0's ``value``, which must be picklable, on every rank. Collective."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def reduce_scalars(values: list[float], operation: str = "sum") -> list[float]:
    """Reduce a few numbers in float64 over all ranks by ``sum``, ``max`` or ``min``, in one collective."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    operations: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(tensor, op=operations[operation])
    return [float(value) for value in tensor.tolist()]
