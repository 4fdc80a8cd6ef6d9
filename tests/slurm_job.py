"""A batch job of one of the scripts in ``infra/launch``, submitted to a cluster of ``tests.slurm``."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from infra.processes.words import words_of
from tests.runs import ROOT, environment
from tests.slurm import INTERFACE, Cluster

ENDED = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def variables(folder: Path) -> dict[str, str]:
    """Return the environment of a job: this checkout, CPUs, the cluster's interface, an MLflow store in ``folder``."""
    given = environment(folder)
    chosen = {name: given[name] for name in ("MLFLOW_TRACKING_URI", "DS_ACCELERATOR")}
    return {**chosen, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACE, "XDG_CACHE_HOME": str(folder / "cache"),
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", "")}  # fmt: skip


def make_checkout(folder: Path) -> None:
    """Make what a batch script needs of the checkout in ``folder``: ``.venv/bin/python`` and ``.venv/bin/yaware``."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, words in {"python": "", "yaware": "-m infra.cli "}.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
        (binaries / name).chmod(0o755)


class BatchJob:
    """A batch job of a script, in a checkout of its own. ``name`` is the job's name, with which its log begins."""

    name = "yaware"

    def __init__(self, slurm: Cluster, script: str, folder: Path, *options: str, **more: str) -> None:
        self.slurm, self.folder, self.script, self.variables = slurm, folder, script, more
        self.options, self.number = options, 0
        if not (folder / ".venv").exists():
            make_checkout(folder)

    def run(self, *options: str, arguments: Sequence[str]) -> None:
        """Submit the script with options for sbatch and arguments of its own."""
        script = str(ROOT / f"infra/launch/{self.script}.sbatch")
        self.number = self.slurm.submit(
            "--nodes=2", "--time=20", *options, *self.options, script, *arguments,
            variables={**variables(self.folder), **self.variables}, cwd=self.folder,
        )  # fmt: skip

    @property
    def log(self) -> str:
        """What the job has printed."""
        path = self.folder / f"{self.name}-{self.number}.log"
        return path.read_text() if path.is_file() else ""

    def lines(self, beginning: str) -> list[str]:
        """Return the lines of the log that begin with a text."""
        return [line for line in self.log.splitlines() if line.startswith(beginning)]

    def wait(self, *states: str, restarts: int | None = None, seconds: float = 400) -> dict[str, str]:
        """Wait until the job has one of some states and was restarted some times; return its fields."""

        def reached() -> dict[str, str] | None:
            job = self.slurm.job(self.number)
            return job if job["JobState"] in states and restarts in (None, int(job["Restarts"])) else None

        return self.slurm.until(reached, seconds, lambda: f"{self.slurm.job(self.number)}\n{self.log[-4000:]}")

    def preempt(self) -> None:
        """Let a job of a higher partition take both nodes for a moment."""
        self.slurm.submit(
            "--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=true", cwd=self.folder
        )

    def end(self) -> None:
        """Cancel the job if it still runs, and print its log."""
        self.slurm.run("scancel", str(self.number))
        self.wait(*ENDED)
        print(self.log[-6000:])


class RayJob(BatchJob):
    """A batch job on Ray."""

    def processes(self, node: str, word: str) -> list[psutil.Process]:
        """Return the processes of a node that have ``word`` in a word of their command line."""
        found = []
        for number in self.slurm.processes(node):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(number)
                found += [process] if any(word in given for given in words_of(process)) else []
        return found

    def hold(self, task: str, node: str = "node2", restarts: int = 0) -> psutil.Process:
        """Stop a worker of a node in the middle of a task, without which the job cannot end; return its process."""
        self.wait("RUNNING", restarts=restarts)
        limit = time.monotonic() + 300
        while True:
            for process in self.processes(node, f"ray::{task}"):
                if process.status() == psutil.STATUS_STOPPED:
                    continue  # held already
                process.suspend()
                if any(task in word for word in words_of(process)):
                    return process
                process.resume()  # its task was done just before
            assert time.monotonic() < limit, self.log[-4000:]
            time.sleep(0.01)

    def raylets(self, node: str) -> list[psutil.Process]:
        """Return the running raylets of a node: one if Ray runs there."""
        found = self.processes(node, "raylet/raylet")
        return [process for process in found if process.is_running() and "raylet" in words_of(process)[0]]

    def reach_time_limit(self) -> None:
        """Set a time limit that the job reaches within a minute, so that SLURM warns it now."""
        while (seconds := self.seconds()) % 60 > 25:
            time.sleep(1)
        self.slurm.run("scontrol", "update", f"jobid={self.number}", f"TimeLimit={seconds // 60 + 1}")

    def seconds(self) -> int:
        """Return how long this start of the job has run."""
        hours, minutes, seconds = map(int, self.slurm.job(self.number)["RunTime"].split(":"))
        return 3600 * hours + 60 * minutes + seconds


def requeued(job: BatchJob) -> list[str]:
    """Return why the job was requeued, each time."""
    return re.findall(r"^(?:pretrain|job|ray): (.*); requeueing job ", job.log, re.MULTILINE)


def pythons_of_an_image(folder: Path) -> dict[str, str]:
    """Return variables of a job whose Python is in an image: a Python of the host without packages, and the image's own.

    The words of each call of the second become a line of the file ``words`` in the folder.
    """
    host, image = folder / "host_python", folder / "image_python"
    host.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    image.write_text(f'#!/bin/sh\necho "$@" >> {folder}/words\nexec {sys.executable} "$@"\n')
    host.chmod(0o755)
    image.chmod(0o755)
    return {"YAWARE_HOST_PYTHON": str(host), "YAWARE_PYTHON": str(image)}
