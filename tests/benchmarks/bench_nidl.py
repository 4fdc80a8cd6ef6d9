"""Training speed of nidl on the same scans: `python -m tests.benchmarks.bench_nidl [--device cuda] [--quick]`.

Both train DenseNet121 with y-Aware InfoNCE on simulated scans of 121 x 145 x 121, with the paper's augmentations (flip, blur,
noise, cutout, crop, each in half of the views), the same batch, number of reader processes and precision. nidl reads `.npy`
files through torch's DataLoader and augments on the CPU; this project reads its shards and augments in the DALI graph. Each
trains in its own process. Steps after the first WARM_UP count; the start of both programs is left out. nidl must be installed
(`pip install nidl`); it is a peer, not a dependency.
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
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from pretrain.run.folder import read_metrics
from tests.benchmarks.bench_training import simulated_shards
from tests.benchmarks.cases.preset import operators
from tests.benchmarks.peers.nidl_training import PRECISIONS, WARM_UP, nidl_case


def our_rate(
    folder: Path, shards: Path, batch: int, workers: int, steps: int, precision: str, *, tf32: bool, more: list[str]
) -> float:
    """Train with this project in a new process; return scans per second."""
    run = folder / f"run-{precision}-{tf32}-{len(more)}"
    overrides = [f"--data.shards={shards}", f"--run.output={run}", f"--train.steps={steps}", "--monitor.every_epochs=0",
                 f"--run.tracking_uri=sqlite:///{folder}/mlflow.db", f"--batch.global={batch}", "--batch.micro=null",
                 f"--data.workers={workers}", "--augmentation.preset=paper-all", f"--train.precision={precision}"]  # fmt: skip
    case = json.dumps(["train", "paper-bhb10k", tf32, [*overrides, *more]])
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_training", "--case", case], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    seconds = [row["seconds"] for row in read_metrics(run / "metrics.jsonl")]
    return batch / statistics.median(seconds[WARM_UP:] if steps > WARM_UP + 2 else seconds[-1:])


def write_npy(shards: Path, folder: Path) -> None:
    """Write every scan of the shards as a float32 .npy file."""
    from data_pipeline.storage.manifest import Manifest

    folder.mkdir()
    manifest = Manifest.load(shards)
    for row in manifest.rows():
        np.save(folder / f"{row:05d}.npy", np.asarray(manifest.read_volume(int(row)), dtype=np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small scans and few steps, to check that it runs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shards", type=Path, help="shards to train on, in place of simulated ones")
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), help="only this one (default: all on a GPU, fp32 on a CPU)"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print("\n" + json.dumps(nidl_case(*json.loads(chosen.case), operators("paper-all"))))
        return
    if not find_spec("nidl"):
        print("nidl is not installed (pip install nidl): not measured")
        return
    cuda = chosen.device == "cuda"
    batch, steps, workers = (
        (2, 3, 1) if chosen.quick else (chosen.batch, chosen.steps, max(1, (os.cpu_count() or 1) - 4))
    )
    hardware = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores {platform.machine()}"
    print(f"{hardware}, {os.cpu_count()} CPU cores, torch {torch.__version__}, nidl {version('nidl')}, batch {batch}, "
          f"{workers} reader processes")  # fmt: skip
    chosen_precisions = [chosen.precision] if chosen.precision else list(PRECISIONS) if cuda else ["fp32"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = chosen.shards or simulated_shards(folder, 8 if chosen.quick else 64, 6.0 if chosen.quick else 1.5)
        write_npy(shards, folder / "npy")
        print(
            f"{'precision':<12}{'nidl':>10}{'ours':>10}{'ratio':>8}{'+ compile':>12}{'ratio':>8}   scans/s", flush=True
        )
        for precision in chosen_precisions:
            case = json.dumps([str(folder), batch, workers, steps, precision, cuda])
            command = [sys.executable, "-m", "tests.benchmarks.bench_nidl", "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
            peer = json.loads(done.stdout.splitlines()[-1])["rate"]
            ours = our_rate(folder, shards, batch, workers, steps, precision, tf32=cuda, more=[])
            print(f"{precision:<12}{peer:>10.2f}{ours:>10.2f}{ours / peer:>8.2f}", end="", flush=True)
            if precision == "autocast":
                fast = ["--encoder.options={norm: batch, channels_last: true, compile: true}"]
                compiled = our_rate(folder, shards, batch, workers, steps, precision, tf32=cuda, more=fast)
                print(f"{compiled:>12.2f}{compiled / peer:>8.2f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
