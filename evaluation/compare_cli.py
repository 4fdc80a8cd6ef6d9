"""``yaware compare``, ``yaware saliency`` and ``yaware promote``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from infra.errors import UserError

STORE = "MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)"


def compare(arguments: list[str]) -> int:
    """Compare evaluated checkpoints, from MLflow's store alone."""
    parser = argparse.ArgumentParser(prog="yaware compare", description=compare.__doc__)
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment")
    parser.add_argument(
        "--filter", default="", help="MLflow filter over evaluation runs, as in \"tags.`yaware.step` = '100'\""
    )
    parser.add_argument("--against", help="compare with this one alone (default: each with each of its protocol)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="HTML report to write")
    parser.add_argument("--tracking-uri", help=STORE)
    options = parser.parse_args(arguments)
    from evaluation.comparison.comparison import compare as read
    from evaluation.comparison.report import write_report
    from evaluation.comparison.terminal import print_comparison
    from infra.tracking.runs import ui_command

    comparison = read(
        options.experiment, tracking_uri=options.tracking_uri, filter=options.filter, against=options.against
    )
    print_comparison(comparison)
    written = write_report(comparison, options.out)
    print(f"compare: report: {written[0].resolve().as_uri()}")
    print(f"compare: tables and pictures beside it: {', '.join(path.name for path in written[1:])}")
    print(f"compare: MLflow: {ui_command(comparison.uri)}")
    return 0


def saliency(arguments: list[str]) -> int:
    """Map where in the brain an evaluated checkpoint's answer comes from, for the comparison's report."""
    parser = argparse.ArgumentParser(prog="yaware saliency", description=saliency.__doc__)
    parser.add_argument("checkpoint", help="run folder, checkpoints/step-* or export that was evaluated")
    parser.add_argument("--shards", required=True, help="folder of the shards that it was evaluated on")
    parser.add_argument("--task", required=True, help="a task that it was evaluated on, as in ad")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment of the evaluation")
    parser.add_argument("--scans", type=int, default=16, help="held-out scans to average over")
    parser.add_argument("--cubes", type=int, default=6, help="cubes along the longest side of the volume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tracking-uri", help=STORE)
    options = parser.parse_args(arguments)
    for name in ("scans", "cubes"):
        if getattr(options, name) < 2:
            raise UserError(f"--{name}={getattr(options, name)}: at least 2 are needed")
    from evaluation.protocols.saliency import add_saliency

    maps = add_saliency(
        options.checkpoint, options.shards, options.task, experiment=options.experiment,
        tracking_uri=options.tracking_uri, scans=options.scans, cubes=options.cubes, seed=options.seed,
    )  # fmt: skip
    print(
        f"saliency: {options.task}: {int(maps['scans'])} scans, cubes of {int(maps['side'])} voxels, in the evaluation's run; "
        "yaware compare shows it"
    )
    return 0


def promote(arguments: list[str]) -> int:
    """Register a checkpoint in MLflow's model registry, under an alias that others can ask for."""
    parser = argparse.ArgumentParser(prog="yaware promote", description=promote.__doc__)
    parser.add_argument(
        "checkpoint",
        help="a model id, a run id (its last checkpoint), the name of a pretraining, or NAME@ALIAS in the registry",
    )
    parser.add_argument("--name", required=True, help="registered model, as in brain-encoder")
    parser.add_argument("--alias", required=True, help="what this version is called, as in champion")
    parser.add_argument("--step", type=int, help="the checkpoint of this step, where a run is given")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment in which a run's name is looked up")
    parser.add_argument("--tracking-uri", help=STORE)
    options = parser.parse_args(arguments)
    from infra.tracking.registry import find_checkpoint
    from infra.tracking.registry import promote as register
    from infra.tracking.tracker import default_uri

    uri = options.tracking_uri or default_uri()
    found = find_checkpoint(uri, options.checkpoint, experiment=options.experiment, step=options.step)
    version = register(uri, found, options.name, options.alias)
    print(f"promote: {found['name']} step {found['step']} is {options.name} version {version}, alias {options.alias}")
    print(f"promote: weights: {found['path']}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare, "promote": promote, "saliency": saliency,
}  # fmt: skip
