"""``yaware compare``, ``yaware saliency`` and ``yaware promote``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from infra.errors import UserError
from infra.files import check_output
from infra.slurm.batch_script import CheckedCommand, JobSize

STORE = "MLflow store (default: MLFLOW_TRACKING_URI, or else mlruns/mlflow.db)"


def compare(arguments: list[str]) -> int:
    """Compare evaluated checkpoints; only the MLflow store is needed."""
    options = _parse_compare(argparse.ArgumentParser, arguments)
    check_output(options.out, "--out")
    from evaluation.comparison.comparison import compare as compare_checkpoints
    from evaluation.comparison.terminal import print_comparison
    from infra.tracking.runs import ui_command

    comparison = compare_checkpoints(
        options.experiment, tracking_uri=options.tracking_uri, filter=options.filter, against=options.against
    )
    print_comparison(comparison)
    page, *others = comparison.report(options.out)
    print(f"compare: report: {page.resolve().as_uri()}")
    print(f"compare: tables and plots beside it: {', '.join(path.name for path in others)}")
    print(f"compare: MLflow: {ui_command(comparison.uri)}")
    return 0


def check_batch_compare(arguments: list[str], size: JobSize) -> CheckedCommand:
    """Check the arguments of ``yaware compare`` for a batch job. Raises UserError."""
    from infra.slurm.parser import OneLineParser

    options = _parse_compare(OneLineParser, arguments)
    check_output(options.out, "--out")
    return CheckedCommand(arguments, options.out.parent)


def _parse_compare(parser_class: type[argparse.ArgumentParser], arguments: list[str]) -> argparse.Namespace:
    parser = parser_class(prog="yaware compare", description=compare.__doc__)
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment (default: yaware)")
    parser.add_argument(
        "--filter",
        default="",
        help="MLflow filter over the evaluation runs, for example \"tags.`yaware.step` = '100'\"",
    )
    parser.add_argument(
        "--against", help="compare all checkpoints with this one only (default: with each of their protocol)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="HTML report to write (default: report.html)"
    )
    parser.add_argument("--tracking-uri", help=STORE)
    return parser.parse_args(arguments)


def saliency(arguments: list[str]) -> int:
    """Map the brain regions that an evaluated checkpoint's scores depend on, for the report of yaware compare."""
    parser = argparse.ArgumentParser(prog="yaware saliency", description=saliency.__doc__)
    parser.add_argument("checkpoint", help="evaluated run folder, checkpoints/step-* or export")
    parser.add_argument("--shards", required=True, help="folder of the shards that it was evaluated on")
    parser.add_argument("--task", required=True, help="a task that it was evaluated on, for example ad")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment of the evaluation (default: yaware)")
    parser.add_argument("--scans", type=int, default=16, help="held-out scans to average over (default: 16)")
    parser.add_argument("--cubes", type=int, default=6, help="cubes along the longest side of the volume (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of scans (default: 0)")
    parser.add_argument(
        "--cache", type=Path, help="folder of computed features (default: .features in the shards, or the user's cache)"
    )
    parser.add_argument("--tracking-uri", help=STORE)
    options = parser.parse_args(arguments)
    for name in ("scans", "cubes"):
        if getattr(options, name) < 2:
            raise UserError(f"--{name}={getattr(options, name)} is too small; give at least 2")
    from evaluation.protocols.saliency import add_saliency

    maps = add_saliency(
        options.checkpoint, options.shards, options.task, experiment=options.experiment,
        tracking_uri=options.tracking_uri, scans=options.scans, cubes=options.cubes, seed=options.seed,
        cache=options.cache,
    )  # fmt: skip
    print(
        f"saliency: {options.task}: map of {int(maps['scans'])} scans with cubes of {int(maps['side'])} voxels a side, stored "
        "in the evaluation's run; yaware compare shows it"
    )
    return 0


def promote(arguments: list[str]) -> int:
    """Register a checkpoint in MLflow's model registry under an alias."""
    parser = argparse.ArgumentParser(prog="yaware promote", description=promote.__doc__)
    parser.add_argument(
        "checkpoint",
        help="a model id, a run id (its last checkpoint), the name of a pretraining, or NAME@ALIAS in the registry",
    )
    parser.add_argument("--name", required=True, help="registered model, for example brain-encoder")
    parser.add_argument("--alias", required=True, help="alias of this version, for example champion")
    parser.add_argument("--step", type=int, help="step of the run's checkpoint (default: its last)")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment in which a run's name is looked up")
    parser.add_argument("--tracking-uri", help=STORE)
    options = parser.parse_args(arguments)
    from infra.tracking.registry import find_checkpoint
    from infra.tracking.registry import promote as register
    from infra.tracking.tracker import default_uri

    uri = options.tracking_uri or default_uri()
    checkpoint = find_checkpoint(uri, options.checkpoint, experiment=options.experiment, step=options.step)
    version = register(uri, checkpoint, options.name, options.alias)
    print(
        f"promote: {checkpoint['name']} step {checkpoint['step']} is {options.name} version {version}, alias {options.alias}"
    )
    print(f"promote: weights: {checkpoint['path']}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare, "promote": promote, "saliency": saliency,
}  # fmt: skip
BATCH_CHECKS: dict[str, Callable[[list[str], JobSize], CheckedCommand]] = {"compare": check_batch_compare}
