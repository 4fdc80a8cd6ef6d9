"""What the ranks run, and the one process that they are compared with: a small 3D encoder under a gathered loss."""

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
    """One training step: scans per rank, the loss and its options, how ranks gather and average."""

    sizes: tuple[int, ...]
    loss: str = "y-aware"
    options: dict[str, Any] = field(default_factory=dict)
    gather: str = "right"
    ddp: bool = False
    micro: int | None = None  # scans embedded at a time, by GradCache
    learned: bool = False  # the temperature is a parameter
    missing: bool = False
    seed: int = 0

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def own(self, rank: int) -> slice:
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


def encoder(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every scan by itself (no batch statistics), so that one process and many compute the same embeddings."""
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
    """Both views through the encoder, as `pretrain.model.ContrastiveModel` hands them to the loss."""

    def __init__(self, network: nn.Module, learned: bool) -> None:
        super().__init__()
        self.network = network
        self.temperature = Temperature(0.3).to(next(network.parameters()).dtype) if learned else None

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        return embed(self.network, views), None if self.temperature is None else self.temperature()


class PlainEngine:
    """What GradCache needs of DeepSpeed's engine, without any data parallelism."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, views: Tensor) -> Any:
        return self.module(views)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()


def backward(engine: Any, job: Job, rank: int, gather: Any, dtype: torch.dtype) -> Tensor:
    """The loss on a rank's part of the batch, plain or from micro-batches, and its backward pass."""
    volumes, proxies, subjects = batch(job, dtype)
    own = job.own(rank)
    options = {**job.options, **({"subjects": subjects[own]} if job.options.get("subjects") else {})}

    def compare(views: Tensor, temperature: Tensor | None) -> Tensor:
        learned = {} if temperature is None else {"temperature": temperature}
        return LOSSES[job.loss](views, proxies[own], gather=gather, **{**options, **learned})

    run = full_pass if job.micro is None else partial(cached_pass, micro=job.micro)
    forward = run(engine, volumes[:, own], compare)
    forward.backward()
    return forward.loss


def batch(job: Job, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Global batch: volumes (2, G, 1, 6, 6, 6), proxies (G, 1), subjects (G,); a function of the job's seed alone."""
    source = torch.Generator().manual_seed(100 + job.seed)
    volumes = 4.0 * torch.randn(2, job.total, 1, 6, 6, 6, generator=source, dtype=torch.float64).to(dtype)
    ages = 20.0 + 30.0 * torch.rand(job.total, 1, generator=source, dtype=torch.float64)
    if job.missing:
        ages[:: max(2, job.total // 2)] = torch.nan
    subjects = torch.arange(job.total) // 2
    return volumes, ages.to(dtype), subjects


def embed(model: Callable[[Tensor], Tensor], volumes: Tensor) -> Tensor:
    return model(volumes.flatten(0, 1)).unflatten(0, (2, volumes.shape[1]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    return name.removeprefix("network.").removeprefix("module.")


def one_process(job: Job, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a process that holds the whole batch; loss(views, proxies, subjects)."""
    model = encoder()
    volumes, proxies, subjects = batch(job)
    value = loss(embed(model, volumes), proxies, subjects)
    value.backward()
    return value.item(), gradients(model)


def step(group: dist.ProcessGroup, rank: int, job: Job) -> tuple[float, float, dict[str, Tensor]]:
    """The same step on one rank of many: (own share, global loss, averaged gradients)."""
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
    """Largest difference of any entry, relative to the largest entry of all parameters' gradients."""
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    return max((found[name].double() - expected[name].double()).abs().max().item() for name in expected) / scale
