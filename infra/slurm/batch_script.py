"""Batch scripts for SLURM, written from those in ``infra/launch``: other options, and the arguments of the command."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import UserError, nearest
from infra.files import read_text

TEMPLATES = Path(__file__).resolve().parents[1] / "launch"
# What can be submitted: the batch script, and the words of the command of `yaware` that it runs.
WORKS = {
    "pretrain": ("pretrain.sbatch", ("pretrain",)),
    "build": ("build-shards.sbatch", ("shards", "build")),
    "evaluate": ("evaluate.sbatch", ("evaluate",)),
    "compare": ("compare.sbatch", ("compare",)),
}
# Options that take the job away from the batch script, or its number from this program.
REFUSED = ("array", "wrap", "parsable", "test-only", "wait", "clusters", "help", "version", "quiet")
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


@dataclass(frozen=True)
class JobSize:
    """What the check of a command must know of the batch job that is to run it.

    Attributes:
        tasks: tasks on all nodes; for pretraining, ranks.
        waits: whether the job depends on others, so that its inputs may not exist yet.
    """

    tasks: int
    waits: bool


@dataclass(frozen=True)
class CheckedCommand:
    """A command whose arguments have been checked for a batch job.

    Attributes:
        arguments: the arguments of the batch script.
        folder: where the batch script and the job's log are written.
    """

    arguments: list[str]
    folder: Path


@dataclass(frozen=True)
class Template:
    """A batch script of ``infra/launch``: its options for sbatch by name, and the lines after them."""

    options: dict[str, str]
    body: str


def read_template(work: str) -> Template:
    """Return the batch script of a work. Raises UserError if the work is unknown."""
    if work not in WORKS:
        raise UserError(f"{work} cannot be submitted{nearest(work, WORKS)}; allowed: {', '.join(WORKS)}")
    lines = read_text(TEMPLATES / WORKS[work][0]).splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", "\n".join(lines), re.MULTILINE))
    return Template(options, "\n".join(lines[places[-1] + 1 :]) + "\n")


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
        key, _, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(
                f"--sbatch-option={text}: {key!r} is no long option of sbatch; write KEY=VALUE, for example qos=low"
            )
        if key in REFUSED:
            raise UserError(
                f"--sbatch-option={text}: {key} is not possible here; leave it out, or call sbatch yourself"
            )
        if key in taken or key in options:
            raise UserError(f"--sbatch-option={text}: {key} is given twice; give it once")
        options[key] = value
    return options


def check_values(options: Mapping[str, str]) -> None:
    """Raise UserError if a value cannot stand in a batch script, or is of no form that sbatch reads."""
    forms = {
        "time": (TIME, "minutes, hours:minutes:seconds or days-hours"),
        "mem": (re.compile(r"\d+[KMGT]?", re.IGNORECASE), "megabytes, or a number with K, M, G or T"),
        "job-name": (re.compile(r"[^/\s%]+"), "a name without /, % and spaces: it names files"),
        "dependency": (re.compile(r"\S+"), "for example afterok:1234"),
    }
    for key, value in options.items():
        form, allowed = forms.get(key, (re.compile(r".*"), "one line"))
        if not form.fullmatch(value) or "\n" in value:
            raise UserError(f"{key}={value!r} cannot be used; allowed: {allowed}")


def batch_script(template: Template, options: Mapping[str, str], arguments: Sequence[str], start: Path) -> str:
    """Return the text of a batch script.

    Args:
        template: the batch script of ``infra/launch``.
        options: options for sbatch.
        arguments: of the batch script.
        start: the folder in which the command runs.
    """
    lines = ["#!/bin/bash", "# Written by `yaware launch --slurm`; it can be submitted again with sbatch."]
    lines += [f"#SBATCH --{key}={_quoted(value)}" if value else f"#SBATCH --{key}" for key, value in options.items()]
    lines += [f"SLURM_SUBMIT_DIR={shlex.quote(str(start))}", f"YAWARE_PYTHON={shlex.quote(sys.executable)}",
              f"set -- {shlex.join(arguments)}"]  # fmt: skip
    return "\n".join(lines) + "\n" + template.body


def _quoted(value: str) -> str:
    """Return a value as sbatch reads it in a line of options, where a space ends it and # begins a comment."""
    return value if re.fullmatch(r"[\w./:,=%@+-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def log_pattern(folder: Path) -> str:
    """Return the pattern of the log's path, in which sbatch replaces %x by the job's name and %j by its number."""
    return str(folder).replace("%", "%%") + "/%x-%j.log"


def log_path(pattern: str, name: str, job: str) -> str:
    """Return the path of a job's log."""
    values = {"%x": name, "%j": job, "%%": "%"}
    return re.sub(r"%[xj%]", lambda match: values[match[0]], pattern)
