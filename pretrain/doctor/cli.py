"""``yaware doctor``: check this machine, or all nodes of a job, and say how to mend what is wrong."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from infra.errors import UserError
from pretrain.doctor.row import OK, Request, Row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yaware doctor", description=doctor.__doc__, epilog="--section.key=value overrides any key of the recipe."
    )
    add = parser.add_argument
    add("--hostfile", type=Path, help="check the hosts of this file, over pdsh and ssh as `yaware launch` starts them")
    add(
        "--slurm", action="store_true", help="check the nodes of this allocation, or of a new one with --nodes, by srun"
    )
    add("--nodes", type=int, help="with --slurm outside an allocation: number of nodes")
    add("--partition", help="with --slurm outside an allocation: the partition")
    add("--config", help="a recipe: checks its shards and its tracking store too")
    add("--port", type=int, default=29500, help="the job's --master_port (default: 29500)")
    add("--seconds", type=float, default=20.0, help="how long a node waits for the others (default: 20)")
    add("--json", action="store_true", help="print the rows and what the nodes found as JSON")
    return parser


def doctor(arguments: list[str]) -> int:
    """Check this machine, or the nodes of a job. Prints a line for each check: ok, warn or fail, with what to do. Exit status 0
    if nothing failed, 1 if something did, 2 for wrong arguments."""
    options, overrides = _parser().parse_known_args(arguments)
    if overrides and not options.config:
        raise UserError(f"unknown option {overrides[0]}; overrides of a recipe need --config")
    if options.hostfile and options.slurm:
        raise UserError("--hostfile and --slurm name the nodes in two ways; give one of them")
    if not options.slurm and (options.nodes is not None or options.partition):
        raise UserError("--nodes and --partition are for --slurm; a hostfile names its hosts")
    for name in ("nodes", "port", "seconds"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name}={value} must be more than 0")
    from pretrain.config import load_recipe
    from pretrain.doctor.checks import judge_all, status_of, summary
    from pretrain.doctor.reach import ask_here, ask_over_slurm, ask_over_ssh
    from pretrain.launch.hosts import read_hostfile

    recipe = [options.config, *overrides] if options.config else []
    if recipe:
        load_recipe(recipe[0], recipe[1:])  # a wrong recipe is a wrong argument
        if Path(recipe[0]).is_file():
            recipe[0] = str(Path(recipe[0]).resolve())
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    request = Request(hosts, recipe, options.port, options.seconds)
    if options.slurm:
        answers, rows = ask_over_slurm(request, options.nodes, options.partition, os.environ)
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {"doctor": doctor}
