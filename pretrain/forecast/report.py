"""The forecast of ``yaware plan``: ranks, steps, memory and time of a run. Nothing is trained and nothing is written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Recipe, check_micro_batch
from pretrain.forecast.cluster import ClusterForecast, Machine, assumptions
from pretrain.forecast.operations import checkpoint_bytes
from pretrain.launch.launchers import LAUNCHERS

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Counted:
    """What was counted of a recipe's network: all its parameters, those of the encoder, and operations per scan."""

    parameters: int
    in_encoder: int
    flops: int


def repeated_share(recipe: Recipe, passes: int) -> float:
    """Return the operations that are computed again to save memory, as a share of those counted once."""
    return (1 / 3 if passes > 1 else 0.0) + (1 / 3 if recipe.encoder.options.get("checkpointing") else 0.0)


def report(
    recipe: Recipe, machine: Machine, step: ClusterForecast, counted: Counted, *, scans: int, steps: int,
    grid: Sequence[int], command: Sequence[str], tflops: float | None = None,
) -> list[str]:  # fmt: skip
    """Return the lines of ``yaware plan``.

    Args:
        recipe: the recipe.
        machine: the hosts.
        step: the forecast of a step.
        counted: what was counted of the network.
        scans: scans shown per epoch.
        steps: steps of the whole run.
        grid: voxels of a scan, (D, H, W).
        command: name of the recipe and overrides, as typed.
        tflops: 10^12 operations per second that a rank sustains, if they were given.

    Raises UserError if the batch cannot be divided by the ranks.
    """
    passes, ranks, share = check_micro_batch(recipe.batch, machine.ranks), machine.ranks, step.scans
    sides = "x".join(map(str, grid))
    in_passes = "in one pass" if passes == 1 else f"in {passes} passes of {share // passes} (GradCache)"
    epochs = steps * recipe.batch.global_ / scans
    repeated = repeated_share(recipe, passes)
    size = checkpoint_bytes(recipe, counted.parameters, counted.in_encoder)
    rows = {
        "model": f"{recipe.encoder.name}, {counted.parameters:,} parameters ({counted.in_encoder:,} in the encoder), "
                 f"{recipe.train.precision}",
        "data": f"{scans:,} scans per epoch of {sides} voxels, two views each",
        "ranks": f"{ranks} ({machine.nodes} x {machine.gpus}); {share} scans per rank and step, {in_passes}",
        "steps": f"{steps:,} of {recipe.batch.global_} scans: {epochs:.1f} epochs of {scans / recipe.batch.global_:.1f} steps",
        "checkpoints": _checkpoints(recipe, steps, size),
        "memory": _memory(step),
        "operations": f"{counted.flops / 1e12:.3g} TFLOP per scan (counted); "
                      f"{share * counted.flops * (1 + repeated) / 1e12:.3g} per rank and step"
                      + (f", {repeated / (1 + repeated):.0%} of them repeated to save memory" if repeated else ""),
        "network": _network(step),
    }  # fmt: skip
    if step.largest is not None and machine.gpu is not None:
        rows["batch"] = _batch(step, machine.gpu.usable)
    if step.timing:
        rows |= _times(step, steps, machine)
        rows["assuming"] = "; ".join(assumptions(machine, recipe, tflops))
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    return [*lines, "start it with", *(f"  {line}" for line in launch_lines(machine, command))]


def _times(step: ClusterForecast, steps: int, machine: Machine) -> dict[str, str]:
    timing = step.timing
    assert timing is not None
    counted = machine.gpu is not None or machine.ranks == 1
    exchange = f"{timing.exchange / timing.step:.0%} exchange" if counted else "exchange not counted"
    speed = (
        f"{timing.step:.3g} s per step ({exchange}), "
        f"{timing.scans_per_second:,.0f} scans/s, {timing.step * steps / 3600:.2g} h"
    )
    read = timing.shard_bytes_per_second / 1e6
    return {"time": speed, "shards": f"{read:,.0f} MB/s from all hosts, {read / machine.nodes:,.0f} MB/s on each"}


def _batch(step: ClusterForecast, room: float) -> str:
    fits = step.memory.total <= room
    if step.largest:
        advice = f"at most {step.largest} scans per rank do"
    else:
        advice = "not even 1 does: set batch.micro, autocast, encoder.options.checkpointing or a higher ZeRO stage"
    return f"{step.scans} scans per rank {'fit' if fits else 'do not fit'} in {room / GIB:.0f} GiB; {advice}"


def _checkpoints(recipe: Recipe, steps: int, size: float) -> str:
    settings = recipe.checkpoint
    interval = f"every {settings.every_steps:,} steps" + (
        f" and every {settings.every_minutes:g} minutes" if settings.every_minutes else ""
    )
    count = -(-steps // settings.every_steps) or 1
    best = " and the best by the monitor" if recipe.monitor.every_epochs else ""
    return (
        f"{interval}: {count} by steps; the last {settings.keep}{best} are kept, {size / GIB:.2f} GiB each (estimate)"
    )


def _memory(step: ClusterForecast) -> str:
    memory = step.memory
    shown = ", ".join(f"{name} {_size(size)}" for name, size in memory.parts.items())
    return f"{_size(memory.total)} per rank, the most in the phase {memory.phase!r}: {shown}"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def _network(step: ClusterForecast) -> str:
    if not step.sent:
        return "one rank sends nothing"
    shown = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in step.sent.items())
    return f"{sum(step.sent.values()) / 1e6:,.1f} MB sent per rank and step: {shown}"


def launch_lines(machine: Machine, command: Sequence[str]) -> list[str]:
    """Return the command lines that start the run; ``command`` is the recipe's name and its overrides."""
    recipe = shlex.join(command)
    examples = [launcher.examples(machine.nodes, machine.gpus, recipe) for launcher in LAUNCHERS.values()]
    return [line for lines in examples for line in lines]
