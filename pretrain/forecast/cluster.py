"""What a step on a cluster needs: memory of a rank, bytes on the wire, time, and bandwidth of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import UserError
from pretrain.config import Recipe
from pretrain.forecast.hardware import LINK_SHARE, UTILISATION_16_BITS, UTILISATION_FP32, Gpu, link_seconds
from pretrain.forecast.memory import MemoryModel, RankMemory
from pretrain.forecast.traffic import collectives_of_step, sent_bytes

# Bytes of a scan in a shard per voxel: float16 with zstd, measured on a grey-matter map of 121 x 145 x 121 (0.98 MB).
SHARD_BYTES_PER_VOXEL = 0.46


@dataclass(frozen=True)
class Machine:
    """Equal hosts.

    Attributes:
        nodes: number of hosts.
        gpus: ranks of a host, one per GPU.
        gpu: kind of the GPUs; None if it is not known, which leaves out times and limits.
        utilisation: share of the GPU's peak that the network reaches; None: the measured one of the precision.
    """

    nodes: int
    gpus: int
    gpu: Gpu | None = None
    utilisation: float | None = None

    @property
    def ranks(self) -> int:
        """Processes on all hosts, one per GPU."""
        return self.nodes * self.gpus

    def share(self, precision: str) -> float:
        """Return the share of the peak that the network reaches in a ``train.precision``."""
        measured = UTILISATION_FP32 if precision == "fp32" else UTILISATION_16_BITS
        return measured if self.utilisation is None else self.utilisation

    @property
    def backend(self) -> str:
        """Backend of the collectives."""
        return "gloo" if self.gpu is not None and self.gpu.lazy else "nccl"


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, and what follows from them.

    Attributes:
        compute: forward and backward pass, repeated parts included.
        exchange: collectives, none of which is assumed to overlap with the computation.
        scans_per_second: of all ranks.
        shard_bytes_per_second: that the loaders of all ranks read.
    """

    compute: float
    exchange: float
    scans_per_second: float
    shard_bytes_per_second: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class ClusterForecast:
    """The forecast of a step.

    Attributes:
        scans: scans of a rank per step.
        memory: of a rank.
        largest: the most scans of a rank that fit; None if the kind of GPU is not known.
        sent: bytes that a rank sends in a step, by what is exchanged.
        timing: None if neither the kind of GPU nor its speed is known.
    """

    scans: int
    memory: RankMemory
    largest: int | None
    sent: dict[str, float]
    timing: Timing | None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON, in bytes and seconds."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def forecast_step(
    recipe: Recipe, machine: Machine, model: MemoryModel, *, flops: float, scan_bytes: float, tflops: float | None = None
) -> ClusterForecast:  # fmt: skip
    """Forecast a step of ``recipe`` on a machine.

    Args:
        recipe: the recipe.
        machine: the hosts.
        model: the memory of its ranks.
        flops: operations per scan, repeated ones included.
        scan_bytes: bytes of a scan in a shard.
        tflops: 10^12 operations per second that a rank sustains, instead of a share of the GPU's peak.
    """
    scans = recipe.batch.global_ // machine.ranks
    exchanges = collectives_of_step(recipe, model.parameters, scans, machine.ranks, machine.backend)
    sent, gpu, timing = sent_bytes(exchanges, machine.ranks, machine.backend), machine.gpu, None
    precision = recipe.train.precision
    speed = 1e12 * tflops if tflops else gpu.peak(precision) * machine.share(precision) if gpu else None
    if speed:
        messages = sum(exchange.messages(machine.ranks) for exchange in exchanges)
        exchange = link_seconds(sum(sent.values()), messages, gpu, machine.nodes) if gpu else 0.0
        compute = scans * flops / speed
        rate = recipe.batch.global_ / (compute + exchange)
        timing = Timing(compute, exchange, rate, rate * scan_bytes)
    largest = None if gpu is None else model.largest_batch(gpu.usable)
    return ClusterForecast(scans, model.of_batch(scans), largest, sent, timing)


def assumptions(machine: Machine, recipe: Recipe, tflops: float | None) -> list[str]:
    """Return what the times rest on, a line each."""
    gpu = machine.gpu
    said = ["messages of trees, log2(ranks) of them in each exchange"] if gpu is not None and machine.ranks > 1 else []
    if tflops:
        said.append(f"{tflops:g} TFLOP/s per rank (given)")
    elif gpu is not None:
        precision = recipe.train.precision
        peak = gpu.peak(precision) / 1e12
        kind = "TF32" if precision == "fp32" else "bf16"
        measured = f" as DenseNet121 in {kind} on an H200" if machine.utilisation is None else ""
        said.append(f"{machine.share(precision):.1%} of the peak of {peak:g} TFLOP/s (data sheet){measured}")
    if gpu is not None:
        link, speed = (
            ("in the host", gpu.inside) if machine.nodes == 1 else ("to other hosts", min(gpu.inside, gpu.network))
        )
        said.append(f"{LINK_SHARE:.0%} of {speed / 1e9:g} GB/s per GPU {link}; the exchange overlaps with nothing")
        said.append(f"{gpu.usable / 2**30:.0f} GiB of {gpu.memory / 2**30:.0f} GiB can be filled")
    elif machine.ranks > 1:
        said.append("the exchange is not counted, because no --gpu names the network")
    extra = ["the monitor"] if recipe.monitor.every_epochs else []
    extra += ["readouts"] if recipe.readouts.fit else []
    left_out = ["DALI's own memory", "checkpoints", *extra]
    said.append(f"the loader keeps up; {', '.join(left_out[:-1])} and {left_out[-1]} are not counted")
    return said


def check_share(name: str, value: float) -> None:
    """Raise UserError unless an option is a share above 0 and at most 1."""
    if not 0.0 < value <= 1.0:
        raise UserError(f"--{name}={value:g} must be more than 0 and at most 1")


def scan_bytes_of(grid: Sequence[int]) -> float:
    """Return the bytes of a scan in a shard, as estimated from its voxels."""
    return SHARD_BYTES_PER_VOXEL * grid[0] * grid[1] * grid[2]
