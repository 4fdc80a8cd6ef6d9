"""``yaware launch --slurm``: write the batch script of a command, and submit it."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.cli import batch_check
from infra.errors import UserError
from infra.files import atomic_write, check_output
from infra.slurm.batch_script import RECIPE_COPY, WORKS, JobSize, batch_script, read_template
from infra.slurm.options import check_values, free_options, gpu_options, gpus_asked
from infra.slurm.parser import OneLineParser
from infra.slurm.submission import log_path, log_pattern, submit

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
    typed = _chosen_options(parsed)
    merged = {**template.options, **typed}
    options = {key: value for key, value in merged.items() if value is not None}
    check_values(options)
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    name, *rest = command = WORKS[parsed.work][1]
    checked = batch_check(name)([*rest, *parsed.arguments], JobSize(tasks, "dependency" in options))
    script = parsed.script or checked.folder / f"{options['job-name']}.sbatch"
    if "output" not in typed:
        options["output"] = log_pattern(script.absolute().parent)
    if checked.new is not None:
        _check_outside(checked.new, {"--script": script, "--sbatch-option output": Path(options["output"])})
    # The name holds a part of the content's digest: another submission into the same folder does not change this job.
    if script.is_dir():
        raise UserError(f"--script={script} is a folder; give the path of the file to write")
    copy = script.with_name(f"{script.stem}-{hashlib.sha256(checked.recipe.encode()).hexdigest()[:12]}.yaml").absolute()
    words = [str(copy) if word == RECIPE_COPY else word for word in checked.arguments]
    text = batch_script(template, options, words, Path.cwd())
    if parsed.dry_run:
        print(text, end="")
        if checked.recipe:
            print(f"launch: {copy} is not written yet: a submission writes it", file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not found; submit from a host of the cluster, or add --dry-run and copy the script of "
                        f"`yaware {shlex.join(command)}` there")  # fmt: skip
    check_output(script, "--script")
    for path, content in ((copy, checked.recipe), (script, text)):
        if content:
            with atomic_write(path, "w") as stream:
                stream.write(content)
    job = submit(script, options, typed)
    print(f"launch: wrote {script}")
    if checked.recipe:
        print(
            f"launch: the job reads the recipe from {copy}, a copy with all overrides; edits of the file do not change it"
        )
    _print_watch(job, options)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="yaware launch --slurm", description=launch_in_slurm.__doc__,
        epilog="Without an option the value of the batch script in infra/launch is used. An unfinished job puts itself back "
        "into the queue at its time limit and at a preemption (not a comparison, which takes minutes: submit it again).",
    )  # fmt: skip
    add = parser.add_argument
    add("--nodes", type=_at_least_one, metavar="N", help="number of nodes")
    add(
        "--gpus",
        type=_at_least_zero,
        metavar="G",
        help="GPUs a node; pretrain has a rank for each, and with 0 one rank a node",
    )
    add(
        "--cpus-per-task",
        type=_at_least_one,
        metavar="C",
        help="CPUs a task; all works but pretrain have one task a node",
    )
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
        "report, in OUT/.jobs for prepare; for evaluate in this folder)")  # fmt: skip
    add("--dry-run", action="store_true", help="check, print the batch script, write and submit nothing")
    add("work", choices=WORKS, help="what to run")
    add(
        "arguments",
        nargs=argparse.REMAINDER,
        help="of `yaware cohort prepare`, `yaware pretrain`, `yaware shards build`, `yaware evaluate` or `yaware compare`",
    )
    return parser


def _at_least_one(text: str) -> int:
    return _number(text, 1)


def _at_least_zero(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _chosen_options(parsed: argparse.Namespace) -> dict[str, str | None]:
    """Return the options for sbatch that the user chose; None takes an option of the batch script away."""
    chosen: dict[str, str | None] = {}
    for name in ("nodes", "cpus-per-task", *SAME_NAME):
        value = getattr(parsed, name.replace("-", "_"))
        if value == "":
            raise UserError(f"--{name} is empty; give a value, or leave it out")
        if value is not None:
            chosen[name] = str(value)
    if parsed.gpus is not None:
        chosen |= gpu_options(parsed.work, parsed.gpus)
    free: dict[str, str | None] = {}
    given = free_options(parsed.sbatch_option, chosen)
    gpus = gpus_asked(given)
    if gpus is not None:
        if parsed.gpus is not None:
            raise UserError(
                f"--gpus={parsed.gpus} and --sbatch-option=gres={given['gres']} ask for GPUs twice; give one of them"
            )
        free = gpu_options(parsed.work, gpus) | ({"gpus-per-node": None} if "gres" in given else {})
    free |= given
    if "dependency" in chosen and "kill-on-invalid-dep" not in free:
        # A job whose condition cannot come true any more is cancelled; some clusters would keep it in the queue.
        free["kill-on-invalid-dep"] = "yes"
    return {**chosen, **free}


def _check_outside(new: Path, files: Mapping[str, Path]) -> None:
    """Raise UserError if one of the files, by option, would lie in a folder that must be new, and would not be hidden there."""
    for option, path in files.items():
        place, folder = path.absolute(), new.absolute()
        hidden = place != folder and place.is_relative_to(folder) and place.relative_to(folder).parts[0].startswith(".")
        if place.is_relative_to(folder) and not hidden:
            raise UserError(
                f"{option}={path} lies in {new}, which must be new when the job starts; choose another place"
            )


def _print_watch(job: str, options: dict[str, str]) -> None:
    """Print the job's number, its log, and how to watch and cancel it."""
    log = log_path(options["output"], options["job-name"], job)
    told = log or f"a file of the pattern {options['output']}, which SLURM completes when the job starts"
    print(f"launch: submitted job {job}; its log: {told}")
    print(f"launch: to watch: squeue --jobs {job}" + (f"; tail -F {shlex.quote(log)}" if log else ""))
    print(f"launch: to cancel: scancel {job}")
