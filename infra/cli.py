"""The command ``yaware``: look up a subcommand in its package and run it.

A package is imported only when one of its subcommands runs. ``yaware --help`` is therefore fast, and this module imports
no package that depends on ``infra``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from infra.errors import UserError, nearest, storage_line
from infra.lean_imports import own_process

if TYPE_CHECKING:
    from infra.slurm.batch_script import CheckedCommand, JobSize

# subcommand -> (module with its COMMANDS table, one line of help)
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "cohort": ("data_pipeline.cli", "prepare raw brain scans, inspect a cohort, or simulate one as a BIDS folder"),
    "shards": ("data_pipeline.cli", "build, extend, describe, preview and verify WebDataset shards"),
    "pretrain": ("pretrain.cli", "pretrain an encoder from a recipe, on one host"),
    "plan": ("pretrain.forecast.cli", "show the steps, memory, network and time of a recipe on N hosts with G GPUs"),
    "launch": ("pretrain.launch.cli", "pretrain on the hosts of a hostfile; --slurm: submit a batch job"),
    "export": ("pretrain.weights.cli", "copy the encoder of a checkpoint into a folder (safetensors)"),
    "embed": ("pretrain.weights.cli", "compute features of scans with an exported encoder"),
    "readouts": ("pretrain.readouts.cli", "fit predictions of the proxies (age, ...) to an encoder's features"),
    "import-weights": ("pretrain.weights.cli", "convert published weights (BHB-10K) into an exported encoder"),
    "digests": ("pretrain.weights.cli", "write digests of the people of shards, by which others check for leakage"),
    "evaluate": ("evaluation.cli", "evaluate checkpoints on downstream tasks and log the results to MLflow"),
    "reliability": ("evaluation.retest.cli", "measure how well features repeat in people scanned several times"),
    "compare": ("evaluation.compare_cli", "compare evaluated checkpoints: tables, LaTeX and an HTML report"),
    "saliency": ("evaluation.compare_cli", "map which brain regions a checkpoint's prediction depends on"),
    "promote": ("evaluation.compare_cli", "register a checkpoint in MLflow's model registry under an alias"),
    "doctor": ("pretrain.doctor.cli", "check this machine, or the nodes of a hostfile or of SLURM, before a run"),
}


def batch_check(name: str) -> Callable[[list[str], JobSize], CheckedCommand]:
    """Return the function that checks the arguments of a subcommand before a batch job of SLURM runs it.

    It returns what the batch script needs, and raises UserError if the command would refuse its arguments.
    """
    checks: dict[str, Any] = importlib.import_module(SUBCOMMANDS[name][0]).BATCH_CHECKS
    return cast("Callable[[list[str], JobSize], CheckedCommand]", checks[name])


def usage() -> str:
    """Return the text of ``yaware --help``."""
    rows = "\n".join(f"  {name:<14} {text}" for name, (_, text) in SUBCOMMANDS.items())
    head = "usage: yaware COMMAND ...\n\nPretrain 3D brain-MRI encoders with y-Aware contrastive learning."
    return f"{head}\n\ncommands:\n{rows}\n\n`yaware COMMAND --help` lists the options of a command.\n"


def print_any_text() -> None:
    """Let a console that is not UTF-8 show what it can: other letters are printed as ``?`` instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand and return its exit status. A UserError, and an error of the
    file system, is printed as one line on stderr, with status 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"yaware {version('yaware')}")
        return 0
    name, *rest = arguments
    try:
        if name not in SUBCOMMANDS:
            allowed = ", ".join(SUBCOMMANDS)
            raise UserError(f"unknown command {name!r}{nearest(name, SUBCOMMANDS)}; commands are: {allowed}")
        return int(importlib.import_module(SUBCOMMANDS[name][0]).COMMANDS[name](rest) or 0)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        line = storage_line(error)
        if not line:
            raise
        print(f"yaware: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("yaware: interrupted", file=sys.stderr)
        return 130


def main() -> None:
    """Entry point of the console script."""
    own_process()
    print_any_text()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
