"""Time and memory of the encoders: `python -m tests.benchmarks.bench_encoders [--device cuda] [--quick]`.

Measures the forward and backward pass of two views of one scan at 121 x 145 x 121. Each encoder runs in its own process, so
that its peak memory can be measured; an encoder that needs more than the free memory is reported and skipped. Core-seconds
(CPU time of the process) stay comparable while other programs use the machine. `--grid 61x73x61` chooses another grid, `--only
NAME` one encoder. bench_training measures the other costs of training.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.processes.kept_memory import keep_freed_memory
from pretrain.encoders import ENCODERS, build_encoder
from tests.benchmarks.bench_loss import MIB, peak_bytes

VBM = (121, 145, 121)
QUICK = (61, 73, 61)
SMALL = (33, 33, 33)  # grid of a first pass, not measured, that loads libraries and starts threads


def free_bytes() -> int:
    """Return the available memory of the machine in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def timed(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return the wall-clock seconds and the CPU seconds of all threads."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu


def measure(name: str, sides: tuple[int, ...], device: str, repeats: int) -> dict[str, Any]:
    """Measure two views of one scan: best time, and peak memory above weights, gradients and input."""
    options = {"grid": list(sides)} if name.startswith("vit") else {}
    encoder = build_encoder(name, options).to(device).train()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "features": int(encoder.feature_size),  # type: ignore[arg-type]
    }
    encoder(torch.randn(2, 1, *SMALL, device=device)).sum().backward()
    views = torch.randn(2, 1, *sides, device=device)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else int(0.9 * free_bytes())
    if device == "cpu":  # raise an error here before the kernel kills another process for lack of memory
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return the memory of the first pass before the measurement
        keep_freed_memory()  # as ranks do
    before = peak_bytes(device, reset=True)
    seconds = []
    try:
        for _ in range(repeats):
            encoder.zero_grad(set_to_none=False)
            seconds.append(timed(lambda: encoder(views).sum().backward(), device))
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return {**found, "over": free}
    wall, cpu = min(seconds)
    return {**found, "seconds": wall, "cpu": cpu, "bytes": peak_bytes(device) - before}


def apart(*case: Any) -> Any:
    """Measure a case in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_encoders", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case[0]}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report_encoders(names: list[str], sides: tuple[int, ...], device: str, repeats: int) -> None:
    """Measure the encoders and print the table."""
    print(f"\nForward and backward of two views of one scan, {'x'.join(map(str, sides))}, float32, default options")
    print(f"{'encoder':<14}{'parameters':>12}{'features':>10}{'MiB':>9}{'seconds':>9}{'core-s':>9}")
    for name in names:
        found = apart(name, sides, device, repeats)
        head = f"{name:<14}{found['parameters']:>12,}{found['features']:>10}"
        if "over" in found:
            print(f"{head}  needs more than the {found['over'] / MIB:,.0f} MiB that are free", flush=True)
        else:
            print(f"{head}{found['bytes'] / MIB:>9,.0f}{found['seconds']:>9.2f}{found['cpu']:>9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="half the resolution, fewer rounds")
    parser.add_argument("--grid", help="sides in voxels, such as 61x73x61")
    parser.add_argument(
        "--only", choices=tuple(ENCODERS), action="append", help="measure this encoder only; may be repeated"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        name, *rest = json.loads(chosen.case)
        print(json.dumps(measure(name, *rest)))
        return
    sides = tuple(int(side) for side in chosen.grid.split("x")) if chosen.grid else QUICK if chosen.quick else VBM
    cuda = chosen.device == "cuda"
    hardware = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores {platform.machine()}"
    load = "" if cuda else f", load average {os.getloadavg()[0]:.1f} at the start"
    print(f"{hardware}, torch {torch.__version__}, {torch.get_num_threads()} threads{load}")
    names = [name for name in ENCODERS if not chosen.only or name in chosen.only]
    report_encoders(names, sides, chosen.device, repeats=5 if cuda else 1 if chosen.quick else 3)


if __name__ == "__main__":
    main()
