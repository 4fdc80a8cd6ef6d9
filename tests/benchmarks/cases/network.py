"""Our sides of the rows of loss, augmentation, training step, loader and whole runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipeline.loading.augment import PRESETS
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage.manifest import Manifest
from infra.processes.kept_memory import keep_freed_memory
from pretrain.engine import engine
from tests import memory
from tests.benchmarks import bench_augment, training_steps
from tests.benchmarks.bench_loss import FORMS, inputs
from tests.benchmarks.cases.preset import CHANNELS_LAST
from tests.benchmarks.harness.measure import limit_memory, measured, run_measured, tree_cpu
from tests.benchmarks.peers.nidl_training import WARM_UP, per_step


def loss(scans: int, repeats: int, form: str = "tiled") -> dict[str, Any]:
    """Measure the forward and backward pass of a form of our loss; ``check`` is its value."""
    small, small_ages = inputs(16, "cpu")
    FORMS[form](small, small_ages).backward()
    limit_memory()
    views, ages = inputs(scans, "cpu")
    memory.reset_peak()
    before, values = memory.peak_bytes(), []

    def work() -> None:
        for _ in range(repeats):
            views.grad = None
            value = FORMS[form](views, ages)
            value.backward()
            values.append(value.item())

    return {**measured(work, repeats), "peak": memory.peak_bytes() - before, "check": values[-1]}


def augmentation(preset: str, scans: int, seed: int = 0) -> dict[str, float]:
    """Measure two views of ``scans`` scans of 121 x 145 x 121 in the DALI graph; seconds of a view."""
    torch.set_num_threads(1)
    calls = max(1, scans // bench_augment.BATCH)
    with bench_augment.graph(PRESETS[preset], "cpu", seed=seed) as run:
        return measured(lambda: [run() for _ in range(calls)], 2 * bench_augment.BATCH * calls)


def step(kind: str, sides: Sequence[int], batch: int, steps: int, channels_last: bool = False) -> dict[str, float]:
    """Measure a training step of DenseNet121: ``engine`` as a recipe trains it, or ``bare``, a plain torch loop.

    Both keep freed memory, as every rank on a CPU does.
    """
    keep_freed_memory()
    mark = training_steps.PartTimes()
    if kind == "engine":
        _, run = training_steps.engine_step(batch, mark, {"channels_last": channels_last})
    else:
        run = training_steps.bare_step(torch.device("cpu"), mark, channels_last)
    source = torch.Generator().manual_seed(0)
    views = {"views": torch.randn(2, batch, 1, *sides, generator=source), "proxies": 6 + 82 * torch.rand(batch, 1)}
    run(views)
    mark.clear()
    found = measured(lambda: [run(views) for _ in range(steps)], steps)
    engine.stop_ranks()
    return {**found, **mark.of_a_step(steps)}


def loading(data: str, batch: int, steps: int) -> dict[str, float]:
    """Measure our loader with the preset `paper-all` in this process, without training; seconds of a scan (two views)."""
    torch.set_num_threads(1)
    manifest = Manifest.load(Path(data, "coarse", "shards"))
    with TwoViewLoader(
        manifest, rows=manifest.rows(), global_batch=batch, augmentation="paper-all", prefetch=1
    ) as loader:
        for _ in range(3):
            next(loader)
        return measured(lambda: [next(loader) for _ in range(steps)], steps * batch)


def pretrain_command(data: str, output: str, batch: int, workers: int, steps: int) -> list[str]:
    """Return the command that trains DenseNet121 on the coarse scans, in the layout that is faster on a CPU."""
    return [
        sys.executable, "-m", "infra.cli", "pretrain", "--config", "paper-bhb10k", f"--run.output={output}/run",
        f"--data.shards={Path(data, 'coarse', 'shards')}", f"--run.tracking_uri=sqlite:///{output}/mlflow.db",
        f"--batch.global={batch}", "--batch.micro=null", f"--data.workers={workers}", "--data.threads=1",
        "--augmentation.preset=paper-all", *CHANNELS_LAST, "--monitor.every_epochs=0",
        "--readouts.fit=false", "--train.epochs=null", f"--train.steps={steps}",
    ]  # fmt: skip


# What a run of ours needs and the others leave out, in a process of its own.
MLFLOW = """
import sys
from mlflow import MlflowClient
client = MlflowClient("sqlite:///" + sys.argv[1] + "/mlflow.db")
run = client.create_run(client.create_experiment("one")).info.run_id
client.log_metric(run, "loss", 1.0)
client.set_terminated(run)
"""


def whole(data: str, batch: int, workers: int, steps: int) -> dict[str, float]:
    """Run `yaware pretrain` for a few steps, with its checkpoint and records; CPU and wall-clock seconds of the command."""
    with tempfile.TemporaryDirectory() as output:
        command = pretrain_command(data, output, batch, workers, steps)
        found = run_measured(command, stdout=subprocess.DEVNULL)
    alone = {
        "a process that makes a store of MLflow and a run": _alone(MLFLOW),
        "one that imports DeepSpeed": _alone("import deepspeed"),
        "one that imports torch": _alone("import torch"),
    }
    return {**found, **{f"beside_{name}": seconds for name, seconds in alone.items()}}


def _alone(code: str) -> float:
    """Return the CPU seconds of a new process that runs some code."""
    with tempfile.TemporaryDirectory() as folder:
        return run_measured([sys.executable, "-c", code, folder], capture_output=True)["cpu"]


def end_to_end(data: str, batch: int, workers: int, seconds: float, steps: int = 100_000) -> dict[str, float]:
    """Run `yaware pretrain` until ``seconds`` after the first step, or ``steps`` steps; seconds of a scan, and its start."""
    with tempfile.TemporaryDirectory() as output:
        command = pretrain_command(data, output, batch, workers, steps)
        born, ends = time.perf_counter(), []
        with _process(command) as process:
            lines = _lines(Path(output, "run", "metrics.jsonl"), process)
            tree = psutil.Process(process.pid)
            for _ in lines:
                ends.append((time.perf_counter(), tree_cpu(tree)))
                if ends[-1][0] - ends[0][0] > seconds:
                    break
    found = per_step(ends, min(WARM_UP, len(ends) - 2))
    return {
        "wall": found["wall"] / batch, "cpu": found["cpu"] / batch, "start": ends[0][0] - born, "start_cpu": ends[0][1],
        "steps": len(ends),
    }  # fmt: skip


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)  # it writes a checkpoint and ends
            process.communicate()


def _lines(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl as they are written, until the process ends."""
    while not path.exists():
        if process.poll() is not None:
            raise RuntimeError((process.stderr.read().decode() if process.stderr else "").strip()[-1000:])
        time.sleep(0.02)
    with path.open() as file:
        while True:
            ended = process.poll() is not None
            line = file.readline()
            if line.endswith("\n"):
                yield json.loads(line)
            elif ended:
                return
            else:
                time.sleep(0.02)
