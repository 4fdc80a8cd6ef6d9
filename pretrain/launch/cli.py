"""``yaware plan`` (forecast a run) and ``yaware launch`` (start it on several hosts)."""

from __future__ import annotations

import argparse
import re
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from infra.errors import UserError, nearest


def plan(arguments: list[str]) -> int:
    """Print the ranks, steps, memory and checkpoints of a run, and the command lines that start it. Trains nothing."""
    parser = argparse.ArgumentParser(
        prog="yaware plan",
        description=plan.__doc__,
        epilog="--section.key=value overrides any key of the recipe.",
    )
    parser.add_argument(
        "--config", required=True, help="name of a shipped recipe (demo-cpu, ...) or path of a YAML file"
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of hosts (default: 1)")
    parser.add_argument("--gpus", type=int, help="ranks per host, one per GPU (default: the recipe's launch.ranks)")
    parser.add_argument(
        "--scans", type=int, help="number of training scans to plan for, instead of reading data.shards"
    )
    parser.add_argument("--grid", default="121x145x121", help="with --scans: voxels of a scan (default: 121x145x121)")
    parser.add_argument(
        "--tflops", type=float, help="10^12 operations per second that a rank sustains; prints an estimate of the time"
    )
    options, overrides = parser.parse_known_args(arguments)
    from pretrain.config import load_recipe
    from pretrain.encoders import check_encoder
    from pretrain.launch.forecast import Machine, forecast
    from pretrain.run.plan import total_steps

    recipe = load_recipe(options.config, overrides)
    for name in ("nodes", "gpus", "scans", "tflops"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name}={value} must be more than 0")
    machine = Machine(options.nodes, options.gpus or recipe.launch.ranks)
    if options.scans:
        if not re.fullmatch(r"\d+x\d+x\d+", options.grid):
            raise UserError(f"--grid={options.grid} is not of the form 121x145x121")
        grid, scans = [int(side) for side in options.grid.split("x")], options.scans
        check_encoder(recipe.encoder.name, recipe.encoder.options, grid=grid)
        steps = total_steps(recipe, scans)
    else:
        from pretrain.run.plan import make_plan

        checked = make_plan(recipe, machine.ranks)
        grid, scans, steps = checked.manifest.grid["shape"], checked.order.length, checked.total_steps
    command = [options.config, *overrides]
    print(
        "\n".join(
            forecast(recipe, machine, scans=scans, steps=steps, grid=grid, command=command, tflops=options.tflops)
        )
    )
    return 0


def launch(arguments: list[str]) -> int:
    """Check a recipe against its shards and a hostfile, then start it on the hosts with one of the launchers."""
    if "--slurm" in arguments:
        from infra.slurm.cli import launch_in_slurm

        place = arguments.index("--slurm")
        return launch_in_slurm([*arguments[:place], *arguments[place + 1 :]])
    options, overrides = _launch_parser().parse_known_args(arguments)
    from pretrain.config import load_recipe
    from pretrain.launch.hosts import read_hostfile
    from pretrain.launch.launchers import DEEPSPEED, LAUNCHERS, Job
    from pretrain.launch.start import accelerator, start
    from pretrain.run.plan import make_plan

    name = options.launcher or ("pdsh" if options.node_rank is None else "node")
    if name not in LAUNCHERS:
        raise UserError(f"--launcher={name} is not known{nearest(name, LAUNCHERS)}; allowed: {', '.join(LAUNCHERS)}")
    hosts = read_hostfile(options.hostfile)
    job = Job([options.config, *overrides], hosts, hostfile=options.hostfile, node_rank=options.node_rank,
              master_addr=options.master_addr, master_port=options.master_port)  # fmt: skip
    command = LAUNCHERS[name].command(job)
    recipe = load_recipe(options.config, overrides)
    make_plan(recipe, sum(hosts.values()))
    words = ["deepspeed", *command[3:]] if command[:3] == list(DEEPSPEED) else command
    print(f"launch: {shlex.join(words)}", flush=True)
    if options.dry_run:
        return 0
    end = start(
        LAUNCHERS[name], command, run_folder=Path(recipe.run.output),
        host=None if options.node_rank is None else socket.gethostname(), defaults={"DS_ACCELERATOR": accelerator()},
    )  # fmt: skip
    if end.reason:
        print(f"launch: {end.reason}", file=sys.stderr, flush=True)
    return end.status


def _launch_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yaware launch",
        description=launch.__doc__,
        epilog="--section.key=value overrides any key of the recipe.",
    )
    parser.add_argument(
        "--config", required=True, help="name of a shipped recipe (demo-cpu, ...) or path of a YAML file"
    )
    parser.add_argument(
        "--hostfile", type=Path, required=True, help="lines `name slots=8`; the first host is the master"
    )
    parser.add_argument(
        "--node_rank",
        type=int,
        help="start only this host, line N of the hostfile (from 0); default: all hosts, over pdsh",
    )
    parser.add_argument("--master_addr", help="address of the first host (default: its name)")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--launcher", help="pdsh (default), node (default with --node_rank), slurm (submits with sbatch) or "
                        "one-host (the hostfile names only this host)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check and print the command line, start nothing")
    parser.add_argument("--slurm", action="store_true", help="write and submit a batch job of SLURM instead, for pretrain, "
                        "build, evaluate or compare; see yaware launch --slurm --help")  # fmt: skip
    return parser


COMMANDS: dict[str, Callable[[list[str]], int]] = {"plan": plan, "launch": launch}
