"""``yaware doctor``: check this machine, or all nodes of a job, and say how to mend what is wrong."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from infra.errors import UserError
from infra.slurm.options import free_options, gpus_asked
from infra.slurm.parser import OneLineParser
from pretrain.doctor.row import OK, Request, Row

# Options of srun that this command sets itself.
OWN_OPTIONS = ("ntasks-per-node", "label", "overlap", "input", "output", "error")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="yaware doctor", description=doctor.__doc__, epilog="--section.key=value overrides any key of the recipe."
    )
    add = parser.add_argument
    add("--hostfile", type=Path, help="check the hosts of this file, over pdsh and ssh as `yaware launch` starts them")
    add(
        "--slurm", action="store_true", help="check the nodes of this allocation, or of a new one with --nodes, by srun"
    )
    add("--nodes", type=int, help="with --slurm outside an allocation: number of nodes")
    add("--gpus", type=int, help="with --slurm: GPUs of each node, with a rank for each (default: none are asked for)")
    add("--partition", help="with --slurm outside an allocation: the partition")
    add("--account", help="with --slurm outside an allocation: the account")
    add("--sbatch-option", action="append", default=[], metavar="KEY=VALUE",
        help="with --slurm outside an allocation: another option, which srun has too, for example qos=low")  # fmt: skip
    add("--wait", type=float, help="with --slurm: most seconds in the queue (default: no limit)")
    add("--config", help="a recipe: checks its shards and its tracking store too")
    add("--port", type=int, default=29500, help="the job's --master_port (default: 29500)")
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="how long a node waits for the others, from its start on (default: 20)",
    )
    add("--json", action="store_true", help="print the rows and what the nodes found as JSON")
    return parser


def doctor(arguments: list[str]) -> int:
    """Check this machine, or the nodes of a job. Prints a line for each check: ok, warn or fail, with what to do. Exit status 0
    if nothing failed, 1 if something did, 2 for wrong arguments."""
    options, overrides = _parser().parse_known_args(arguments)
    _check(options, overrides)
    from pretrain.config import load_recipe
    from pretrain.doctor.checks import judge_all, status_of, summary
    from pretrain.doctor.reach import Allocation, ask_here, ask_over_slurm, ask_over_ssh, gpus_of_allocation
    from pretrain.launch.hosts import read_hostfile

    recipe = [options.config, *overrides] if options.config else []
    if recipe:
        load_recipe(recipe[0], recipe[1:])  # a wrong recipe is a wrong argument
        if Path(recipe[0]).is_file():
            recipe[0] = str(Path(recipe[0]).resolve())
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    asked = Allocation(options.nodes, _srun_options(options), options.gpus or 0, options.wait)
    gpus = options.gpus if options.gpus is not None else gpus_asked(asked.options)
    if gpus is None and options.slurm:
        gpus = gpus_of_allocation(os.environ)
    request = Request(hosts, recipe, options.port, options.seconds, gpus or 0)
    if options.slurm:
        answers, rows = ask_over_slurm(request, asked, os.environ)
    elif hosts:
        answers, rows = ask_over_ssh(request)
    else:
        answers, rows = ask_here(request)
    if hosts or options.slurm:
        rows = rows or [Row("reach", OK, f"{len(answers)} nodes: {', '.join(answers)}")]
    rows += judge_all(answers, request)
    if options.json:
        print(
            json.dumps({"status": status_of(rows), "rows": [asdict(row) for row in rows], "nodes": answers}, indent=1)
        )
    else:
        print("\n".join([*(row.line() for row in rows), summary(rows)]))
    return status_of(rows)


def _srun_options(options: argparse.Namespace) -> dict[str, str]:
    """Return the options of a new allocation, by name. Raises UserError for one that cannot be passed on to srun."""
    named = {name: value for name in ("partition", "account") if (value := getattr(options, name)) is not None}
    free = free_options(options.sbatch_option, named)
    for key in free:
        if key in OWN_OPTIONS or (options.gpus is not None and key in ("gres", "gpus-per-node")):
            raise UserError(
                f"--sbatch-option={key}={free[key]}: `yaware doctor` sets it itself; see --nodes and --gpus"
            )
    return named | free


def _check(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raise UserError for options that do not fit together, or whose values are not possible."""
    if overrides and not options.config:
        raise UserError(f"unknown option {overrides[0]}; overrides of a recipe need --config")
    if options.hostfile and options.slurm:
        raise UserError("--hostfile and --slurm name the nodes in two ways; give one of them")
    for name in ("nodes", "gpus", "partition", "account", "sbatch_option", "wait"):
        if not options.slurm and getattr(options, name) not in (None, []):
            raise UserError(f"--{name.replace('_', '-')} is for --slurm; a hostfile names its hosts and their slots")
    for name in ("partition", "account"):
        if getattr(options, name) == "":
            raise UserError(f"--{name} is empty; give a value, or leave it out")
    for name in ("nodes", "port", "seconds", "wait"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}={value} must be more than 0 and finite")
    if options.port > 65535:
        raise UserError(f"--port={options.port} is no port; the largest is 65535")
    if (options.gpus or 0) < 0:
        raise UserError(f"--gpus={options.gpus} must be 0 or more")


COMMANDS: dict[str, Callable[[list[str]], int]] = {"doctor": doctor}
