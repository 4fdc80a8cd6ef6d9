"""The forecast of ``yaware plan``: ranks, steps, memory and time of a run. Nothing is trained and nothing is written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Recipe, check_micro_batch
from pretrain.launch.estimate import checkpoint_bytes, memory_of_a_rank, plain_model, scan_flops
from pretrain.launch.launchers import LAUNCHERS

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Machine:
    """Equal hosts."""

    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        """Processes on all hosts, one per GPU."""
        return self.nodes * self.gpus


def forecast(
    recipe: Recipe, machine: Machine, *, scans: int, steps: int, grid: Sequence[int], command: Sequence[str],
    tflops: float | None = None,
) -> list[str]:  # fmt: skip
    """Return the lines of ``yaware plan``.

    Args:
        recipe: the recipe.
        machine: the hosts.
        scans: scans shown per epoch.
        steps: steps of the whole run.
        grid: voxels of a scan, (D, H, W).
        command: name of the recipe and overrides, as typed.
        tflops: 10^12 operations per second that a rank sustains; None estimates no time.

    Raises UserError if the batch cannot be divided by the ranks.
    """
    passes, ranks = check_micro_batch(recipe.batch, machine.ranks), machine.ranks
    share = recipe.batch.global_ // ranks
    model = plain_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    in_encoder = sum(p.numel() for p in model.encoder.parameters())
    sides = "x".join(map(str, grid))
    stage = int((recipe.deepspeed.get("zero_optimization") or {}).get("stage", 0))
    in_passes = "in one pass" if passes == 1 else f"in {passes} passes of {share // passes} (GradCache)"
    epochs = steps * recipe.batch.global_ / scans
    rows = {
        "model": f"{recipe.encoder.name}, {parameters:,} parameters ({in_encoder:,} in the encoder), {recipe.train.precision}",
        "data": f"{scans:,} scans per epoch of {sides} voxels, two views each",
        "ranks": f"{ranks} ({machine.nodes} x {machine.gpus}); {share} scans per rank and step, {in_passes}",
        "steps": f"{steps:,} of {recipe.batch.global_} scans: {epochs:.1f} epochs of {scans / recipe.batch.global_:.1f} steps",
        "checkpoints": _checkpoints(recipe, steps, checkpoint_bytes(recipe, parameters, in_encoder)),
        f"ZeRO {stage}": _memory(memory_of_a_rank(recipe, parameters, ranks)),
    }
    flops = scan_flops(model, grid)
    repeated = (1 / 3 if passes > 1 else 0) + (1 / 3 if recipe.encoder.options.get("checkpointing") else 0)
    step_tflop = share * flops * (1 + repeated) / 1e12
    rows["operations"] = f"{flops / 1e12:.3g} TFLOP per scan (counted); {step_tflop:.3g} per rank and step" + (
        f", {repeated / (1 + repeated):.0%} of them repeated to save memory" if repeated else ""
    )
    if tflops:
        seconds = step_tflop / tflops
        rows["time"] = (
            f"at {tflops:g} TFLOP/s per rank (assumed): {seconds:.3g} s per step, "
            f"{recipe.batch.global_ / seconds:,.0f} scans/s, {seconds * steps / 3600:.2g} h; "
            "without data loading, network and checkpoints"
        )
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    return [*lines, "start it with", *(f"  {line}" for line in launch_lines(machine, command))]


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


def _memory(sizes: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in sizes.items())
    return f"{shown}; together {sum(sizes.values()) / MIB:,.0f} MiB per rank (estimate), plus activations (docs/encoders.md)"


def launch_lines(machine: Machine, command: Sequence[str]) -> list[str]:
    """Return the command lines that start the run; ``command`` is the recipe's name and its overrides."""
    recipe = shlex.join(command)
    examples = [launcher.examples(machine.nodes, machine.gpus, recipe) for launcher in LAUNCHERS.values()]
    return [line for lines in examples for line in lines]
