"""Who am I among the ranks: read from the launcher's environment, with no import of torch until a group is needed."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from infra.errors import UserError

FIRST_PORT, PORTS = 20000, 10000  # below the ports that the system gives to outgoing connections (32768 on)


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


def adopt_slurm() -> None:
    """Where ``srun`` started this process and no launcher of torch's kind did, make its variables those of torch."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update(slurm_environment(os.environ))


def slurm_environment(given: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that ``srun`` started.

    The master is the first host of the step, its port follows from the job's number; MASTER_ADDR and MASTER_PORT that
    are already set win. UserError names the variable that is missing or cannot be read.
    """

    def of_step(name: str) -> str:
        # The step's figures, where srun was asked for a part of the job; the job's otherwise.
        for candidate in (name.replace("SLURM_", "SLURM_STEP_", 1), *SLURM_OTHER_NAMES.get(name, ()), name):
            if given.get(candidate):
                return given[candidate]
        raise UserError(f"{name} is not set although SLURM_PROCID is; start with srun, or set RANK and WORLD_SIZE")

    try:
        tasks = int(of_step("SLURM_NTASKS"))
        node = int(given.get("SLURM_NODEID") or 0)
        job = int(given.get("SLURM_JOB_ID") or 0)
        rank, local = int(given["SLURM_PROCID"]), int(of_step("SLURM_LOCALID"))
    except ValueError as error:
        raise UserError(f"a variable of SLURM is no number: {error}; start with srun") from None
    environment = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(tasks)}
    if "SLURM_TASKS_PER_NODE" in given or "SLURM_STEP_TASKS_PER_NODE" in given:
        environment["LOCAL_WORLD_SIZE"] = str(expand_counts(of_step("SLURM_TASKS_PER_NODE"))[node])
    environment["MASTER_ADDR"] = given.get("MASTER_ADDR") or expand_hosts(of_step("SLURM_NODELIST"))[0]
    environment["MASTER_PORT"] = given.get("MASTER_PORT") or str(FIRST_PORT + job % PORTS)
    return environment


SLURM_OTHER_NAMES = {
    "SLURM_NTASKS": ("SLURM_STEP_NUM_TASKS",),
    "SLURM_NODELIST": ("SLURM_JOB_NODELIST",),
}


def expand_hosts(text: str) -> list[str]:
    """SLURM's short form of a list of hosts, in order: ``a[1-2,09],b`` -> a1, a2, a09, b."""
    hosts: list[str] = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for part in re.findall(r"\[[^\[\]]*\]|[^\[\]]+", pattern):
            choices = _numbers(part[1:-1]) if part.startswith("[") else [part]
            names = [name + choice for name in names for choice in choices]
        hosts += names
    if not hosts or text.count("[") != text.count("]") or any(not name.strip() for name in hosts):
        raise UserError(f"SLURM_JOB_NODELIST={text!r} cannot be read; give hosts as in node[01-03,07],gpu5")
    return hosts


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise UserError(f"SLURM_JOB_NODELIST holds [{ranges}], which is no list of numbers such as [01-03,07]")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """SLURM's short form of tasks per host: ``2(x3),1`` -> 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r} cannot be read; it looks like 8(x4),2")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago, at random from ``FIRST_PORT`` on.

    One of the system's own choice may be taken, before it is used, by any connection that any process opens.
    """
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.randrange(FIRST_PORT, FIRST_PORT + PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise UserError(f"no free TCP port from {FIRST_PORT} to {FIRST_PORT + PORTS} on loopback; end what listens there")


def single_process_environment() -> dict[str, str]:
    """What torch.distributed needs to make a group of one, where no launcher set it."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    values["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    return values


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Restore ``os.environ`` at the end of the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


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
