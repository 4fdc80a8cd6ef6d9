"""Reach the nodes as the launchers do: over pdsh and ssh (the hostfile), or by ``srun``; collect what they answer."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import read_text
from infra.tracking.faults import hide_password
from pretrain.doctor.checks import look_at_all
from pretrain.doctor.node import STARTED, encoded, read_lines
from pretrain.doctor.output import NodeCommand, output_of
from pretrain.doctor.row import FAIL, Request, Row

# Variables that DeepSpeed's launcher passes to the hosts, by their beginning; beside them those of its file.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
VARIABLES_FILE = ".deepspeed_env"
# Names of variables whose values other users of a host must not see, in `ps` for example.
SECRET = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|KEY", re.IGNORECASE)
REACH = "reach"
# Beyond the time that the nodes wait for each other: to log in, to import, to read shards.
PATIENCE = 100.0
NODE_PROGRAM = ("-m", "pretrain.doctor.node")

Answers = dict[str, dict[str, Any]]


def ask_here(request: Request) -> tuple[Answers, list[Row]]:
    """Return what this machine answers."""
    own = socket.gethostname()
    return {own: look_at_all(request, own, [own])}, []


def carried_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that DeepSpeed's launcher would set on the hosts: of this process, and of ``.deepspeed_env``."""
    carried = {name: value for name, value in variables.items() if name.startswith(EXPORTED)}
    for folder in (Path.home(), Path()):
        file = folder / variables.get("DS_ENV_FILE", VARIABLES_FILE)
        for line in read_text(file).splitlines() if file.is_file() else []:
            name, equals, value = line.partition("=")
            if equals:
                carried[name.strip()] = value.strip()
    return carried


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable holds a password or a key, to judge by its name, or an address with a password."""
    return bool(SECRET.search(name)) or hide_password(value) != value


def ask_over_ssh(request: Request) -> tuple[Answers, list[Row]]:
    """Return what the hosts of the request answer, and a row for each that does not.

    Secrets among the carried variables go through the standard input of ssh, one process a host; pdsh has no input to pass on.
    Raises UserError if neither pdsh nor ssh is installed here.
    """
    carried = carried_variables(os.environ)
    secrets = {name: value for name, value in carried.items() if is_secret(name, value)}
    words = [f"{name}={value}" for name, value in carried.items() if name not in secrets]
    program = shlex.join(["env", *words, sys.executable, *NODE_PROGRAM, encoded(request)])
    there = f"cd {shlex.quote(str(Path.cwd()))} && {program} "
    own_options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    hosts = list(request.hosts)
    if shutil.which("pdsh") and not secrets:
        commands = {"": NodeCommand(["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", ",".join(hosts), there + "%h"])}
    elif shutil.which("ssh"):
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", *own_options]
        end = " -" if secrets else ""
        commands = {
            host: NodeCommand(["ssh", *options, host, there + shlex.quote(host) + end], secrets) for host in hosts
        }
    else:
        raise UserError("neither pdsh nor ssh is installed here; install pdsh, or start `yaware doctor` on every host")
    return _collect({name: (command, None) for name, command in commands.items()}, request, hosts)


@dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM.

    Attributes:
        nodes: number of nodes; None takes that of the allocation that this process is in.
        options: further options of ``srun`` for a new allocation, by name; an empty value is an option without a value.
        gpus: GPUs of each node; 0 leaves them to ``options`` and to the allocation.
        wait: most seconds in the queue; None waits without limit.
    """

    nodes: int | None
    options: Mapping[str, str]
    gpus: int = 0
    wait: float | None = None


def gpus_of_allocation(variables: Mapping[str, str]) -> int | None:
    """Return the GPUs on a node of the allocation that this process is in; None if SLURM does not tell them."""
    text = variables.get("SLURM_GPUS_ON_NODE", "")
    return int(text) if re.fullmatch(r"\d{1,4}", text, re.ASCII) else None


def ask_over_slurm(
    request: Request, asked: Allocation, variables: Mapping[str, str]
) -> tuple[Answers, list[Row]]:  # fmt: skip
    """Return what the nodes of a job step answer: of the allocation that this process is in, or of a new one.

    Raises UserError if there is no ``srun``, if a number of nodes is neither given nor known, or if options of a new allocation
    are given inside of one.
    """
    if shutil.which("srun") is None:
        raise UserError("srun is not installed here; run this on a login node of the SLURM cluster, or give --hostfile")
    inside = "SLURM_JOB_ID" in variables
    count = asked.nodes or int(variables.get("SLURM_JOB_NUM_NODES") or variables.get("SLURM_NNODES") or 0)
    if not count:
        raise UserError("--slurm outside an allocation needs --nodes N (and perhaps --partition P)")
    if inside and asked.options:
        raise UserError(f"--{next(iter(asked.options))} is for a new allocation, and this process is in job "
                        f"{variables['SLURM_JOB_ID']}; leave it out, or call this outside the job")  # fmt: skip
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--label"]
    command += (
        ["--overlap"]
        if inside
        else [f"--{key}={value}" if value else f"--{key}" for key, value in asked.options.items()]
    )
    command += [f"--gpus-per-node={asked.gpus}"] if asked.gpus else []
    command += [sys.executable, *NODE_PROGRAM, encoded(request)]
    if not inside:
        limit = "no limit; --wait SECONDS sets one" if asked.wait is None else f"at most {asked.wait:g} s"
        print(f"doctor: waiting for {count} nodes of SLURM ({limit}, Ctrl-C ends it)", file=sys.stderr, flush=True)
    # Counts of the surrounding job, which are not those of this step.
    kept = {name: value for name, value in variables.items() if not name.startswith(("SLURM_NTASKS", "SLURM_TASKS_PER_NODE",
            "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_TASK"))}  # fmt: skip
    wait = float("inf") if asked.wait is None else asked.wait
    answers, rows = _collect({"": (NodeCommand(command, {}, kept), None if inside else wait)}, request, [])
    if not answers:
        return {}, rows or [Row(REACH, FAIL, "srun printed no answer", "try `srun --nodes=1 hostname`")]
    if len(answers) < count:
        rows.append(
            Row(REACH, FAIL, f"{len(answers)} of {count} nodes answered: {', '.join(answers)}", "see the lines above")
        )
    return answers, rows


def _collect(
    commands: Mapping[str, tuple[NodeCommand, float | None]], request: Request, hosts: Sequence[str]
) -> tuple[Answers, list[Row]]:  # fmt: skip
    """Run the commands at the same time; return the nodes' answers, and a row for each host without one.

    Args:
        commands: each command, and the most seconds in a queue before its nodes start; None if there is no queue.
        request: what the nodes are asked.
        hosts: the hosts that must answer; empty if SLURM chooses them.
    """
    told: dict[str, tuple[str, str]] = {}

    def run(name: str, command: NodeCommand, wait: float | None) -> None:
        started = None if wait is None else has_started
        told[name] = output_of(command, request.seconds + PATIENCE, has_started=started, wait=wait)

    threads = [threading.Thread(target=run, args=(name, *entry), daemon=True) for name, entry in commands.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers: Answers = {}
    for out, _ in told.values():
        answers |= read_lines(out)
    errors = {name: err for name, (_, err) in told.items()}
    rows = [_unreached(host, errors) for host in hosts if host not in answers]
    if not hosts and not answers:
        rows = [Row(REACH, FAIL, " ".join(errors[""].split())[-300:] or "no answer", "see SLURM's own message")]
    return {host: answers[host] for host in (hosts or sorted(answers)) if host in answers}, rows


def has_started(line: str) -> bool:
    """Return whether a line of srun says that the nodes have started, or that SLURM has given them."""
    return STARTED in line or "has been allocated resources" in line


def _unreached(host: str, errors: Mapping[str, str]) -> Row:
    """Return the row of a host that gave no answer, with the last thing that was said about it."""
    every = errors.get(host, errors.get("", "")).splitlines()
    # pdsh puts the host before what was said there; its own lines are less telling.
    said = [line.partition(":")[2] for line in every if line.startswith(f"{host}:")] or every
    text = next((line.strip() for line in reversed(said) if line.strip()), "no answer")
    return Row(
        REACH, FAIL, text, f"log in without a password: `ssh {host}`; the same folder and .venv must be there", host
    )
