"""The command ``yaware``: finds a package's subcommand by name and runs it.

Packages are imported only when their subcommand is asked for, so that ``yaware --help`` answers at once and this
module imports nothing upward.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from infra.errors import UserError, nearest

# subcommand -> (module that holds COMMANDS, what it does)
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "cohort": ("data_pipeline.cli", "simulate a cohort of brain scans as a BIDS folder, or inspect one"),
    "shards": ("data_pipeline.cli", "build, preview, describe and verify WebDataset shards"),
    "pretrain": ("pretrain.cli", "pretrain an encoder from a recipe, through the deepspeed launcher"),
    "plan": ("pretrain.launch.cli", "what a run comes to before it is started: steps, memory, the line to type"),
    "launch": ("pretrain.launch.cli", "start a recipe on the hosts of a hostfile, through the deepspeed launcher"),
    "export": ("pretrain.weights.cli", "copy a checkpoint's encoder into a folder of its own (safetensors)"),
    "embed": ("pretrain.weights.cli", "features of NIfTI files from an exported encoder"),
    "import-weights": ("pretrain.weights.cli", "bring published weights (BHB-10K DenseNet121) into an export folder"),
    "evaluate": ("evaluation.cli", "probe checkpoints on downstream tasks, tuned by Ray, logged to MLflow"),
    "compare": ("evaluation.compare_cli", "compare evaluated checkpoints: tables, LaTeX and HTML report"),
    "saliency": ("evaluation.compare_cli", "map where in the brain an evaluated checkpoint's answer comes from"),
    "promote": ("evaluation.compare_cli", "register a checkpoint in MLflow's model registry under an alias"),
    "doctor": ("infra.doctor", "check this machine: compiler, libraries, GPUs, ports"),
}


def usage() -> str:
    """The text of ``yaware --help``."""
    rows = "\n".join(f"  {name:<14} {what}" for name, (_, what) in SUBCOMMANDS.items())
    head = "usage: yaware COMMAND ...\n\nPretraining of 3D brain-MRI encoders at scale."
    return f"{head}\n\ncommands:\n{rows}\n\n`yaware COMMAND --help` says more.\n"


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand and return its exit status; 2 and one line on stderr for what the user gave and is wrong."""
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
    except KeyboardInterrupt:
        print("yaware: interrupted", file=sys.stderr)
        return 130


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
