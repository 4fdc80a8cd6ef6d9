"""The training step of `cases` under DeepSpeed ZeRO, as one rank runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.engine import import_deepspeed, warm
from pretrain.losses.contrastive import global_loss
from pretrain.losses.gather import AllGather
from tests.distributed.cases import Job, Network, backward, encoder, plain_name
from tests.distributed.ranks import TIMEOUT_S, answer_cases


def serve(rank: int, world: int, store: str, inbox: Connection) -> None:
    """Serve a rank whose process group is started by DeepSpeed; its cases run on all ranks of the pool."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    warm()
    import_deepspeed().init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        verbose=False,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    answer_cases(rank, {world: torch.distributed.group.WORLD}, inbox)


def zero_steps(
    group: torch.distributed.ProcessGroup, rank: int, jobs: Sequence[tuple[int, Job]]
) -> list[tuple[float, float, dict[str, Tensor]]]:
    """Return (this rank's scalar, global loss, gradients) of each (ZeRO stage, job), float32."""
    return [_zero_step(rank, stage, job) for stage, job in jobs]


def _zero_step(rank: int, stage: int, job: Job) -> tuple[float, float, dict[str, Tensor]]:
    deepspeed = import_deepspeed()
    from deepspeed.utils import safe_get_full_grad

    model = Network(encoder(torch.float32), job.learned)
    scans = len(range(*job.own(rank).indices(job.total)))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        config=_config(stage, -(-scans // job.micro) if job.micro else 1),
        dist_init_required=False,
    )
    gather = AllGather()
    loss = backward(engine, job, rank, gather, torch.float32)
    gradients = {plain_name(name): safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return loss.item(), global_loss(loss, gather).item(), gradients


def _config(stage: int, passes: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # With this threshold ZeRO-3 partitions even the small parameters of this encoder.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
