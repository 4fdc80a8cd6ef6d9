"""Run a command of ``yaware`` on Ray, on all nodes of a batch job of SLURM: ``python -m infra.slurm.ray_job COMMAND ...``.

The batch scripts ``prepare.sbatch``, ``build-shards.sbatch`` and ``evaluate.sbatch`` end with this. It starts two job steps:
Ray's head with the command on the first node, and a Ray worker on each other node (``infra.slurm.ray_node``). SLURM signals
the steps, not this process. When the command has ended, this process decides whether the job goes back into the queue: the
command continues where it stopped.

It needs nothing but Python itself, so that a Python of the host can run it (``YAWARE_HOST_PYTHON``) where the project's own is
in an image (``YAWARE_PYTHON``), which has no srun.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from infra.distributed import FIRST_PORT, PORTS, address_towards, expand_hosts, slurm_attempt
from infra.errors import UserError
from infra.ray_cluster import EXPECTED_NODES
from infra.slurm.requeue import AGAIN, check_job, is_preempted, queue_again, requeue_record, show_job

LOOK_SECONDS, END_SECONDS = 0.2, 30.0
STOPS = {128 + number: number.name for number in (signal.SIGUSR1, signal.SIGTERM)}


def head_address(hosts: list[str], here: str, job: int) -> str:
    """Return the address of Ray's head: that by which this node reaches the others, and a port derived from the job's number.

    Args:
        hosts: nodes of the job.
        here: this node.
        job: number of the job.

    Raises:
        UserError: if another node's name is unknown, or no port is free.
    """
    host = "127.0.0.1"
    others = [name for name in hosts if name != here]
    if others:
        try:
            host = address_towards(others[0])
        except OSError as error:
            raise UserError(f"node {others[0]} of the job cannot be reached from {here}: {error}") from None
    for offset in range(PORTS):
        port = FIRST_PORT + (job + offset) % PORTS
        with socket.socket() as listener, suppress(OSError):
            listener.bind((host, port))
            return f"{host}:{port}"
    raise UserError(f"no free TCP port from {FIRST_PORT} to {FIRST_PORT + PORTS} on {here}; end what listens there")


def why_unfinished(status: int, job: Mapping[str, str], lost_node: bool) -> tuple[bool, str]:
    """Return whether a command that failed should continue by itself, and why it ended.

    Args:
        status: exit status of the job step of the head, not 0.
        job: fields of ``scontrol show job``.
        lost_node: whether a worker node was lost.
    """
    if status in STOPS:
        return True, f"stopped by {STOPS[status]}"
    if is_preempted(job):
        return True, "preempted"
    if status >= 128:
        return True, f"killed by signal {status - 128} (out of memory, perhaps)"
    if status == AGAIN:
        return True, "Ray has failed"
    if lost_node and status == 1:
        return True, "failed after the loss of a worker node"
    return False, f"ended with status {status}"


def end_job(status: int, lost_node: bool, record: Path, variables: Mapping[str, str]) -> int:
    """Queue the job again if its command is to continue; say so in one line. Return the exit status of the job.

    Args:
        status: exit status of the job step of the head.
        lost_node: whether a worker node was lost.
        record: file that records the requeues; removed once the command has succeeded.
        variables: environment of the batch script.
    """
    if status == 0:
        record.unlink(missing_ok=True)
        return 0
    job, error = show_job(variables["SLURM_JOB_ID"])
    if error:
        _say(f"the job is not queued again: {error}")
    if job.get("JobState") != "RUNNING":
        return status  # cancelled, or SLURM itself queues it again
    again, reason = why_unfinished(status, job, lost_node)
    if not again:
        _say(f"{reason}; job {variables['SLURM_JOB_ID']} is not queued again")
        return status
    # How far the command is cannot be told, so failures in a row count as without progress, and stops by SLURM do not.
    failed = status not in STOPS and not is_preempted(job)
    queue_again(record, "failed" if failed else slurm_attempt(variables), reason, variables, _say)
    return AGAIN


def node_python(variables: Mapping[str, str]) -> str:
    """Return the Python of Ray's nodes and of the command: this one, or the project's beside a Python of the host."""
    if not variables.get("YAWARE_HOST_PYTHON"):
        return sys.executable
    return variables.get("YAWARE_PYTHON") or ".venv/bin/python"


def run(words: list[str], variables: Mapping[str, str]) -> tuple[int, bool]:
    """Run a command of ``yaware`` on Ray in this job; return the head's exit status, and whether a worker node was lost."""
    hosts, here = expand_hosts(variables["SLURM_JOB_NODELIST"]), variables["SLURMD_NODENAME"]
    address = head_address(hosts, here, int(variables["SLURM_JOB_ID"]))
    # One task a node with all CPUs of the job there, whatever the job's --ntasks-per-node and --cpus-per-task are.
    dropped = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "RAY_ADDRESS")
    environment = {name: value for name, value in variables.items() if name not in dropped}
    python = node_python(variables)
    environment |= {EXPECTED_NODES: str(len(hosts)), "PYTHONUNBUFFERED": "1",
                    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # fmt: skip

    def step(nodes: int, where: str, role: list[str]) -> subprocess.Popen[bytes]:
        """Start a job step with one task on each of some nodes. It survives the loss of a node or of a task."""
        options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", where, "--cpu-bind=none", "--gpu-bind=none",
                   "--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL"]  # fmt: skip
        command = ["srun", *options, python, "-m", "infra.slurm.ray_node", *role]
        try:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise UserError(
                f"srun is not found on {here}; put SLURM's commands on PATH. An Apptainer image has none: set "
                "YAWARE_HOST_PYTHON=/usr/bin/python3, or another Python of the host, 3.10 or newer"
            ) from None

    command = [python, "-m", "infra.cli", *words]
    head = step(1, f"--nodelist={here}", ["head", address, *command])
    workers = step(len(hosts) - 1, f"--exclude={here}", ["worker", address, here]) if len(hosts) > 1 else None
    told = False
    while head.poll() is None:
        time.sleep(LOOK_SECONDS)
        if workers and workers.poll() and not told:  # their status is 0 if a signal stops the whole job
            told = True
            _say("the job step of the Ray workers has ended; the command goes on without them")
    status = head.returncode if head.returncode >= 0 else 128 - head.returncode
    return status, bool(workers and not _end_well(workers))


def _end_well(workers: subprocess.Popen[bytes]) -> bool:
    """Wait for the job step of the workers, which end with the head; return whether all did. End it if they do not."""
    try:
        return workers.wait(END_SECONDS) == 0
    except subprocess.TimeoutExpired:
        workers.terminate()  # srun waits longer for a node that was lost, and its status may be 0
    try:
        workers.wait(END_SECONDS / 2)
    except subprocess.TimeoutExpired:
        workers.kill()
        workers.wait()
    return False


def _say(text: str) -> None:
    print(f"job: {text}", flush=True)


def main(words: list[str]) -> int:
    """Run a command of ``yaware`` on the nodes of this job; return the exit status of the job, 2 for wrong input."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # The steps get these signals too, and end. A handler, unlike SIG_IGN, is not inherited by srun.
        signal.signal(number, lambda *_: None)
    try:
        check_job(os.environ)
        for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"):
            if name not in os.environ:
                raise UserError(f"{name} is not set; start this with sbatch, see infra/launch/README.md")
        status, lost_node = run(words, os.environ)
        return end_job(status, lost_node, requeue_record(os.environ), os.environ)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
