"""Batch scripts for SLURM, written from those in ``infra/launch``: other options, and the arguments of the command."""

from __future__ import annotations

import os
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
    "prepare": ("prepare.sbatch", ("cohort", "prepare")),
    "build": ("build-shards.sbatch", ("shards", "build")),
    "evaluate": ("evaluate.sbatch", ("evaluate",)),
    "compare": ("compare.sbatch", ("compare",)),
}

RECIPE_COPY = "\0recipe"


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
        recipe: content of a recipe that is kept beside the batch script; RECIPE_COPY among the arguments stands for its
            path. Empty if the command reads no file that could change before the job starts.
        new: a folder that the command takes only if it is new, or holds hidden files alone.
    """

    arguments: list[str]
    folder: Path
    recipe: str = ""
    new: Path | None = None


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


def batch_script(template: Template, options: Mapping[str, str], arguments: Sequence[str], start: Path) -> str:
    """Return the text of a batch script.

    Args:
        template: the batch script of ``infra/launch``.
        options: options for sbatch.
        arguments: of the batch script.
        start: the folder in which the command runs.

    The job runs YAWARE_PYTHON of this shell, for example that of an image; without it, the Python of this process. Jobs on Ray
    are started by YAWARE_HOST_PYTHON, if this shell has it.
    """
    pythons = {"YAWARE_PYTHON": os.environ.get("YAWARE_PYTHON") or sys.executable}
    if host := os.environ.get("YAWARE_HOST_PYTHON"):
        pythons["YAWARE_HOST_PYTHON"] = host
    lines = ["#!/bin/bash", "# Written by `yaware launch --slurm`; it can be submitted again with sbatch."]
    lines += [f"#SBATCH --{key}={_quoted(value)}" if value else f"#SBATCH --{key}" for key, value in options.items()]
    lines += [f"SLURM_SUBMIT_DIR={shlex.quote(str(start))}"]
    lines += [f"export {name}={shlex.quote(python)}" for name, python in pythons.items()]
    lines += [f"set -- {shlex.join(arguments)}"]
    return "\n".join(lines) + "\n" + template.body


def _quoted(value: str) -> str:
    """Return a value as sbatch reads it in a line of options, where a space ends it and # begins a comment."""
    return value if re.fullmatch(r"[\w./:,=%@+-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
