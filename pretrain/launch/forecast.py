"""What a run comes to before it is started: ``yaware plan`` prints it, nothing is trained and nothing written."""

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
    """Hosts of one kind."""

    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        """Processes over all hosts, one a GPU (on a CPU: one each)."""
        return self.nodes * self.gpus


def forecast(
    recipe: Recipe, machine: Machine, *, scans: int, steps: int, grid: Sequence[int], command: Sequence[str],
    tflops: float | None = None,
) -> list[str]:  # fmt: skip
    """The lines of ``yaware plan``.

    Args:
        scans: positions of an epoch.
        steps: of the whole run.
        grid: sides of a scan in voxels.
        command: recipe and overrides, as given.
        tflops: 10^12 operations a second that a rank is taken to sustain; None: no time is estimated.
    """
    passes, ranks = check_micro_batch(recipe.batch, machine.ranks), machine.ranks
    share = recipe.batch.global_ // ranks
    model = plain_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.encoder.parameters())
    sides = "x".join(map(str, grid))
    stage = int((recipe.deepspeed.get("zero_optimization") or {}).get("stage", 0))
    in_passes = "in one pass" if passes == 1 else f"in {passes} passes of {share // passes} (GradCache)"
    epochs = steps * recipe.batch.global_ / scans
    rows = {
        "model": f"{recipe.encoder.name}, {parameters:,} parameters ({inside:,} in the encoder), {recipe.train.precision}",
        "data": f"{scans:,} scans an epoch of {sides} voxels, two views each",
        "ranks": f"{ranks} ({machine.nodes} x {machine.gpus}); {share} scans a rank and step, {in_passes}",
        "steps": f"{steps:,} of {recipe.batch.global_} scans: {epochs:.1f} epochs of {scans / recipe.batch.global_:.1f} steps",
        "checkpoints": _checkpoints(recipe, steps, checkpoint_bytes(recipe, parameters, inside)),
        f"ZeRO {stage}": _memory(memory_of_a_rank(recipe, parameters, ranks)),
    }
    flops = scan_flops(model, grid)
    again = (1 / 3 if passes > 1 else 0) + (1 / 3 if recipe.encoder.options.get("checkpointing") else 0)
    step_tflop = share * flops * (1 + again) / 1e12
    rows["arithmetic"] = f"{flops / 1e12:.3g} TFLOP a scan (counted); {step_tflop:.3g} a rank and step" + (
        f", of which {again / (1 + again):.0%} done again to save memory" if again else ""
    )
    if tflops:
        seconds = step_tflop / tflops
        rows["time"] = (
            f"at {tflops:g} TFLOP/s a rank (assumed): {seconds:.3g} s a step, {recipe.batch.global_ / seconds:,.0f} scans/s, "
            f"{seconds * steps / 3600:.2g} h; data, network and checkpoints come on top"
        )
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    return [*lines, "start it with", *(f"  {line}" for line in launch_lines(machine, command))]


def _checkpoints(recipe: Recipe, steps: int, size: float) -> str:
    settings = recipe.checkpoint
    often = f"every {settings.every_steps:,} steps" + (
        f" and every {settings.every_minutes:g} minutes" if settings.every_minutes else ""
    )
    count = -(-steps // settings.every_steps) or 1
    best = " and the best by the monitor" if recipe.monitor.every_epochs else ""
    return (
        f"{often}: {count} by steps; the last {settings.keep}{best} are kept, some {size / GIB:.2f} GiB each (estimate)"
    )


def _memory(parts: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
    return f"{shown}; together {sum(parts.values()) / MIB:,.0f} MiB a rank (estimate); activations on top (docs/encoders.md)"


def launch_lines(machine: Machine, command: Sequence[str]) -> list[str]:
    """Return the command lines that start the run; ``command`` is the recipe's name and its overrides."""
    recipe = shlex.join(command)
    examples = [launcher.examples(machine.nodes, machine.gpus, recipe) for launcher in LAUNCHERS.values()]
    return [line for lines in examples for line in lines]
