"""``yaware plan``: what a run needs before it is started."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.slurm.parser import OneLineParser

if TYPE_CHECKING:
    from pretrain.config import Recipe
    from pretrain.forecast.cluster import Machine


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="yaware plan", description=plan.__doc__, epilog="--section.key=value overrides any key of the recipe."
    )
    add = parser.add_argument
    add("--config", required=True, help="name of a shipped recipe (demo-cpu, ...) or path of a YAML file")
    add("--nodes", type=int, default=1, help="number of hosts (default: 1)")
    add("--gpus", type=int, help="ranks per host, one per GPU (default: the recipe's launch.ranks)")
    add("--gpu", help="kind of GPU: h100, a100, ...; prints what fits, the time and the bandwidth of the shards")
    add("--scans", type=int, help="number of training scans to plan for, instead of reading data.shards")
    add("--grid", default="121x145x121", help="with --scans: voxels of a scan (default: 121x145x121)")
    add(
        "--utilisation",
        type=float,
        help="share of the GPU's peak that the network reaches (default: 0.055, in 16 bits 0.028)",
    )
    add("--tflops", type=float, help="10^12 operations per second that a rank sustains, instead of --utilisation")
    add(
        "--table", action="store_true", help="print a table from 1 host to --nodes hosts, the scans of a rank unchanged"
    )
    add("--json", action="store_true", help="print bytes and seconds as JSON")
    return parser


def plan(arguments: list[str]) -> int:
    """Print ranks, steps, memory, traffic and time of a run, and the command lines that start it. Trains nothing."""
    options, overrides = _parser().parse_known_args(arguments)
    from pretrain.config import load_recipe
    from pretrain.forecast.cluster import Machine, check_share
    from pretrain.forecast.hardware import find_gpu

    recipe = load_recipe(options.config, overrides)
    for name in ("nodes", "gpus", "scans", "tflops"):
        if (value := getattr(options, name)) is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name}={value} must be more than 0 and finite")
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    if options.utilisation is not None:
        check_share("utilisation", options.utilisation)
    machine = Machine(options.nodes, options.gpus or recipe.launch.ranks, gpu, options.utilisation)
    return _forecast(recipe, machine, options, [options.config, *overrides])


def _forecast(recipe: Recipe, machine: Machine, options: argparse.Namespace, command: list[str]) -> int:
    from pretrain.config import check_micro_batch
    from pretrain.forecast.cluster import forecast_step
    from pretrain.forecast.hardware import GPUS
    from pretrain.forecast.memory import MemoryModel
    from pretrain.forecast.operations import plain_model, scan_flops
    from pretrain.forecast.report import Counted, repeated_share, report
    from pretrain.forecast.table import table

    passes = check_micro_batch(recipe.batch, machine.ranks)
    scans, steps, grid, scan_bytes = _data(recipe, machine, options)
    network = plain_model(recipe)
    parameters, in_encoder = (sum(p.numel() for p in part.parameters()) for part in (network, network.encoder))
    counted = Counted(parameters, in_encoder, scan_flops(network, grid))
    flops = counted.flops * (1 + repeated_share(recipe, passes))
    kind = machine.gpu or GPUS["h100"]  # without --gpu only whether memory is reserved or touched matters
    model = MemoryModel(recipe, grid, parameters, machine.ranks, gpu=kind, loaded=1 + recipe.data.prefetch)
    if options.table:
        rows = table(recipe, machine, model, flops=flops, scan_bytes=scan_bytes, scans=scans, tflops=options.tflops)
        print("\n".join(rows))
        return 0
    step = forecast_step(recipe, machine, model, flops=flops, scan_bytes=scan_bytes, tflops=options.tflops)
    if options.json:
        print(json.dumps({"ranks": machine.ranks, "steps": steps, "scans_per_epoch": scans, "parameters": parameters,
                          "flops_per_scan": counted.flops, **step.to_dict()}, indent=1))  # fmt: skip
        return 0
    lines = report(
        recipe, machine, step, counted, scans=scans, steps=steps, grid=grid, command=command, tflops=options.tflops
    )
    print("\n".join(lines))
    return 0


def _data(recipe: Recipe, machine: Machine, options: argparse.Namespace) -> tuple[int, int, list[int], float]:
    """Return scans per epoch, steps, the grid, and the mean bytes of a scan in a shard."""
    from pretrain.encoders import check_encoder
    from pretrain.forecast.cluster import scan_bytes_of
    from pretrain.run.plan import check_epoch, make_plan, total_steps

    if not options.scans:
        checked = make_plan(recipe, machine.ranks)
        size = float(checked.manifest.scans["size"].to_numpy()[checked.rows].mean())
        grid = [int(side) for side in checked.manifest.grid["shape"]]
        return checked.order.length, checked.total_steps, grid, size
    if not re.fullmatch(r"\d+x\d+x\d+", options.grid):
        raise UserError(f"--grid={options.grid} is not of the form 121x145x121")
    grid = [int(side) for side in options.grid.split("x")]
    check_epoch(recipe, options.scans, f"--scans={options.scans} is", "give more scans")
    check_encoder(recipe.encoder.name, recipe.encoder.options, grid=grid)
    return options.scans, total_steps(recipe, options.scans), grid, scan_bytes_of(grid)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {"plan": plan}
