"""A training step of a small 3D encoder with a gathered loss, on several ranks and in the single process for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.engine.grad_cache import cached_pass, full_pass
from pretrain.losses.contrastive import LOSSES, global_loss
from pretrain.losses.gather import AllGather
from pretrain.losses.temperature import Temperature
from tests.reference.wrong import WRONG_GATHERS

GATHERS = {"right": AllGather, **WRONG_GATHERS}


@dataclass(frozen=True)
class Job:
    """One training step.

    Attributes:
        sizes: scans of each rank.
        loss: a key of LOSSES.
        options: its keyword arguments.
        gather: a key of GATHERS.
        ddp: average gradients by DistributedDataParallel instead of an explicit all_reduce.
        micro: scans embedded at a time with gradient caching; None embeds all at once.
        learned: whether the temperature is a parameter.
        missing: whether some proxies are missing.
        seed: seed of the batch.
    """

    sizes: tuple[int, ...]
    loss: str = "y-aware"
    options: dict[str, Any] = field(default_factory=dict)
    gather: str = "right"
    ddp: bool = False
    micro: int | None = None
    learned: bool = False
    missing: bool = False
    seed: int = 0

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def own(self, rank: int) -> slice:
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


def encoder(dtype: torch.dtype = torch.float64) -> nn.Module:
    """An encoder without batch statistics, so that a single process and several ranks compute the same embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv3d(1, 4, 3, stride=2),
            nn.GELU(),
            nn.Conv3d(4, 6, 2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(6, 5, bias=False),
        ).to(dtype)


class Network(nn.Module):
    """Embeds both views and returns the temperature, like `pretrain.model.ContrastiveModel`."""

    def __init__(self, network: nn.Module, learned: bool) -> None:
        super().__init__()
        self.network = network
        self.temperature = Temperature(0.3).to(next(network.parameters()).dtype) if learned else None

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        return embed(self.network, views), None if self.temperature is None else self.temperature()


class PlainEngine:
    """The part of DeepSpeed's engine that gradient caching uses, without data parallelism."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, views: Tensor) -> Any:
        return self.module(views)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()


def backward(engine: Any, job: Job, rank: int, gather: Any, dtype: torch.dtype) -> Tensor:
    """Run the forward and backward pass on a rank's part of the batch, whole or in micro-batches; return the loss."""
    volumes, proxies, subjects = batch(job, dtype)
    own = job.own(rank)
    options = {**job.options, **({"subjects": subjects[own]} if job.options.get("subjects") else {})}

    def batch_loss(views: Tensor, temperature: Tensor | None) -> Tensor:
        learned = {} if temperature is None else {"temperature": temperature}
        return LOSSES[job.loss](views, proxies[own], gather=gather, **{**options, **learned})

    run = full_pass if job.micro is None else partial(cached_pass, micro=job.micro)
    forward = run(engine, volumes[:, own], batch_loss)
    forward.backward()
    return forward.loss


def batch(job: Job, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return the global batch of a job's seed: volumes (2, G, 1, 6, 6, 6), proxies (G, 1), subjects (G,)."""
    source = torch.Generator().manual_seed(100 + job.seed)
    volumes = 4.0 * torch.randn(2, job.total, 1, 6, 6, 6, generator=source, dtype=torch.float64).to(dtype)
    ages = 20.0 + 30.0 * torch.rand(job.total, 1, generator=source, dtype=torch.float64)
    if job.missing:
        ages[:: max(2, job.total // 2)] = torch.nan
    subjects = torch.arange(job.total) // 2
    return volumes, ages.to(dtype), subjects


def embed(model: Callable[[Tensor], Tensor], volumes: Tensor) -> Tensor:
    """Return the embeddings (2, B, D) of volumes (2, B, 1, 6, 6, 6)."""
    return model(volumes.flatten(0, 1)).unflatten(0, (2, volumes.shape[1]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    return name.removeprefix("network.").removeprefix("module.")


def one_process(job: Job, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a single process with the whole batch. ``loss(views, proxies, subjects)`` -> scalar."""
    model = encoder()
    volumes, proxies, subjects = batch(job)
    value = loss(embed(model, volumes), proxies, subjects)
    value.backward()
    return value.item(), gradients(model)


def step(group: dist.ProcessGroup, rank: int, job: Job) -> tuple[float, float, dict[str, Tensor]]:
    """Run the step on one of several ranks; return (this rank's scalar, global loss, averaged gradients)."""
    model = encoder()
    gather = GATHERS[job.gather](group)
    network = DistributedDataParallel(model, process_group=group) if job.ddp else model
    whole_model = Network(network, job.learned)
    loss = backward(PlainEngine(whole_model), job, rank, gather, torch.float64)
    if not job.ddp:
        for parameter in whole_model.parameters():
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= gather.world_size
    return loss.item(), global_loss(loss, gather).item(), gradients(whole_model)


def jobs_on_ranks(group: dist.ProcessGroup, rank: int, jobs: Sequence[Job]) -> list[Any]:
    return [step(group, rank, job) for job in jobs]


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of any entry, relative to the largest entry of all gradients."""
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in expected) / scale
