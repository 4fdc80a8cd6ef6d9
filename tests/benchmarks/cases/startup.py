"""CPU seconds of short commands, most of which are imports.

Shards of 36 small scans and a run of 0 steps of a small ResNet18 are prepared once. CPU seconds include those of all processes
that a command started and ended. Of ``evaluate`` the time until its first line is measured, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.harness.measure import run_measured, until_first_line
from tests.cohorts import write_cohort

YAWARE = [sys.executable, "-m", "infra.cli"]


def whole(command: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its seconds."""
    found = run_measured([*YAWARE, *command], stdout=subprocess.DEVNULL)
    return found["cpu"], found["wall"]


def first_line(command: list[str]) -> tuple[float, float]:
    """Start a command and stop it at its first line; return its CPU seconds and its seconds until then."""
    return until_first_line([*YAWARE, *command], "evaluate:")


def pretraining(folder: Path) -> list[str]:
    """Return the command of 0 steps of a small ResNet18; ``folder`` has the shards."""
    return [
        "pretrain", "--config", "simulated-6mm", f"--data.shards={folder / 'shards'}", "--batch.global=4",
        "--train.steps=0", "--readouts.fit=false",
    ]  # fmt: skip


def commands(folder: Path) -> dict[str, tuple[Callable[[list[str]], tuple[float, float]], list[str]]]:
    """Return how each command is measured, and its arguments. ``folder`` has the shards and the run."""
    evaluate = [
        "evaluate", str(folder / "run"), "--shards", str(folder / "shards"), "--tasks", "age", "--protocols", "linear",
        "--folds", "2", "--tracking-uri", f"sqlite:///{folder}/mlflow.db",
    ]  # fmt: skip
    scan = next((folder / "cohort").glob("sub-*/**/*.nii.gz"))
    return {
        "plan": (whole, ["plan", *pretraining(folder)[1:]]),
        "export": (whole, ["export", str(folder / "run"), str(folder / "new")]),
        "embed, one scan": (whole, ["embed", str(folder / "run"), str(scan), "--out", str(folder / "new.tsv")]),
        "evaluate, first line": (first_line, [*evaluate, "--storage", str(folder / "new")]),
    }


def prepare(folder: Path) -> None:
    """Write the cohort, its shards and a run of 0 steps."""
    write_cohort(folder / "cohort", participants=36)
    whole(
        ["shards", "build", str(folder / "cohort"), str(folder / "shards"), "--splits", "pretrain=0.5,downstream=0.5"]
    )
    whole([*pretraining(folder), f"--run.output={folder / 'run'}"])


def command(data: str, name: str) -> dict[str, float]:
    """Measure the command ``name`` once, on a copy of the prepared folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "startup")
        shutil.copytree(Path(data, "startup"), folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        measure, arguments = commands(folder)[name]
        used, seconds = measure(arguments)
    return {"cpu": used, "wall": seconds}
