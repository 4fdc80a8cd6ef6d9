"""One node of a Ray cluster inside a job of SLURM; ``infra.slurm.ray_job`` starts it on each node with srun.

``python -m infra.slurm.ray_node head ADDRESS COMMAND ...`` starts Ray's head, runs the command on the cluster, and ends both.
``python -m infra.slurm.ray_node worker ADDRESS NODE`` joins the head, which runs on NODE, until the head ends.

Jobs of several users may share a node. Therefore all ports but that of ADDRESS are chosen by the system, the cluster requires
the job's own token (``RAY_AUTH_TOKEN``), and Ray's files lie in a temporary folder of this process. ``ray symmetric-run`` is
not used: it refuses a node on which another Ray runs, and ends with ``ray stop``, which stops the user's other clusters too.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from infra.distributed import expand_hosts, free_port, is_loopback, slurm_attempt
from infra.errors import UserError
from infra.files import read_text, short_temporary_folder
from infra.processes.allowance import total_memory, usable_cores
from infra.processes.guard import end_all
from infra.processes.scratch import scratch_folder
from infra.processes.with_parent import command_with_parent
from infra.ray_cluster import ON_LOOPBACK, PRIORITY, QUIET
from infra.slurm.requeue import AGAIN, queue_again, requeue_record, show_job

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # SLURM's before a time limit, at a preemption, and Ctrl-C
LOOK_SECONDS, GRACE_SECONDS = 0.2, 10.0
START_SECONDS = 300.0  # on a busy file system, importing Ray on many nodes takes minutes
STARTS = 4  # of Ray on one node
# Ray's minimum is 75 MiB. Objects are few and small: tasks write their results to files.
LEAST_STORE, MOST_STORE, SHARE_OF_MEMORY = 80 * 2**20, 4 * 2**30, 0.1
# Letters of a path in which the temporary folder is made; Ray's sockets in that need about 65 of 107.
SHORT_PARENT = 26


class Stop:
    """The signal that asked this process to end; 0 if none has."""

    number = 0

    def __call__(self, number: int, _: object) -> None:
        """Handle a signal: remember it."""
        self.number = self.number or number


def object_store_bytes(memory: int, shared_memory: int) -> int:
    """Return the size of Ray's object store on a node.

    Args:
        memory: bytes that the job may use on the node.
        shared_memory: free bytes of /dev/shm, which other jobs use too.
    """
    return max(LEAST_STORE, min(int(memory * SHARE_OF_MEMORY), shared_memory // 2, MOST_STORE))


def memory_of_job() -> int:
    """Return the bytes that the job may use on this node; all of the node's if SLURM does not limit them."""
    megabytes = int(os.environ.get("SLURM_MEM_PER_NODE") or 0)
    megabytes = megabytes or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * _cpus()
    return megabytes * 2**20 or total_memory()


def _cpus() -> int:
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or usable_cores())


def start_arguments(role: str, address: str, folder: Path) -> list[str]:
    """Return the arguments of ``ray start`` for this node.

    Args:
        role: ``head`` or ``worker``.
        address: ``host:port`` of the head.
        folder: for Ray's files and sockets.
    """
    host, _, port = address.rpartition(":")
    shared = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    store = object_store_bytes(memory_of_job(), shared.f_bavail * shared.f_frsize if shared else 0)
    own = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    if role == "head" and importlib.util.find_spec("grpc"):  # else Ray has no server for Ray Client
        own.append(f"--ray-client-server-port={free_port('')}")
    return [
        "--block", *(own if role == "head" else [f"--address={address}"]), f"--num-cpus={_cpus()}", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--object-store-memory={store}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip


@contextmanager
def _ray(role: str, address: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start Ray on this node; yield its process and its log. Afterwards all its processes have ended."""
    with scratch_folder("ray", parent=short_temporary_folder("TMPDIR", SHORT_PARENT)) as folder:
        log = folder / "start.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *start_arguments(role, address, folder)]
        with log.open("wb") as stream:
            started = subprocess.Popen(
                command_with_parent(command), env=_environment(address), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )  # fmt: skip
        try:
            yield started, log
        finally:
            _end_all(started)


def _environment(address: str) -> dict[str, str]:
    """Return the environment of Ray and of the command."""
    own = {**QUIET, **(ON_LOOPBACK if is_loopback(address) else {})}
    return {**PRIORITY, **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, **own}


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started: first by SIGTERM, after GRACE_SECONDS by SIGKILL."""
    try:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_all(family, 1.0)


def _connect(address: str) -> OSError | None:
    """Return the error of a connection to the head; None if it answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return error
    return None


def _wait_for_head(address: str, ended: Callable[[], bool]) -> bool:
    """Wait until the head listens on its port; return False if it does not, or if ``ended`` returns True before."""
    limit = time.monotonic() + START_SECONDS
    while _connect(address):
        if ended() or time.monotonic() > limit:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def run_head(address: str, command: Sequence[str], stop: Stop) -> int:
    """Start Ray's head and run a command that finds the cluster in ``RAY_ADDRESS``. Return the exit status of the job step.

    The status is that of the command; 128 + N if this process got the signal N; AGAIN if Ray could not start or has ended.
    """
    with _ray("head", address) as (ray, log):
        if not _wait_for_head(address, lambda: bool(stop.number) or ray.poll() is not None):
            if not stop.number:
                _say(f"the head did not start on {address}: {_end_of(log)}")
            return 128 + stop.number if stop.number else AGAIN
        running = subprocess.Popen(command_with_parent(command), env={**_environment(address), "RAY_ADDRESS": address})
        try:
            while running.poll() is None and ray.poll() is None and not stop.number:
                time.sleep(LOOK_SECONDS)
        finally:
            _end_all(running)
        if stop.number:
            return 128 + stop.number
        if ray.poll() is not None and running.returncode != 0:
            _say(f"the head has ended with status {ray.returncode}: {_end_of(log)}")
            return AGAIN
        return running.returncode if running.returncode >= 0 else 128 - running.returncode


def run_worker(address: str, head: str, stop: Stop) -> int:
    """Join the head until it ends; start Ray again if only this node's ends. Return the exit status: AGAIN if it failed.

    If the head's node is lost, the job is queued again: its batch script was there.
    """
    for _ in range(STARTS):
        if not _wait_for_head(address, lambda: bool(stop.number)):
            break
        with _ray("worker", address) as (ray, log):
            while ray.poll() is None and not stop.number:
                error = _connect(address)
                if isinstance(error, ConnectionRefusedError):
                    return 0  # the head has ended
                if error and _requeued_without(head):
                    return AGAIN
                time.sleep(5 * LOOK_SECONDS)
            if stop.number or isinstance(_connect(address), ConnectionRefusedError):
                return 0
            _say(f"Ray has ended on {socket.gethostname()} with status {ray.returncode}: {_end_of(log)}")
    while not stop.number and not _requeued_without(head):
        time.sleep(GRACE_SECONDS)
    return 0 if stop.number else AGAIN


def _requeued_without(head: str) -> bool:
    """Return whether SLURM has taken the head's lost node from this job; the first node that is left then queues it again."""
    job, error = show_job(os.environ["SLURM_JOB_ID"])
    hosts = [] if error else expand_hosts(job["NodeList"])
    if not hosts or head in hosts:
        return False
    if hosts[0] == os.environ["SLURMD_NODENAME"]:
        record, attempt = requeue_record(os.environ), slurm_attempt(os.environ)
        queue_again(record, attempt, f"node {head} was lost, with Ray's head", os.environ, _say)
    return True


def _end_of(log: Path) -> str:
    return " ".join(read_text(log, errors="replace").split())[-300:] or "no output"


def _say(text: str) -> None:
    print(f"ray: {text}", flush=True)


def main(words: list[str]) -> int:
    """Run ``head ADDRESS COMMAND ...`` or ``worker ADDRESS NODE``; return the exit status."""
    stop = Stop()
    for number in SIGNALS:
        signal.signal(number, stop)
    role, address, *more = words
    try:
        return run_head(address, more, stop) if role == "head" else run_worker(address, more[0], stop)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
