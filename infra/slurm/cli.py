"""``yaware launch --slurm``: write the batch script of a command, and submit it."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from infra.cli import batch_check
from infra.errors import UserError
from infra.files import atomic_write, check_output
from infra.slurm.batch_script import (
    WORKS,
    JobSize,
    batch_script,
    check_values,
    free_options,
    gpu_options,
    log_path,
    log_pattern,
    read_template,
)
from infra.slurm.parser import OneLineParser

# Options of sbatch that have an option of the same name here, and what they mean.
SAME_NAME = {
    "partition": "partition", "time": "time limit, for example 12:00:00 or 2-12", "account": "account",
    "mem": "memory a node, for example 64G", "dependency": "for example afterok:1234",
    "job-name": "name of the job and of its files",
}  # fmt: skip


def launch_in_slurm(arguments: list[str]) -> int:
    """Write the batch script of a command and submit it to SLURM."""
    parsed = _parser().parse_args(arguments)
    template = read_template(parsed.work)
    merged = {**template.options, **_chosen_options(parsed)}
    options = {key: value for key, value in merged.items() if value is not None}
    check_values(options)
    tasks = int(options["nodes"].partition("-")[0]) * int(options["ntasks-per-node"])
    name, *rest = command = WORKS[parsed.work][1]
    checked = batch_check(name)([*rest, *parsed.arguments], JobSize(tasks, "dependency" in options))
    script = parsed.script or checked.folder / f"{options['job-name']}.sbatch"
    options["output"] = _output_option(parsed, script)
    text = batch_script(template, options, checked.arguments, Path.cwd())
    if parsed.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not found; submit from a host of the cluster, or add --dry-run and copy the script of "
                        f"`yaware {shlex.join(command)}` there")  # fmt: skip
    check_output(script, "--script")
    with atomic_write(script, "w") as stream:
        stream.write(text)
    _submit(script, options)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="yaware launch --slurm", description=launch_in_slurm.__doc__,
        epilog="Without an option the value of the batch script in infra/launch is used. An unfinished job puts itself back "
        "into the queue at its time limit and at a preemption.",
    )  # fmt: skip
    add = parser.add_argument
    add("--nodes", type=_at_least_one, metavar="N", help="number of nodes")
    add(
        "--gpus",
        type=_at_least_zero,
        metavar="G",
        help="GPUs a node; pretrain has a rank for each, and with 0 one rank a node",
    )
    add("--cpus-per-task", type=_at_least_one, metavar="C", help="CPUs a task; build and evaluate have one task a node")
    for name, text in SAME_NAME.items():
        add(f"--{name}", help=text)
    add(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch; may be repeated",
    )
    add("--script", type=Path, help="file to write; the log is put beside it (default: in the folder of the run, shards or "
        "report; for evaluate in this folder)")  # fmt: skip
    add("--dry-run", action="store_true", help="check, print the batch script, write and submit nothing")
    add("work", choices=WORKS, help="what to run")
    add(
        "arguments",
        nargs=argparse.REMAINDER,
        help="of `yaware pretrain`, `yaware shards build`, `yaware evaluate` or `yaware compare`",
    )
    return parser


def _at_least_one(text: str) -> int:
    return _number(text, 1)


def _at_least_zero(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _chosen_options(parsed: argparse.Namespace) -> dict[str, str | None]:
    """Return the options for sbatch that the user chose; None takes an option of the batch script away."""
    chosen: dict[str, str | None] = {}
    for name in ("nodes", "cpus-per-task", *SAME_NAME):
        value = getattr(parsed, name.replace("-", "_"))
        if value is not None:
            chosen[name] = str(value)
    if parsed.gpus is not None:
        chosen |= gpu_options(parsed.work, parsed.gpus)
    free = free_options(parsed.sbatch_option, chosen)
    for name in ("nodes", "ntasks-per-node"):
        if name in free and not free[name].isdigit():
            raise UserError(f"--sbatch-option={name}={free[name]} is not a whole number")
    if "dependency" in chosen and "kill-on-invalid-dep" not in free:
        # A job whose condition cannot come true any more is cancelled; some clusters would keep it in the queue.
        free["kill-on-invalid-dep"] = "yes"
    return {**chosen, **free}


def _output_option(parsed: argparse.Namespace, script: Path) -> str:
    given = [text.partition("=")[2] for text in parsed.sbatch_option if text.removeprefix("--").startswith("output=")]
    return given[0] if given else log_pattern(script.absolute().parent)


def _submit(script: Path, options: dict[str, str]) -> None:
    """Submit a batch script, and print the job's number, its log, and how to watch and cancel it."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()).removeprefix("sbatch: error: ")
        raise UserError(f"sbatch refused {script}: {said}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    job = done.stdout.strip().partition(";")[0]
    log = log_path(options["output"], options["job-name"], job)
    print(f"launch: wrote {script}")
    print(f"launch: submitted job {job}; its log: {log}")
    print(f"launch: to watch: squeue --jobs {job}; tail -F {shlex.quote(log)}")
    print(f"launch: to cancel: scancel {job}")
