"""The costs of training beyond the encoder: `python -m tests.benchmarks.bench_training [--device cuda] [--quick]`.

step        Time of a training step of DenseNet121 with two scans at 121 x 145 x 121 through recipe, DeepSpeed and `train_step`,
            compared with MONAI's DenseNet121 in a plain torch loop with the same loss and Adam; both alternate in one
            process. Core-seconds (CPU time of the process) stay comparable while other programs use the machine.
checkpoint  Seconds and bytes of a checkpoint of `paper-bhb10k` (DenseNet121, Adam), and its share of the training time at the
            recipe's interval, for several step times.
stall       Share of the time after warm-up in which the demo's ranks waited for data, from metrics.jsonl (`--run FOLDER`).
recipes     (--device cuda, or --quick) Scans/s, MFU, data stall and memory (the peak of torch's allocator, and what `yaware
            plan` forecasts) of real runs on simulated scans: `paper-bhb10k` in fp32, tf32, and bf16 + channels-last + compile,
            beside a plain fp32 loop; and the large recipes, reduced to one GPU. `--shards FOLDER` takes shards that exist.

`--only PART` runs one part. MFU is the number of operations counted by torch.utils.flop_counter, without recomputation,
divided by the peak of the data sheet that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.run.folder import read_metrics
from tests.benchmarks.bench_encoders import QUICK, SMALL, VBM, timed
from tests.benchmarks.bench_loss import MIB
from tests.benchmarks.training_steps import bare_step, engine_step

WARM_UP = 10  # first steps of a run, not counted: first batches, threads, compilation
# Dense peaks of the data sheets in TFLOP/s: float32, tf32, bf16. The first key that is part of the device's name counts.
PEAKS = {
    "H100 PCIe": (51, 378, 756), "H100": (67, 495, 989), "H200": (67, 495, 989), "A100": (19.5, 156, 312),
    "RTX 4090": (82.6, 82.6, 165),
}  # fmt: skip
NO_COMPILE = "--encoder.options={norm: batch, channels_last: true}"
FAST = "--encoder.options={norm: batch, channels_last: true, compile: true}"
# Run -> recipe, column of PEAKS, whether tf32 is allowed, overrides.
RUNS: dict[str, tuple[str, int, bool, list[str]]] = {
    "fp32": ("paper-bhb10k", 0, False, []),
    "tf32": ("paper-bhb10k", 1, True, []),
    "bf16 + channels-last": ("paper-bhb10k", 2, True, ["--train.precision=autocast", NO_COMPILE]),
    "bf16 + channels-last + compile": ("paper-bhb10k", 2, True, ["--train.precision=autocast", FAST]),
    "large-batch-64gpu": ("large-batch-64gpu", 2, True, ["--batch.global=128"]),
    "vit-large-multinode": ("vit-large-multinode", 2, True, ["--batch.global=32"]),
}


def engine_cost(sides: tuple[int, ...], scans: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each step; the two steps alternate, and so does the order within a pair."""
    device, ours = engine_step(scans)
    steps = {"engine": ours, "bare": bare_step(device)}
    source = torch.Generator().manual_seed(0)

    def batch(shape: tuple[int, ...]) -> dict[str, Tensor]:
        views = torch.randn(2, scans, 1, *shape, generator=source)
        return {"views": views.to(device), "proxies": (6 + 82 * torch.rand(scans, 1, generator=source)).to(device)}

    for step in steps.values():
        step(batch(SMALL))
        step(batch(sides))  # the first step of this size also allocates memory
    measured_batch, taken = batch(sides), {name: [] for name in steps}  # type: dict[str, Tensor], dict[str, list[tuple[float, float]]]
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            taken[name].append(timed(lambda name=name: steps[name](measured_batch), device.type))
    from pretrain.engine.engine import stop_ranks

    stop_ranks()
    return taken


def apart(*case: Any) -> Any:
    """Measure a case in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_training", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case[0]}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_with_bare(sides: tuple[int, ...], scans: int, rounds: int) -> None:
    """Print the times of both steps and their ratios."""
    taken = apart("engine", sides, scans, rounds)
    shape = "x".join(map(str, sides))
    print(f"\nTraining step of DenseNet121, {scans} scans (two views each) of {shape}, {rounds} rounds in turns")
    print(f"{'':<28}{'seconds':>16}{'core-seconds':>16}")
    for name, words in (("engine", "recipe, DeepSpeed, train_step"), ("bare", "MONAI, torch, Adam")):
        wall, cpu = zip(*taken[name], strict=True)
        print(f"{words:<30}{statistics.median(wall):>14.2f}{statistics.median(cpu):>16.2f}")
    for place, unit in ((0, "seconds"), (1, "core-seconds")):
        pairs = [ours[place] / bare[place] for ours, bare in zip(taken["engine"], taken["bare"], strict=True)]
        best = min(ours[place] for ours in taken["engine"]) / min(bare[place] for bare in taken["bare"])
        shown = ", ".join(f"{pair:.3f}" for pair in pairs)
        print(f"ratio of {unit}: median of pairs {statistics.median(pairs):.3f}, of the best {best:.3f} ({shown})")


def checkpoint_cost(repeats: int) -> dict[str, Any]:
    """Measure seconds and bytes of checkpoints of the recipe's real model and optimiser, written as in training."""
    from pretrain.engine import engine
    from pretrain.model import build_model
    from pretrain.run import checkpoint
    from pretrain.weights.write import write_encoder

    recipe = load_recipe("paper-bhb10k", ["--batch.global=2", "--batch.micro=null"])
    device = engine.start_ranks()
    trained = engine.build_engine(recipe, build_model(recipe).to(device), lambda step: 1.0)
    trained.train()
    embeddings, _ = trained(torch.randn(2, 2, 1, *SMALL, device=device))  # a step creates the optimiser's state
    trained.backward(embeddings.square().mean())
    engine.update(trained)
    seconds, core_seconds, size = [], [], 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in range(repeats + 1):  # the first checkpoint creates folders and threads and is not counted

            def write_rest(temporary: Path, step: int = step) -> None:
                config = {"encoder": to_dict(recipe)["encoder"], "run_name": "benchmark", "step": step, "method": "y-aware",
                          "feature_size": 1024, "manifest_digest": "", "split": [], "version": "", "run_id": None}  # fmt: skip
                write_encoder(temporary / "encoder", engine.encoder_state(trained), config, {})

            started, cpu = time.perf_counter(), time.process_time()
            written = checkpoint.save_checkpoint(Path(folder), step, trained, {"loader": {}}, write_rest)
            seconds.append(time.perf_counter() - started)
            core_seconds.append(time.process_time() - cpu)
            size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    engine.stop_ranks()
    return {"seconds": seconds[1:], "cpu": core_seconds[1:], "bytes": size}


def report_checkpoints(repeats: int, step_seconds: dict[str, float]) -> None:
    """Print the cost of a checkpoint and its share of the time at the recipe's interval."""
    found, settings = apart("checkpoint", repeats), load_recipe("paper-bhb10k", []).checkpoint
    middle = statistics.median(found["seconds"])
    shown = ", ".join(f"{seconds:.2f}" for seconds in found["seconds"])
    print(f"\nCheckpoint of paper-bhb10k: {found['bytes'] / MIB:,.0f} MiB, median {middle:.2f} s ({shown}),")
    print(
        f"of which {statistics.median(found['cpu']):.2f} core-seconds; in the rest it waits for the disk and for cores"
    )
    print(f"interval: {settings.every_steps} steps or {settings.every_minutes:g} minutes, whichever comes first")
    for what, seconds in step_seconds.items():
        interval = min(settings.every_steps * seconds, 60 * (settings.every_minutes or float("inf")))
        print(f"  step of {seconds:.3g} s ({what}): every {interval:,.0f} s, {middle / interval:.2%} of the time")


def report_stall(run: Path) -> None:
    """Print the share of the time in which a run waited for data."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] >= WARM_UP]
    if not rows:
        print(
            f"\nData stall: {run}/metrics.jsonl has no step after the first {WARM_UP}; run `make demo` first, or give --run"
        )
        return
    share = sum(row["wait_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
    middle = statistics.median(row["data_stall"] for row in rows)
    print(
        f"\nData stall of {run}, {len(rows)} steps after the first {WARM_UP}: {share:.2%} of the time, median step {middle:.2%}"
    )


def simulated_shards(folder: Path, scans: int, spacing: float) -> Path:
    """Build shards of simulated participants, all in the split for pretraining."""
    yaware = [sys.executable, "-m", "infra.cli"]
    make = ["cohort", "simulate", str(folder / "cohort"), "--participants", str(scans), "--spacing", str(spacing)]
    build = ["shards", "build", str(folder / "cohort"), str(folder / "shards"), "--splits", "pretrain=1"]
    for command in (make, build):
        subprocess.run([*yaware, *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "shards"


def train_case(recipe: str, tf32: bool, overrides: list[str]) -> dict[str, Any]:
    """Train in this process; return the peak GPU memory, its forecast, and the network's operations per scan."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    from data_pipeline.storage.manifest import Manifest
    from pretrain.forecast.hardware import GPUS
    from pretrain.forecast.memory import MemoryModel
    from pretrain.forecast.operations import plain_model, scan_flops
    from pretrain.train import train

    settings = load_recipe(recipe, overrides)
    train(settings)
    grid = Manifest.load(settings.data.shards).grid["shape"]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    network = plain_model(settings)
    # The kind of GPU does not change the sum, as long as it reserves memory when it is allocated.
    model = MemoryModel(settings, grid, sum(p.numel() for p in network.parameters()), 1, gpu=GPUS["h100"],
                        loaded=1 + settings.data.prefetch)  # fmt: skip
    forecast = model.of_batch(settings.batch.global_).total
    return {"bytes": peak, "forecast": forecast, "flops": scan_flops(network, grid)}


def bare_case(sides: tuple[int, ...], scans: int, rounds: int, device: str) -> float:
    """Return the scans per second of MONAI's network in a plain float32 loop without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    step = bare_step(torch.device(device))
    batch = {"views": torch.randn(2, scans, 1, *sides, device=device), "proxies": torch.rand(scans, 1, device=device)}
    step(batch)
    return scans / statistics.median(timed(lambda: step(batch), device)[0] for _ in range(rounds))


def report_recipes(
    device: str, quick: bool, folder: Path, steps: int, shards: Path | None, names: list[str]
) -> None:  # fmt: skip
    """Train the runs ``names`` of RUNS for ``steps`` steps after the warm-up, and print their speed and memory."""
    cuda = device == "cuda"
    shards = shards or simulated_shards(folder, 24 if quick else 128, 5.0 if quick else 1.5)
    from data_pipeline.storage.manifest import Manifest

    sides = tuple(Manifest.load(shards).grid["shape"])
    peaks = next((p for name, p in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    bare = apart("bare", sides, 2 if quick else 8, 3 if quick else 10, device)
    print(
        f"\nRuns on simulated scans of {'x'.join(map(str, sides))}, one rank; bare fp32 loop of MONAI's: {bare:.3g} scans/s"
    )
    print(f"{'run':<34}{'scans/s':>9}{'x bare':>8}{'MFU':>8}{'peak':>8}{'stall':>8}{'MiB':>9}{'forecast':>10}")
    failed = 0
    for name in names:
        recipe, kind, tf32, overrides = RUNS[name]
        if quick and recipe != "paper-bhb10k":
            continue
        run = folder / name.replace(" ", "-")
        common = [f"--data.shards={shards}", f"--run.output={run}", f"--train.steps={4 if quick else WARM_UP + steps}",
                  f"--run.tracking_uri=sqlite:///{folder}/mlflow.db", "--monitor.every_epochs=0"]  # fmt: skip
        if quick:
            common += ["--batch.global=4", "--batch.micro=2", "--data.workers=0"]
        if not cuda:  # a rehearsal on the CPU needs neither the compiler nor bf16 kernels
            overrides = [o.replace("compile: true", "compile: false").replace("autocast", "fp32") for o in overrides]
        try:
            found = apart("train", recipe, tf32, [*overrides, *common])
        except RuntimeError as error:
            print(f"{name:<34}failed: {str(error).strip().splitlines()[-1]}", flush=True)
            failed += 1
            continue
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] >= (1 if quick else WARM_UP)]
        rate = statistics.median(row["scans_per_second"] for row in rows)
        stall = sum(row["wait_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
        peak = peaks[kind] if peaks else None
        used = f"{rate * found['flops'] / (peak * 1e12):.1%}" if peak else "-"
        print(
            f"{name:<34}{rate:>9.2f}{rate / bare:>8.2f}{used:>8}{peak or '-':>8}{stall:>8.1%}{found['bytes'] / MIB:>9,.0f}"
            f"{found['forecast'] / MIB:>10,.0f}",
            flush=True,
        )
    if failed:
        raise SystemExit(f"bench_training: error: {failed} of the runs failed")


CASES: dict[str, Callable[..., Any]] = {
    "engine": engine_cost, "checkpoint": checkpoint_cost, "train": train_case, "bare": bare_case,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small scans and few rounds, to check that each part runs")
    parser.add_argument("--only", choices=("step", "checkpoint", "stall", "recipes"), action="append")
    parser.add_argument(
        "--run", type=Path, default=Path("demo/runs/y-aware"), help="run folder whose data stall is reported"
    )
    parser.add_argument("--cpu-step", type=float, default=12.0, help="seconds of a step of two scans, for `checkpoint`")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a run, for `recipes`")
    parser.add_argument("--name", choices=RUNS, action="append", help="only this run of `recipes`")
    parser.add_argument("--shards", type=Path, help="shards to train on, for `recipes`, in place of simulated ones")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        name, *rest = json.loads(chosen.case)
        print("\n" + json.dumps(CASES[name](*rest)))
        return
    cuda = chosen.device == "cuda"
    parts = chosen.only or ["step", "checkpoint", "stall", *["recipes"] * (cuda or chosen.quick)]
    hardware = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "monai"))
    print(
        f"{hardware}, {versions}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} at the start"
    )
    if "step" in parts:
        compare_with_bare(QUICK if chosen.quick else VBM, 2, rounds=10 if cuda else 3 if chosen.quick else 6)
    if "checkpoint" in parts:
        assumed = {"32 of --cpu-step, on a CPU": 32 * chosen.cpu_step, "estimate for a GPU": 0.6, "the same, slow": 2.2}
        report_checkpoints(2 if chosen.quick else 5, assumed)
    if "stall" in parts:
        report_stall(chosen.run)
    if "recipes" in parts:
        with tempfile.TemporaryDirectory() as folder:
            names = chosen.name or list(RUNS)
            report_recipes(chosen.device, chosen.quick, Path(folder), chosen.steps, chosen.shards, names)


if __name__ == "__main__":
    main()
