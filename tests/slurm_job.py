"""A batch job of one of the scripts in ``infra/launch``, submitted to a cluster of ``tests.slurm``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

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
