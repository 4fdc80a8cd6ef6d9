"""``yaware evaluate`` and ``yaware compare``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from infra.errors import UserError


def evaluate(arguments: list[str]) -> int:
    """Probe checkpoints on downstream tasks."""
    parser = argparse.ArgumentParser(prog="yaware evaluate", description=evaluate.__doc__)
    parser.add_argument(
        "checkpoints", nargs="+", help="run folders (latest checkpoint), checkpoints/step-*, or exports"
    )
    parser.add_argument("--shards", required=True, help="folder of built shards")
    parser.add_argument("--tasks", required=True, help="shipped names or YAML files, as in ad,scz,age,site")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--n-train", type=_whole_numbers, default=(100, 300, 500), help="learning curve: training scans"
    )
    parser.add_argument("--draws", type=int, default=10, help="training sets drawn of each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="CPUs for Ray (default: all, or the cluster of RAY_ADDRESS)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    options = parser.parse_args(arguments)
    if options.folds < 2 or options.draws < 1:
        raise UserError(f"--folds={options.folds} --draws={options.draws}: at least 2 folds and 1 draw are needed")
    from evaluation.run import Protocol
    from evaluation.run import evaluate as run
    from infra.runs import ui_command
    from infra.tracking import default_uri

    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    protocol = Protocol(tasks, options.folds, tuple(options.n_train), options.draws, options.seed)
    run(
        options.checkpoints, options.shards, protocol, experiment=options.experiment,
        tracking_uri=options.tracking_uri, workers=options.workers,
    )  # fmt: skip
    print(f"evaluate: logged to MLflow; to browse: {ui_command(options.tracking_uri or default_uri())}")
    return 0


def compare(arguments: list[str]) -> int:
    """Compare evaluated checkpoints, from MLflow's store alone."""
    parser = argparse.ArgumentParser(prog="yaware compare", description=compare.__doc__)
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment")
    parser.add_argument(
        "--filter", default="", help="MLflow filter over evaluation runs, as in \"tags.`yaware.step` = '100'\""
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="HTML report to write")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    options = parser.parse_args(arguments)
    from evaluation.compare import compare as read
    from evaluation.compare import print_comparison
    from evaluation.report import write_report
    from infra.runs import ui_command

    comparison = read(options.experiment, tracking_uri=options.tracking_uri, filter=options.filter)
    print_comparison(comparison)
    written = write_report(comparison, options.out)
    print(f"compare: report: {written[0].resolve().as_uri()}")
    print(f"compare: pictures and table beside it: {', '.join(path.name for path in written[1:])}")
    print(f"compare: MLflow: {ui_command(comparison.uri)}")
    return 0


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 50,100,200") from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {"evaluate": evaluate, "compare": compare}
