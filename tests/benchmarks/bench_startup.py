"""CPU seconds of short commands, most of which are imports: `python -m tests.benchmarks.bench_startup [--quick]`.

Builds shards of 36 small scans and pretrains 0 steps of a small ResNet18. Then every command runs three times, each in a new
process; the median counts, with its range. CPU seconds include those of all processes that the command started and ended. Of
`evaluate` the time until its first line is measured, and then the whole command.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cohorts import write_cohort

YAWARE = [sys.executable, "-m", "infra.cli"]


def whole(command: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its seconds."""
    before, started = psutil.Process().cpu_times(), time.perf_counter()
    subprocess.run([*YAWARE, *command], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, psutil.Process().cpu_times()
    used = (getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
    return sum(used), seconds


def first_line(command: list[str]) -> tuple[float, float]:
    """Start a command and stop it at its first line; return its CPU seconds and its seconds until then."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*YAWARE, *command], stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline() if process.stdout else ""
        seconds, used = time.perf_counter() - started, psutil.Process(process.pid).cpu_times()
        process.terminate()
        if not line.startswith("evaluate:"):
            raise RuntimeError(f"the first line of evaluate is {line!r}")
    return used.user + used.system, seconds


def commands(folder: Path) -> dict[str, tuple[Callable[[list[str]], tuple[float, float]], list[str]]]:
    """Return how each command is measured, and its arguments. ``folder`` has the shards and the run."""
    pretrain = [
        "pretrain", "--config", "simulated-6mm", f"--data.shards={folder / 'shards'}", "--batch.global=4",
        "--train.steps=0", "--readouts.fit=false",
    ]  # fmt: skip
    evaluate = [
        "evaluate", str(folder / "run"), "--shards", str(folder / "shards"), "--tasks", "age", "--protocols", "linear",
        "--folds", "2", "--tracking-uri", f"sqlite:///{folder}/mlflow.db",
    ]  # fmt: skip
    scan = next((folder / "cohort").glob("sub-*/**/*.nii.gz"))
    return {
        "--help": (whole, ["--help"]),
        "plan": (whole, ["plan", *pretrain[1:]]),
        "pretrain, 0 steps": (whole, [*pretrain, f"--run.output={folder / 'new'}"]),
        "export": (whole, ["export", str(folder / "run"), str(folder / "new")]),
        "embed, one scan": (whole, ["embed", str(folder / "run"), str(scan), "--out", str(folder / "new.tsv")]),
        "evaluate, first line": (first_line, [*evaluate, "--storage", str(folder / "new")]),
        "evaluate, one task": (whole, [*evaluate, "--storage", str(folder / "new")]),
    }


def prepare(folder: Path) -> None:
    """Write the cohort, its shards and a run of 0 steps."""
    write_cohort(folder / "cohort", participants=36)
    whole(
        ["shards", "build", str(folder / "cohort"), str(folder / "shards"), "--splits", "pretrain=0.5,downstream=0.5"]
    )
    whole([*commands(folder)["pretrain, 0 steps"][1][:-1], f"--run.output={folder / 'run'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="has no effect: nothing runs on a GPU")
    parser.add_argument("--quick", action="store_true", help="once instead of three times")
    parser.add_argument("--only", help="measure the command of this name, for example plan")
    options = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores {platform.machine()}, load average {load}")
    print(f"{'':<24}{'CPU seconds':>12}{'range':>16}{'seconds':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        prepare(folder)
        for name, (measure, command) in commands(folder).items():
            if options.only not in (None, name):
                continue
            taken = []
            for _ in range(1 if options.quick else 3):
                shutil.rmtree(folder / "new", ignore_errors=True)
                (folder / "new.tsv").unlink(missing_ok=True)
                taken.append(measure(command))
            used, seconds = zip(*taken, strict=True)
            shown = f"{min(used):.2f} to {max(used):.2f}"
            print(
                f"{name:<24}{statistics.median(used):>12.2f}{shown:>16}{statistics.median(seconds):>10.2f}", flush=True
            )


if __name__ == "__main__":
    main()
