"""``LAUNCHERS``: the ways to start the ranks of a job. One entry says how a command line is built and a job is stopped."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.distributed import free_port
from infra.errors import UserError
from pretrain.launch.processes import stop_local_ranks, stop_over_pdsh

# Characters that a shell on another host would interpret: pdsh passes the command line on as text.
SHELL = set("{}[]()*?$&|;<>~`'\"\\ \t")
SBATCH = Path("infra/launch/pretrain.sbatch")
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
# The part of DeepSpeed's launcher that starts the ranks of one host. The `deepspeed` command would start it after three
# seconds of imports, and would replace CUDA_VISIBLE_DEVICES by the first GPUs of the machine.
LOCAL_RANKS = (sys.executable, "-u", "-m", "pretrain.engine.local_ranks")


@dataclass(frozen=True)
class Job:
    """What is to be started: a recipe on hosts.

    Attributes:
        recipe: what follows ``--config``: the recipe's name or path, then its overrides.
        hosts: ranks of each host, by name; the first host is the master.
        hostfile: the file that names the hosts, for the launchers that read one.
        node_rank: number of this host among ``hosts``, for a launcher that starts only this host.
        master_addr: address of the first host; None takes its name.
        master_port: port of the first host; None takes a free port of this host.
    """

    recipe: Sequence[str]
    hosts: dict[str, int]
    hostfile: Path | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True)
class Launcher:
    """One way to start the ranks.

    Attributes:
        command: the command line for a job; raises UserError if the job cannot be started in this way.
        stop: ask a running job to save a checkpoint and end, given the started process.
        examples: lines that ``yaware plan`` prints for (hosts, ranks per host, recipe and overrides).
        gives_environment: whether this host's environment reaches ranks on other hosts, which may have other devices.
    """

    command: Callable[[Job], list[str]]
    stop: Callable[[subprocess.Popen[bytes]], None] = stop_local_ranks
    examples: Callable[[int, int, str], list[str]] = lambda hosts, ranks, recipe: []
    gives_environment: bool = False


def one_host(job: Job) -> list[str]:
    """Return the command that starts all ranks on this host. Raises UserError unless the job has exactly one host."""
    if len(job.hosts) != 1:
        raise UserError(
            f"--launcher=one-host starts one host, but {job.hostfile} names {len(job.hosts)}: {', '.join(job.hosts)}; "
            "use pdsh, node or slurm"
        )
    (ranks,) = job.hosts.values()
    return [
        *LOCAL_RANKS, f"--world_info={_encoded({'localhost': _devices(ranks)})}", "--master_addr=127.0.0.1",
        f"--master_port={job.master_port or free_port()}", "--log_level=error", *_training(job),
    ]  # fmt: skip


def _encoded(devices: dict[str, list[int | str]]) -> str:
    """Return the devices of each host as DeepSpeed's launcher reads them."""
    return base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()


def _devices(ranks: int) -> list[int | str]:
    """Return the GPU of each rank: the first of those that CUDA_VISIBLE_DEVICES names, if it is set."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if len(named) < ranks:
        return list(range(ranks))
    return [int(name) if name.isdigit() else name for name in named[:ranks]]


def over_pdsh(job: Job) -> list[str]:
    """Return the command that starts all hosts of the hostfile from this one, over pdsh and ssh.

    Raises UserError if a word of ``job.recipe`` has a character that the shells of the other hosts would interpret.
    """
    for word in job.recipe:
        if SHELL & set(word):
            raise UserError(
                f"the shells of the other hosts would split or expand {word!r}; write it into a recipe file and give its path"
            )
    return [*DEEPSPEED, "--hostfile", str(job.hostfile), *_master(job), *_training(job)]


def this_host(job: Job) -> list[str]:
    """Return the command that starts this host alone; the same is done on each other host.

    Raises UserError if ``job.node_rank`` is missing or not the number of a host.
    """
    if job.node_rank is None or not 0 <= job.node_rank < len(job.hosts):
        raise UserError(
            f"--node_rank={job.node_rank} is not a host of {job.hostfile}, which has {len(job.hosts)}: "
            f"0 to {len(job.hosts) - 1}"
        )
    ids: dict[str, list[int | str]] = {host: list(range(ranks)) for host, ranks in job.hosts.items()}
    own = list(job.hosts)[job.node_rank]
    ids[own] = _devices(job.hosts[own])
    return [
        *LOCAL_RANKS, f"--world_info={_encoded(ids)}", "--node_rank", str(job.node_rank), *_master(job), "--log_level=error",
        *_training(job),
    ]  # fmt: skip


def slurm(job: Job) -> list[str]:
    """Return the command that submits the job to SLURM, which chooses the hosts.

    Raises UserError outside the checkout, or if the hosts have different numbers of ranks.
    """
    if not SBATCH.is_file():
        raise UserError(f"{SBATCH} is not here; submit from the checkout, which all hosts must see under the same path")
    counts = set(job.hosts.values())
    if len(counts) > 1:
        raise UserError(
            f"{job.hostfile} gives its hosts {sorted(counts)} slots; SLURM takes the same number on each; give all hosts the "
            "same slots"
        )
    return _sbatch(len(job.hosts), counts.pop(), job.recipe)


def _sbatch(hosts: int, ranks: int, recipe: Sequence[str]) -> list[str]:
    counts = [f"--nodes={hosts}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}"]
    return ["sbatch", *counts, str(SBATCH), *recipe]


def _master(job: Job) -> list[str]:
    address = job.master_addr or next(iter(job.hosts))
    return ["--master_addr", address, "--master_port", str(job.master_port or free_port())]


def _training(job: Job) -> list[str]:
    return ["--module", "pretrain.train", "--config", *job.recipe]


def _examples_one_host(hosts: int, ranks: int, recipe: str) -> list[str]:
    if hosts > 1:
        return []
    return [
        f"yaware pretrain --config {recipe} --launch.ranks={ranks}",
        f"deepspeed --num_accelerators {ranks} --module pretrain.train --config {recipe}",
    ]


def _examples_pdsh(hosts: int, ranks: int, recipe: str) -> list[str]:
    if hosts == 1:
        return []
    return [f"yaware launch --hostfile HOSTS --config {recipe}     # HOSTS: {hosts} lines `name slots={ranks}`"]


def _examples_slurm(hosts: int, ranks: int, recipe: str) -> list[str]:
    return [] if hosts == 1 else [shlex.join(_sbatch(hosts, ranks, [])) + f" {recipe}"]


LAUNCHERS: dict[str, Launcher] = {
    "one-host": Launcher(one_host, examples=_examples_one_host),
    "pdsh": Launcher(over_pdsh, stop_over_pdsh, _examples_pdsh),
    "node": Launcher(this_host),
    "slurm": Launcher(slurm, examples=_examples_slurm, gives_environment=True),
}
