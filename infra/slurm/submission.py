"""Submit a batch script with the options that it names, and tell where its log is."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.errors import UserError

# The variables of sbatch for an option; those of the other options are SBATCH_ and the option's name.
OTHER_NAMES = {
    "time": ("SBATCH_TIMELIMIT",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "gpus-per-node": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_GPUS_PER_TASK", "SBATCH_GRES"),
    "gres": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_GPUS_PER_TASK", "SBATCH_GRES"),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
}
# Those that contradict the job, whatever its options are.
NEVER = ("SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SBATCH_EXPORT", "SBATCH_GET_USER_ENV", "SBATCH_WAIT",
         "SBATCH_TEST_ONLY")  # fmt: skip
# Options of the batch scripts that a variable of the user may replace: they change neither the command nor its log.
REPLACEABLE = ("time",)


def without_conflicts(
    variables: Mapping[str, str], options: Mapping[str, str], typed: Mapping[str, object]
) -> tuple[dict[str, str], list[str]]:
    """Return an environment in which no variable of sbatch replaces an option, and a line for each that was taken out.

    Args:
        variables: the environment.
        options: of the batch script, over whose lines sbatch's variables win.
        typed: those of them that the user typed.
    """
    removed = dict.fromkeys(NEVER, "it is not possible here")
    for key, value in options.items():
        if key in typed or key not in REPLACEABLE:
            for name in OTHER_NAMES.get(key, (f"SBATCH_{key.upper().replace('-', '_')}",)):
                removed[name] = f"the job has --{key}{'=' + value if value else ''}"
    kept = {name: value for name, value in variables.items() if name not in removed}
    said = [f"{name}={variables[name]} is not used: {removed[name]}" for name in sorted(removed) if name in variables]
    return kept, said


def submit(script: Path, options: Mapping[str, str], typed: Mapping[str, object]) -> str:
    """Submit a batch script and return the job's number. Raises UserError, in sbatch's words, if it is refused."""
    variables, said = without_conflicts(os.environ, options, typed)
    for line in said:
        print(f"launch: {line}", file=sys.stderr)
    command = ["sbatch", "--parsable", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split()).removeprefix("sbatch: error: ")
        raise UserError(f"sbatch refused {script}: {told}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout.strip().partition(";")[0]


def log_pattern(folder: Path) -> str:
    """Return the pattern of the log's path, in which sbatch replaces %x by the job's name and %j by its number."""
    return str(folder).replace("%", "%%") + "/%x-%j.log"


def log_path(pattern: str, name: str, job: str) -> str | None:
    """Return the path of a job's log; None if the pattern has a symbol that only SLURM can replace, as %N.

    Args:
        pattern: value of ``--output``.
        name: the job's name.
        job: the job's number.
    """
    values = {"x": name, "j": job, "u": _user(), "%": "%"}
    symbols = re.findall(r"%(\d*)(.?)", pattern)
    if "\\" in pattern or any(symbol not in values or (width and symbol != "j") for width, symbol in symbols):
        return None
    return re.sub(r"%(\d*)(.)", lambda match: values[match[2]].zfill(int(match[1] or 0)), pattern)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
