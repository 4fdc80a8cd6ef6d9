"""``yaware evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import UserError


def evaluate(arguments: list[str]) -> int:
    """Judge checkpoints on downstream tasks."""
    parser = argparse.ArgumentParser(
        prog="yaware evaluate",
        description=evaluate.__doc__,
        epilog="--finetune.KEY=VALUE sets how networks are trained",
    )
    parser.add_argument(
        "checkpoints", nargs="+", help="run folders (latest checkpoint), checkpoints/step-*, or exports"
    )
    parser.add_argument("--shards", required=True, help="folder of built shards")
    parser.add_argument(
        "--tasks", required=True, type=_names, help="shipped names or YAML files, as in ad,scz,age,site"
    )
    parser.add_argument(
        "--protocols", default=("paper",), type=_names,
        help="of paper (the default), linear, knn, mlp, finetune, scratch, voxels; as in linear,knn,voxels",
    )  # fmt: skip
    parser.add_argument(
        "--all-steps", action="store_true", help="every checkpoint of the run folders, not the latest alone"
    )
    parser.add_argument("--layer", help="features of a block inside the encoder, as in layer3 or denseblock2")
    parser.add_argument("--pooling", default=("mean",), type=_names, help="over that block's voxels: of mean, max, std")
    parser.add_argument("--experiment", default="yaware", help="MLflow experiment")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--leave-site-out", action="store_true", help="folds leave out whole sites")
    parser.add_argument(
        "--n-train", type=_whole_numbers, default=(100, 300, 500), help="learning curve: training scans"
    )
    parser.add_argument("--draws", type=int, default=10, help="training sets drawn of each size")
    parser.add_argument("--inner-repeats", type=int, default=1, help="times that inner folds are dealt anew")
    parser.add_argument("--mlp-trials", type=int, default=12, help="settings that Optuna tries for each fold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="CPUs for Ray (default: all, or the cluster of RAY_ADDRESS)")
    parser.add_argument(
        "--storage", type=Path, help="folder of unfinished searches (on a cluster, one that all nodes see)"
    )
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    options, rest = parser.parse_known_args(arguments)
    for name, least in (("folds", 2), ("draws", 1), ("inner_repeats", 1), ("mlp_trials", 1)):
        if getattr(options, name) < least:
            words, found = name.replace("_", " "), getattr(options, name)
            raise UserError(f"--{words.replace(' ', '-')}={found}: at least {least} {words} are needed")
    from evaluation.protocols.evaluate import evaluate as run
    from evaluation.protocols.protocols import Protocol
    from infra.tracking.runs import ui_command
    from infra.tracking.tracker import default_uri
    from pretrain.weights.folder import list_checkpoints

    protocol = Protocol(
        options.tasks, options.folds, options.n_train, options.draws, options.seed, options.protocols,
        options.inner_repeats, options.leave_site_out, options.layer, options.pooling, options.mlp_trials,
        _fine_tuning(rest, options.seed),
    )  # fmt: skip
    given = [step for path in options.checkpoints for step in (list_checkpoints(path) if options.all_steps else [path])]
    run(
        given, options.shards, protocol, experiment=options.experiment, tracking_uri=options.tracking_uri,
        workers=options.workers, storage=options.storage,
    )  # fmt: skip
    print(f"evaluate: logged to MLflow; to browse: {ui_command(options.tracking_uri or default_uri())}")
    return 0


def _fine_tuning(overrides: list[str], seed: int) -> Any:
    """``--finetune.KEY=VALUE`` as settings; UserError for any other argument."""
    from evaluation.protocols.finetune import FineTuning
    from infra.settings import load_settings

    prefix = "--finetune."
    for override in overrides:
        if not override.startswith(prefix):
            raise UserError(f"argument {override} is not known; see yaware evaluate --help")
    given = load_settings(FineTuning, None, [f"--seed={seed}", *(f"--{each[len(prefix) :]}" for each in overrides)])
    if given.batch < 2 * given.ranks:
        raise UserError(f"--finetune.batch={given.batch} leaves {given.ranks} ranks fewer than 2 scans each; give more")
    return given


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 50,100,200") from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {"evaluate": evaluate}
