"""Several ranks on this machine, over gloo: the gathered loss, and steps with the same number of scans on each rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from infra.processes.kept_memory import keep_freed_memory
from pretrain.config import Recipe, load_recipe
from pretrain.engine.engine import make_contiguous
from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.gather import AllGather
from pretrain.model import build_model
from pretrain.run.step import train_step
from tests.benchmarks import training_steps
from tests.benchmarks.bench_loss import SIGMA, TAU, inputs
from tests.benchmarks.cases.preset import CHANNELS_LAST
from tests.benchmarks.harness.group import on_ranks, together

GRID, SCANS, WARM = (41, 49, 41), 4, 2  # of a step on several ranks; WARM steps are not counted
Steps = list[tuple[float, float]]  # CPU and wall-clock seconds of each
Parts = dict[str, float]  # CPU seconds of each part of a step


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


def our_steps(rank: int, of: int, steps: int) -> tuple[Steps, Parts]:
    """Return the seconds of steps, and of their parts, as a recipe trains: DeepSpeed, train_step with checks and metrics."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, of, of)), strict=True))
    keep_freed_memory()  # as every rank on a CPU does
    batch, gather = _batch(rank), AllGather() if of > 1 else None
    trained = training_steps.trained_engine(_recipe(of))
    torch.set_num_threads(1)
    mark = training_steps.PartTimes()
    training_steps.mark_parts(mark)

    def step() -> None:
        train_step(trained, lambda z, _, b: _loss(z, b["proxies"], gather), batch, 0, torch.float32)

    return _timed(step, of, steps, mark)


def ddp_steps(rank: int, of: int, steps: int) -> tuple[Steps, Parts]:
    """Return the seconds of steps, and of their parts, with DistributedDataParallel and the whole loss on every rank."""
    keep_freed_memory()
    model, batch = build_model(_recipe(of)), _batch(rank)
    make_contiguous(model)  # as our engine does; with channels-last kernels a step takes a tenth longer
    trained = DistributedDataParallel(model) if of > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-5)
    mark = training_steps.PartTimes()

    def step() -> None:
        z_2BD, _ = trained(batch["views"])
        z_2GD, every = z_2BD, batch["proxies"]
        if of > 1:
            z_2GD = torch.stack([torch.cat(list(all_gather(z))) for z in z_2BD])
            every = torch.cat(list(all_gather(every)))
        loss = _loss(z_2GD, every)
        mark("forward")
        loss.backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        mark("update")

    return _timed(step, of, steps, mark)


def _recipe(ranks: int) -> Recipe:
    """The paper's recipe with SCANS scans a rank; its network has the layout that is faster on a CPU."""
    return load_recipe("paper-bhb10k", [f"--batch.global={SCANS * ranks}", "--batch.micro=null", *CHANNELS_LAST])


def _batch(rank: int) -> dict[str, Tensor]:
    """Two views (2, SCANS, 1, D, H, W) and ages (SCANS, 1), others on each rank."""
    source = torch.Generator().manual_seed(rank)
    return {
        "views": torch.randn(2, SCANS, 1, *GRID, generator=source),
        "proxies": torch.rand(SCANS, 1, generator=source),
    }


def _loss(z_2BD: Tensor, ages_B1: Tensor, gather: AllGather | None = None) -> Tensor:
    return y_aware_infonce(z_2BD, ages_B1, kernel=KERNELS["gaussian"](bandwidth=5.0), gather=gather)


def _timed(step: Callable[[], None], ranks: int, steps: int, parts: training_steps.PartTimes) -> tuple[Steps, Parts]:
    """Return the seconds of each step after the first WARM, and of their parts; a step begins on all ranks at a time."""
    found = []
    for number in range(WARM + steps):
        if number == WARM:
            parts.clear()
        if ranks > 1:
            dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        parts.begin()
        step()
        found.append((time.process_time() - used, time.perf_counter() - started))
    return found[WARM:], parts.of_a_step(steps)


def weak(kind: str, ranks: int, steps: int) -> dict[str, float]:
    """Measure steps with SCANS scans on each rank, ours or torch's DistributedDataParallel; CPU seconds of all ranks a step."""
    found = on_ranks({"ours": our_steps, "ddp": ddp_steps}[kind], ranks, of=ranks, steps=steps)
    parts = {part: sum(seconds[part] for _, seconds in found) for part in found[0][1]}
    return {**together([of_rank for of_rank, _ in found]), **parts}
