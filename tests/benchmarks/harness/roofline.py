"""Operations and bytes of each stage of the main recipe, what hardware could do at best, and the section about the gap."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pretrain.config import load_recipe
from pretrain.forecast.hardware import GPUS
from pretrain.forecast.operations import plain_model, scan_flops
from pretrain.forecast.traffic import collectives_of_step, sent_bytes
from tests.benchmarks.harness.statistics import median_of, values_of

RECIPE, GRID, RANKS = "paper-bhb10k", (121, 145, 121), 2
STAGES = ("read", "augmentation", "transfer", "network", "loss", "exchange")
# Data sheet of the H100 SXM: bytes per second of its memory (HBM3), and of PCIe 5.0 x16 in one direction.
H100_MEMORY, H100_PCIE = 3.35e12, 64e9
WHY = {
    "read": "The count of bytes holds neither the decompression of zstd nor the checksum.",
    "augmentation": "The best reads a scan once and writes its views once; the graph passes through memory for every step.",
    "transfer": "A copy from memory to memory, in place of one to a GPU.",
    "loss": "So small a product of matrices is ruled by the cost of calling each operation.",
    "exchange": "gloo copies through the loopback network card and sums on one thread.",
}
WHERE = {
    "read": "host",
    "augmentation": "memory",
    "transfer": "pcie",
    "network": "memory",
    "loss": "memory",
    "exchange": "link",
}


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the inputs and outputs of every operation: what passes through memory if no cache holds anything."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count, unless it only makes a view."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_iter((args, kwargs or {}, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def counts(grid: tuple[int, ...] = GRID, stored: float = 1.0e6) -> dict[str, dict[str, float]]:
    """Return operations and bytes of a scan in each stage.

    Args:
        grid: sides of a scan.
        stored: bytes of a scan in a shard.
    """
    recipe, voxels = load_recipe(RECIPE, []), prod(grid)
    model = plain_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    views = torch.empty(2, 1, 1, *grid, device="meta")
    with Traffic() as traffic:
        embeddings, *_ = model(views)
        embeddings.sum().backward()
    batch, out = recipe.batch.global_, recipe.projector.out
    rows = 2 * batch
    sent = sent_bytes(collectives_of_step(recipe, parameters, batch // RANKS, RANKS, "nccl"), RANKS, "nccl")[
        "gradients"
    ]
    return {
        "read": {"flops": 0.0, "bytes": stored + 2 * voxels},
        # z-score: mean and variance (3), shift and scale (2). float16 is read, two float32 views are written.
        "augmentation": {"flops": 5.0 * voxels, "bytes": (2 + 2 * 4) * voxels},
        "transfer": {"flops": 0.0, "bytes": 2 * 4 * voxels},
        "network": {"flops": float(scan_flops(model, grid)), "bytes": float(traffic.bytes)},
        # similarities, and their two products in the backward pass; embeddings read, and their gradient written.
        "loss": {"flops": 6.0 * rows**2 * out / batch, "bytes": 3.0 * 4 * rows * out / batch},
        "exchange": {"flops": parameters / batch, "bytes": sent / batch},
    }


def best_seconds(stage: str, count: Mapping[str, float], machine: Mapping[str, float]) -> tuple[float, str]:
    """Return the least seconds of a stage on a machine, and which limit holds: ``arithmetic`` or ``bytes``."""
    arithmetic = count["flops"] / machine["flops"]
    moved = count["bytes"] * (
        2 if stage == "transfer" and WHERE[stage] not in machine else 1
    )  # a copy reads and writes
    bandwidth = machine.get(WHERE[stage], machine["memory"])
    return max((arithmetic, "arithmetic"), (moved / bandwidth, "bytes"))


def machines(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return operations and bytes per second of this machine and of an H100 in float32 with TF32."""
    hardware, stages = result["hardware"], _stages(result)
    here = {"flops": hardware["cores"] * hardware["mhz"] * 1e6 * hardware["flops_per_cycle"]}
    # Other work can only make copies slower: the fastest round is what the memory can do.
    here["memory"] = max(values_of(stages, "copies", "rate"), default=float("nan"))
    gpu = GPUS["h100"]
    h100 = {"flops": gpu.tf32 * 1e12, "memory": H100_MEMORY, "pcie": H100_PCIE, "link": gpu.inside}
    return {"here": here, "h100": h100}


def section(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page's section; empty if the stages were not measured."""
    stages, count = _stages(result), result.get("roofline")
    if stages is None or not count or not median_of(stages, "copies", "rate"):
        return []
    both = machines(result)
    lines = [
        *_head(result, both),
        "| stage | GFLOP | MB | best here, ms | measured, ms | of the best | best on an H100, ms |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for stage in STAGES:
        wall = _measured(result, stage)
        best, limit = best_seconds(stage, count[stage], both["here"])
        gpu = "host" if stage == "read" else f"{1e3 * best_seconds(stage, count[stage], both['h100'])[0]:.3g}"
        cells = [
            stage, f"{count[stage]['flops'] / 1e9:.3g}", f"{count[stage]['bytes'] / 1e6:,.3g}",
            f"{1e3 * best:.3g} ({limit})", _shown(result, stage), f"{best / wall:.0%}" if wall else "-", gpu,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_gap(result, count, both["here"]), ""]


def _head(result: Mapping[str, Any], both: Mapping[str, Mapping[str, float]]) -> list[str]:
    hardware, here, h100 = result["hardware"], both["here"], both["h100"]
    return [
        "## Roofline of the main recipe",
        "",
        f"A scan (two views of {' x '.join(map(str, GRID))} voxels) in each stage of `{RECIPE}`: what must be computed and",
        "moved, the least time for it, and the time measured. Operations of the network are counted by",
        "torch.utils.flop_counter; its bytes are the inputs and outputs of every operation, as if none were fused and nothing",
        "stayed in a cache. Of the other stages count what must be read and written once. GradCache's first pass, a third more",
        "operations of the network, is left out. Reading and augmentation were measured with one thread, exchange with one on",
        "each of two ranks; the best counts both cores. In brackets: the fastest and the slowest round.",
        "",
        f"- Here: {hardware['cores']} cores x {hardware['mhz'] / 1e3:.2f} GHz x {hardware['flops_per_cycle']} float32",
        f"  operations a cycle ({hardware['vectors'] or 'no vector unit known'}) = {here['flops'] / 1e9:,.0f} GFLOP/s; memory",
        f"  {here['memory'] / 1e9:.1f} GB/s, in the fastest round of copying. A virtual machine may have another clock.",
        f"- H100 SXM, data sheet: {h100['flops'] / 1e12:.0f} TFLOP/s dense in TF32, memory {H100_MEMORY / 1e12:.2f} TB/s,",
        f"  PCIe {H100_PCIE / 1e9:.0f} GB/s and NVLink {h100['link'] / 1e9:.0f} GB/s in one direction. Reading and decoding",
        "  stay on the host.",
        "",
    ]


def _gap(result: Mapping[str, Any], count: Mapping[str, Mapping[str, float]], here: Mapping[str, float]) -> list[str]:
    """Explain where the time goes that the best does not need."""
    stages, network = _stages(result), count["network"]
    products, wall = median_of(stages, "products", "rate"), _measured(result, "network")
    whole = sum(_measured(result, stage) or 0.0 for stage in STAGES)
    if not wall or not products:
        return ["The network was not measured in this run, so that the gap cannot be explained."]
    traffic, arithmetic = network["bytes"] / here["memory"], network["flops"] / products
    if traffic > arithmetic:
        limit = "Memory is the limit: normalisation, activation and concatenation move whole feature maps."
    elif arithmetic < wall:
        limit = "Arithmetic is the limit, in convolutions with few channels."
    else:
        share = network["flops"] / wall / here["flops"]
        limit = f"It is faster than such a product: arithmetic is the limit, at {share:.0%} of the peak."
    lines = [
        f"**Network**: {wall / whole:.0%} of the sum of the stages. It reaches {network['flops'] / wall / 1e9:,.0f} GFLOP/s; a",
        f"large product of matrices reaches {products / 1e9:,.0f} GFLOP/s here, {products / here['flops']:.0%} of the peak. At",
        f"that rate its operations would take {arithmetic:.2f} s, and its bytes alone take {traffic:.2f} s, of {wall:.2f} s",
        f"measured. {limit}",
    ]
    for stage, why in WHY.items():
        if seconds := _measured(result, stage):
            best, _ = best_seconds(stage, count[stage], here)
            share, times = f"{seconds / whole:.2%} of the sum", f"{seconds / best:.1f} times the best"
            lines += ["", f"**{stage.capitalize()}**: {share}, {times}. {why}"]
    return [*lines, "", "On a GPU, one H200 was measured: [benchmarks](benchmarks/h200.md)."]


def _stages(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return _row(result, "stages")


def _row(result: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((row for row in result["rows"] if row["name"] == name), None)


def _measured(result: Mapping[str, Any], stage: str) -> float | None:
    """Return the median wall-clock seconds of a scan in a stage."""
    values = _rounds(result, stage)
    return statistics.median(values) if values else None


def _shown(result: Mapping[str, Any], stage: str) -> str:
    """Return the median, the fastest and the slowest round of a stage in ms."""
    values = [1e3 * value for value in _rounds(result, stage)]
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "-"


def _rounds(result: Mapping[str, Any], stage: str) -> list[float]:
    """Return the wall-clock seconds of a scan in a stage, of each round; empty if the stage was not measured."""
    row, side = (_stages(result), stage) if stage != "read" else (_row(result, "read"), "ours")
    return values_of(row, side, "wall")
