"""Several ranks on this machine, over gloo: the gathered loss, and steps with the same number of scans on each rank."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from pretrain.config import load_recipe
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.gather import AllGather
from pretrain.model import build_model
from tests.benchmarks.bench_loss import SIGMA, TAU, inputs
from tests.benchmarks.bench_scaling import GRID, SCANS, WARM, WIDTH, Case, steps_of_a_rank
from tests.benchmarks.harness.group import on_ranks, together

Steps = list[tuple[float, float]]  # CPU and wall-clock seconds of each


def loss_of_a_rank(rank: int, kind: str, scans: int, steps: int) -> Steps:
    """Return the seconds of each forward and backward pass of this rank's part of the loss, or of the whole loss."""
    views, ages = inputs(scans, "cpu")
    kernel, gather, found = KERNELS["gaussian"](bandwidth=SIGMA), AllGather(), []
    for _ in range(1 + steps):
        dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        if kind == "gathered":
            loss = y_aware_infonce(views, ages, kernel=kernel, temperature=TAU, gather=gather, tile="auto")
        else:
            every = gather(views, [ages])
            loss = y_aware_infonce(every.z_2GD, every.metadata[0], kernel=kernel, temperature=TAU, tile="auto")
        loss.backward()
        found.append((time.process_time() - used, time.perf_counter() - started))
    return found[1:]


def loss(kind: str, ranks: int, total: int, steps: int) -> dict[str, float]:
    """Measure the loss of ``total`` scans on some ranks; ``kind`` is ``gathered`` or ``whole``. CPU seconds of all ranks."""
    return together(on_ranks(loss_of_a_rank, ranks, kind=kind, scans=total // ranks, steps=steps))


def our_steps(rank: int, of: int, steps: int) -> Steps:
    """Return the seconds of our steps on this rank."""
    found = steps_of_a_rank(Case("weak", of, SCANS, steps), rank, parts=False)
    return [(step["cpu"], step["step"]) for step in found]


def ddp_steps(rank: int, of: int, steps: int) -> Steps:
    """Return the seconds of steps with torch's DistributedDataParallel, where every rank computes the whole loss."""
    found = []
    recipe = load_recipe("demo-cpu", ["--encoder.name=resnet18", f"--encoder.options={{width: {WIDTH}, norm: group}}"])
    model, source = build_model(recipe), torch.Generator().manual_seed(rank)
    trained = DistributedDataParallel(model) if of > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    views, ages = torch.randn(2, SCANS, 1, *GRID, generator=source), torch.rand(SCANS, 1, generator=source)
    kernel = KERNELS["gaussian"](bandwidth=5.0)
    for _ in range(WARM + steps):
        if of > 1:
            dist.barrier()  # a step begins on all ranks at a time
        started, used = time.perf_counter(), time.process_time()
        z_2BD, _ = trained(views)
        z_2GD, every = z_2BD, ages
        if of > 1:
            z_2GD = torch.stack([torch.cat(list(all_gather(z))) for z in z_2BD])
            every = torch.cat(list(all_gather(ages)))
        y_aware_infonce(z_2GD, every, kernel=kernel, tile=None).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((time.process_time() - used, time.perf_counter() - started))
    return found[WARM:]


def weak(kind: str, ranks: int, steps: int) -> dict[str, float]:
    """Measure steps with SCANS scans on each rank, ours or torch's DistributedDataParallel; CPU seconds of all ranks a step."""
    return together(on_ranks({"ours": our_steps, "ddp": ddp_steps}[kind], ranks, of=ranks, steps=steps))
