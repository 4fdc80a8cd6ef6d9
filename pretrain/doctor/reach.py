"""Reach the nodes as the launchers do: over pdsh and ssh (the hostfile), or by ``srun``; collect what they answer."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import read_text
from infra.processes.with_parent import command_with_parent
from pretrain.doctor.checks import look_at_all
from pretrain.doctor.node import encoded, read_lines
from pretrain.doctor.row import FAIL, Request, Row

# Variables that DeepSpeed's launcher passes to the hosts, by their beginning; beside them those of its file.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
VARIABLES_FILE = ".deepspeed_env"
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


def ask_over_ssh(request: Request) -> tuple[Answers, list[Row]]:
    """Return what the hosts of the request answer, and a row for each that does not.

    Raises UserError if neither pdsh nor ssh is installed here.
    """
    words = [f"{name}={value}" for name, value in carried_variables(os.environ).items()]
    program = shlex.join(["env", *words, sys.executable, *NODE_PROGRAM, encoded(request)])
    there = f"cd {shlex.quote(str(Path.cwd()))} && {program} "
    own_options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    hosts = list(request.hosts)
    if shutil.which("pdsh"):
        commands = {"": ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", ",".join(hosts), there + "%h"]}
    elif shutil.which("ssh"):
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", *own_options]
        commands = {host: ["ssh", *options, host, there + shlex.quote(host)] for host in hosts}
    else:
        raise UserError("neither pdsh nor ssh is installed here; install pdsh, or start `yaware doctor` on every host")
    return _collect(commands, request, hosts)


def ask_over_slurm(
    request: Request, nodes: int | None, partition: str | None, variables: Mapping[str, str]
) -> tuple[Answers, list[Row]]:
    """Return what the nodes of a job step answer: of the allocation that this process is in, or of a new one.

    Raises UserError if there is no ``srun``, or if a number of nodes is neither given nor known.
    """
    if shutil.which("srun") is None:
        raise UserError("srun is not installed here; run this on a login node of the SLURM cluster, or give --hostfile")
    inside = "SLURM_JOB_ID" in variables
    count = nodes or int(variables.get("SLURM_JOB_NUM_NODES") or variables.get("SLURM_NNODES") or 0)
    if not count:
        raise UserError("--slurm outside an allocation needs --nodes N (and perhaps --partition P)")
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--label"]
    command += ["--overlap"] if inside else [] if partition is None else [f"--partition={partition}"]
    command += [sys.executable, *NODE_PROGRAM, encoded(request)]
    # Counts of the surrounding job, which are not those of this step.
    kept = {name: value for name, value in variables.items() if not name.startswith(("SLURM_NTASKS", "SLURM_TASKS_PER_NODE",
            "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_TASK"))}  # fmt: skip
    answers, rows = _collect({"": command}, request, [], kept)
    if not answers:
        return {}, rows or [Row(REACH, FAIL, "srun printed no answer", "try `srun --nodes=1 hostname`")]
    if len(answers) < count:
        rows.append(
            Row(REACH, FAIL, f"{len(answers)} of {count} nodes answered: {', '.join(answers)}", "see the lines above")
        )
    return answers, rows


def _collect(
    commands: Mapping[str, Sequence[str]], request: Request, hosts: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[Answers, list[Row]]:  # fmt: skip
    """Run the commands at the same time; return the nodes' answers, and a row for each host without one."""
    told: dict[str, tuple[str, str]] = {}

    def run(name: str, command: Sequence[str]) -> None:
        told[name] = _output(command, request.seconds + PATIENCE, variables)

    threads = [threading.Thread(target=run, args=entry, daemon=True) for entry in commands.items()]
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


def _output(command: Sequence[str], seconds: float, variables: Mapping[str, str] | None) -> tuple[str, str]:
    with subprocess.Popen(
        command_with_parent(list(command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=None if variables is None else dict(variables),
    ) as process:  # fmt: skip
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate()
            return out, f"{err}\nno answer within {seconds:.0f} s"


def _unreached(host: str, errors: Mapping[str, str]) -> Row:
    """Return the row of a host that gave no answer, with the last thing that was said about it."""
    every = errors.get(host, errors.get("", "")).splitlines()
    # pdsh puts the host before what was said there; its own lines are less telling.
    said = [line.partition(":")[2] for line in every if line.startswith(f"{host}:")] or every
    text = next((line.strip() for line in reversed(said) if line.strip()), "no answer")
    return Row(
        REACH, FAIL, text, f"log in without a password: `ssh {host}`; the same folder and .venv must be there", host
    )
