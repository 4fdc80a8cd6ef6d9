"""Start a Ray head node for one test, with the command that users type, and stop it by its process id."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Head:
    """A running head node: the environment variables with its address and token, and its process."""

    environment: dict[str, str]
    process: psutil.Process

    def workers(self, task: str = "build_one") -> list[psutil.Process]:
        """Return the processes of this node that are running a task at the moment."""
        workers = []
        for process in self.process.children(recursive=True):
            try:
                if process.cmdline()[:1] == [f"ray::{task}"]:
                    workers.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return workers


@contextmanager
def head_node(cpus: int = 2) -> Iterator[Head]:
    """Run ``ray start --head --block`` on free ports. The path of its folder is short, because it contains sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    first, *others = _free_ports(4)
    names = ("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={first}",
        *(f"--{name}={port}" for name, port in zip(names, others, strict=True)),
        f"--num-cpus={cpus}", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats",
        f"--temp-dir={folder}", "--object-store-memory=200000000",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    # Without PYTHONPATH the workers must find the packages through the driver.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # keeps other sessions out
    # At Ray's default of 15 its workers would get next to no time on cores that anything else uses.
    environment |= {**token, "RAY_worker_niceness": "0"}
    started = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    children: list[psutil.Process] = []
    try:
        limit = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert started.poll() is None, (folder / "head.log").read_text()[-3000:]
            assert time.monotonic() < limit, (folder / "head.log").read_text()[-3000:]
            time.sleep(0.1)
        yield Head({"RAY_ADDRESS": f"127.0.0.1:{first}", **token}, psutil.Process(started.pid))
    finally:
        if started.poll() is None:
            children = psutil.Process(started.pid).children(recursive=True)
            started.terminate()
        _, alive = psutil.wait_procs(children, timeout=15)
        for process in alive:
            process.kill()
        started.kill()
        started.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]
