"""Speed, memory and traffic of y-Aware InfoNCE: `python -m tests.benchmarks.bench_loss [--device cuda] [--quick]`.

Prints three tables: the tiled form compared with the published implementation and with the plain form; memory for growing
batches; and the bytes that each of 2, 4 and 8 ranks sends per step. Each case runs in its own process, so that its peak
memory can be measured. Takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.gather import AllGather
from tests import memory
from tests.distributed.ranks import Ranks

DEPTH = 128
SIGMA, TAU = 5.0, 0.1
MIB = 2**20


def inputs(scans: int, device: str) -> tuple[Tensor, Tensor]:
    """Return views (2, B, D) and ages (B, 1)."""
    source = torch.Generator().manual_seed(scans)
    views = torch.randn(2, scans, DEPTH, generator=source).to(device).requires_grad_()
    return views, (6.0 + 82.0 * torch.rand(scans, 1, generator=source)).to(device)


def published(views: Tensor, ages: Tensor) -> Tensor:
    """The published implementation: (2N, 2N) float64 weights by scikit-learn on the CPU, column sums, full log-softmax."""
    from sklearn.metrics.pairwise import rbf_kernel

    count = 2 * views.shape[1]
    labels = ages.repeat(2, 1).double().cpu().numpy()
    weights = rbf_kernel(labels, labels, gamma=1 / (2 * SIGMA**2))
    weights[range(count), range(count)] = 0.0
    weights /= weights.sum(axis=1)
    z = torch.nn.functional.normalize(views.flatten(0, 1), dim=1)
    logits = z @ z.T / TAU
    logits = logits - 1e8 * torch.eye(count, device=z.device)
    log_p = torch.log_softmax(logits, dim=1)
    return -(torch.from_numpy(weights).to(z.device) * log_p).sum() / views.shape[1]


def ours(tile: Any, normalization: Any = "row") -> Callable[[Tensor, Tensor], Tensor]:
    """Return this package's loss as a function of views and ages."""
    kernel = KERNELS["gaussian"](bandwidth=SIGMA)
    return lambda views, ages: y_aware_infonce(
        views, ages, kernel=kernel, temperature=TAU, normalization=normalization, tile=tile
    )


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "published": published,
    "plain": ours(None),
    "tiled": ours("auto"),
    "tiled, column": ours("auto", "column"),
}


def peak_bytes(device: str, reset: bool = False) -> int:
    """Return the peak memory of this process since the last reset; on the CPU, its resident memory in /proc."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    if reset:
        memory.reset_peak()
    return memory.peak_bytes()


def measure(form: str, scans: int, device: str, repeats: int) -> dict[str, float]:
    """Measure the forward and backward pass: best seconds, and peak bytes above the inputs."""
    views, ages = inputs(scans, device)
    # A first pass, not measured, loads libraries and starts threads.
    small, small_ages = inputs(16, device)
    FORMS[form](small, small_ages).backward()
    before = peak_bytes(device, reset=True)
    seconds = []
    for _ in range(repeats):
        views.grad = None
        started = time.perf_counter()
        loss = FORMS[form](views, ages)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "bytes": peak_bytes(device) - before, "loss": loss.item()}


def apart(form: str, scans: int, device: str, repeats: int) -> dict[str, float]:
    """Run `measure` in a new process."""
    case = json.dumps([form, scans, device, repeats])
    command = [sys.executable, "-m", "tests.benchmarks.bench_loss", "--case", case]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    return result


def compare_with_published(scans: int, device: str, repeats: int) -> None:
    """Print time and memory of every form."""
    print(f"\nForward and backward, 2N = {2 * scans}, D = {DEPTH}")
    print(f"{'form':<16}{'seconds':>10}{'faster':>9}{'MiB':>10}{'smaller':>9}{'loss':>12}")
    base: dict[str, float] = {}
    for form in FORMS:
        found = apart(form, scans, device, repeats)
        base = base or found
        faster, smaller = base["seconds"] / found["seconds"], base["bytes"] / max(1.0, found["bytes"])
        print(
            f"{form:<16}{found['seconds']:>10.3f}{faster:>8.1f}x{found['bytes'] / MIB:>10.0f}{smaller:>8.1f}x"
            f"{found['loss']:>12.6f}"
        )


def report_batches(sizes: list[int], device: str) -> None:
    """Print time and memory of the tiled form for growing batches."""
    print(f"\nTiled, forward and backward, D = {DEPTH}: time is quadratic in the batch, memory linear")
    print(f"{'2N':>8}{'seconds':>10}{'MiB':>8}{'MiB per 1000':>14}")
    for scans in sizes:
        found = apart("tiled", scans, device, repeats=1)
        mib = found["bytes"] / MIB
        print(f"{2 * scans:>8}{found['seconds']:>10.2f}{mib:>8.0f}{mib / (2 * scans / 1000):>14.1f}")


def sent_bytes() -> int:
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def traffic(group: Any, rank: int, scans: int) -> tuple[int, int, float]:
    """Return the bytes that this rank sent in the forward pass and in the backward pass, and the seconds."""
    views, ages = inputs(scans, "cpu")
    gather = AllGather(group)
    counts = []
    for _ in range(2):
        torch.distributed.barrier(group)
        time.sleep(0.2)
        marks, started = [sent_bytes()], time.perf_counter()
        loss = y_aware_infonce(
            views, ages, kernel=KERNELS["gaussian"](bandwidth=SIGMA), temperature=TAU, gather=gather, tile="auto"
        )
        torch.distributed.barrier(group)
        seconds = time.perf_counter() - started
        time.sleep(0.2)
        marks.append(sent_bytes())
        started = time.perf_counter()
        loss.backward()
        seconds += time.perf_counter() - started
        torch.distributed.barrier(group)
        time.sleep(0.2)
        marks.append(sent_bytes())
        counts.append((marks[1] - marks[0], marks[2] - marks[1], seconds))
    return counts[-1]


def report_ranks(worlds: list[int], total: int) -> None:
    """Print the bytes that a rank sends per step, beside the formula of pretrain.losses.gather."""
    print(f"\nBytes sent per rank and step, G = {total} scans in all, D = {DEPTH} (gloo, all ranks on this machine)")
    print(f"{'ranks':>6}{'forward':>12}{'formula':>12}{'backward':>12}{'formula':>12}{'over':>8}{'seconds':>9}")
    with Ranks(max(worlds)) as pool:
        for world in worlds:
            scans = total // world
            found = pool.run(traffic, world, scans=scans)
            forward, backward = max(f for f, _, _ in found), max(b for _, b, _ in found)
            record = 2 * DEPTH * 4
            formula = (world - 1) * (scans * (record + 4) + 8), (world - 1) * scans * record
            over = (forward + backward) / sum(formula) - 1
            seconds = max(s for _, _, s in found)
            print(f"{world:>6}{forward:>12}{formula[0]:>12}{backward:>12}{formula[1]:>12}{over:>7.2%}{seconds:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="an eighth of the batch, to check that it runs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(*json.loads(chosen.case))))
        return
    part = 8 if chosen.quick else 1
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare_with_published(4096 // part, chosen.device, repeats=6)
    report_batches([4096 // part, 8192 // part, 16384 // part, 32768 // part], chosen.device)
    report_ranks([2, 4, 8], 2048 // part)


if __name__ == "__main__":
    main()
