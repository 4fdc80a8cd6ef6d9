"""Options of ``sbatch`` and ``srun`` that a user gives: which are possible, and what they ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from infra.errors import UserError

# Options that take the job away from the batch script, or its number from this program; and those that contradict a script,
# with what to use instead.
REFUSED = {
    **dict.fromkeys(("wrap", "parsable", "test-only", "wait", "clusters", "help", "version", "quiet"),
                    "leave it out, or call sbatch yourself"),
    "array": "submit one job a run",
    "nodes": "use --nodes N",
    **dict.fromkeys(("ntasks", "ntasks-per-gpu", "gpus", "gpus-per-task", "gpus-per-socket"), "use --nodes N and --gpus G"),
    "export": "leave it out: the job takes the variables of this shell",
    "export-file": "leave it out: the job takes the variables of this shell",
    "chdir": "type the command in the folder in which it is to run",
}  # fmt: skip
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE | re.ASCII)
SIGNAL = re.compile(r"(?:SIG)?USR1@(\d{1,5})", re.ASCII)
NUMBER = re.compile(r"[1-9]\d{0,5}", re.ASCII)


def gpu_options(work: str, gpus: int) -> dict[str, str | None]:
    """Return the options for so many GPUs on each node; None takes an option away. Pretraining has a rank for each GPU."""
    ranks: dict[str, str | None] = {"ntasks-per-node": str(max(1, gpus))} if work == "pretrain" else {}
    return {"gpus-per-node": str(gpus) if gpus else None, **ranks}


def free_options(texts: Sequence[str], taken: Mapping[str, object]) -> dict[str, str]:
    """Return the options that ``--sbatch-option KEY=VALUE`` gives; KEY alone is an option without a value.

    Raises UserError if a key is no name of an option, is given twice, is among ``taken``, or would break the job.
    """
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(
                f"--sbatch-option={text}: {key!r} is no long option of sbatch; write KEY=VALUE, for example qos=low"
            )
        if equals and not value:
            raise UserError(
                f"--sbatch-option={text} has no value; write {key}=VALUE, or {key} for an option without one"
            )
        if key in taken or key in options:
            raise UserError(f"--sbatch-option={text}: {key} is given twice; give it once")
        if key in REFUSED:
            raise UserError(f"--sbatch-option={text}: {key} is not possible here; {REFUSED[key]}")
        options[key] = value
    return options


def gpus_asked(options: Mapping[str, str]) -> int | None:
    """Return the GPUs of a node that ``gpus-per-node`` or ``gres`` asks for; None if neither names GPUs.

    Raises UserError if both do, or if a number cannot be read.
    """
    found = {key: _gpus_of(key, options[key]) for key in ("gpus-per-node", "gres") if key in options}
    named = {key: count for key, count in found.items() if count is not None}
    if len(named) > 1:
        raise UserError(
            f"gpus-per-node={options['gpus-per-node']} and gres={options['gres']} ask for GPUs twice; give one"
        )
    return next(iter(named.values()), None)


def _gpus_of(key: str, value: str) -> int | None:
    """Return the GPUs of a value such as ``4``, ``h100:4`` or, of gres, ``gpu:h100:4,shard:2``; None if it names none."""
    total = None
    for part in value.split(","):
        words = re.sub(r"\(.*\)$", "", part).split(":")
        if key == "gres":
            if words[0] != "gpu":
                continue
            words = words[1:] or ["1"]
        # The type alone asks for one GPU.
        text = words[-1] if len(words) > 1 or words[-1][:1].isdigit() else "1"
        if len(words) > 2 or not re.fullmatch(r"\d{1,4}", text, re.ASCII):
            example = "gpu:h100:4" if key == "gres" else "h100:4"
            raise UserError(f"{key}={value}: {part!r} names no number of GPUs; write for example {key}={example}")
        total = (total or 0) + int(text)
    return total


def check_values(options: Mapping[str, str]) -> None:
    """Raise UserError if a value cannot stand in a batch script, is of no form that sbatch reads, or contradicts another."""
    forms = {
        "time": (TIME, "minutes, hours:minutes:seconds or days-hours"),
        "mem": (re.compile(r"\d+[KMGT]?", re.IGNORECASE | re.ASCII), "megabytes, or a number with K, M, G or T"),
        "job-name": (re.compile(r"[^/\s%]+"), "a name without /, % and spaces: it names files"),
        "dependency": (re.compile(r"\S+"), "for example afterok:1234"),
        "signal": (SIGNAL, "USR1@SECONDS, which lets the job save before its time limit"),
        "nodes": (NUMBER, "a whole number of at least 1"),
        "ntasks-per-node": (NUMBER, "a whole number of at least 1"),
        "cpus-per-task": (NUMBER, "a whole number of at least 1"),
    }
    for key, value in options.items():
        form, allowed = forms.get(key, (re.compile(r".*"), "one line"))
        if not form.fullmatch(value) or "\n" in value:
            raise UserError(f"{key}={value!r} cannot be used; allowed: {allowed}")
    lead = SIGNAL.fullmatch(options.get("signal", ""))
    if lead and seconds_of(options.get("time", "UNLIMITED")) <= int(lead[1]):
        raise UserError(f"time={options['time']} is too short: the job is told to save {lead[1]} s before it; give more "
                        f"time, or --sbatch-option signal=USR1@SECONDS with fewer seconds")  # fmt: skip


def seconds_of(time: str) -> float:
    """Return the seconds of a time limit of SLURM: minutes, [[hours:]minutes:]seconds or days-hours[:minutes[:seconds]].

    0 means no limit, as for SLURM.
    """
    if not time[0].isdigit():
        return math.inf
    days, dash, rest = time.rpartition("-")
    numbers = [int(word) for word in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
    return total or math.inf
