"""Starts the real training command on tiny scans, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.stores import store_at

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SMALL = ["--encoder.options={width: 0.25, norm: batch}", "--batch.global=8", "--checkpoint.every_steps=4",
         "--data.workers=0"]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run: CPU, one thread per rank, and an MLflow store in ``folder``.

    A test with a process group in this process has set the variables of its rank; a run of its own must not inherit them.
    """
    store = store_at(folder / "mlflow.db")
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**inherited, "MLFLOW_TRACKING_URI": store, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def pretrain_command(shards: Path, output: Path, steps: int, *more: str) -> list[str]:
    """Return the command ``yaware pretrain`` for tiny scans."""
    overrides = [f"--data.shards={shards}", f"--run.output={output}", f"--train.steps={steps}", *SMALL, *more]
    return [sys.executable, "-m", "infra.cli", "pretrain", "--config", "demo-cpu", *overrides]


def run(command: list[str], folder: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and print its output, which pytest shows if the test fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=timeout)
    print(done.stdout[-4000:], done.stderr[-4000:])
    return done


def losses(output: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of metrics.jsonl, to the last digit; a line that is still being written is left out."""
    rows = []
    path = output / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(line) if line.endswith("}") else None
        rows += [(row["step"], row["loss"])] if row else []
    return rows


def kill_ranks_when(command: list[str], folder: Path, ready: Callable[[], bool], timeout: float = 400) -> None:
    """Start ``command``; once ``ready()``, send SIGKILL to both training processes, then wait for the launcher."""
    log = (folder / "killed.log").open("w")
    started = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=log, stderr=log)
    limit = time.monotonic() + timeout
    try:
        while not ready():
            assert started.poll() is None, (folder / "killed.log").read_text()[-3000:]
            assert time.monotonic() < limit, "the run did not get that far"
            time.sleep(0.02)
        family = psutil.Process(started.pid).children(recursive=True)
        ranks = [
            p for p in family if "pretrain.train" in " ".join(p.cmdline()) and "--local_rank" in " ".join(p.cmdline())
        ]
        ranks = [p for p in ranks if "deepspeed" not in " ".join(p.cmdline())]
        assert len(ranks) == 2, [p.cmdline() for p in family]
        for process in ranks:
            process.kill()
        assert started.wait(timeout=60) != 0
    finally:
        for process in psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []:
            process.kill()
        started.kill()
        started.wait()
        log.close()
