"""``yaware evaluate``: the command line of ``evaluation.evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.slurm.batch_script import CheckedCommand, JobSize

FINETUNE = "--finetune."


def evaluate(arguments: list[str]) -> int:
    """Evaluate checkpoints on downstream tasks."""
    options, rest = _parser().parse_known_intermixed_args(arguments)
    fine_tuning = _fine_tuning_options(rest)
    from evaluation.protocols.evaluate import evaluate as run
    from infra.tracking.runs import ui_command
    from infra.tracking.tracker import default_uri

    run(**{**vars(options), **_tables(options)}, finetune=fine_tuning)
    print(f"evaluate: logged to MLflow; to browse: {ui_command(options.tracking_uri or default_uri())}")
    return 0


def check_batch(arguments: list[str], size: JobSize) -> CheckedCommand:
    """Check the arguments of ``yaware evaluate`` for a batch job: settings, and the tasks if the shards should be there.

    Raises UserError if one cannot be used.
    """
    from dataclasses import fields

    from data_pipeline.storage.manifest import Manifest
    from evaluation.protocols.candidates import checkpoint_paths
    from evaluation.protocols.protocols import checked_settings
    from evaluation.protocols.settings import EvaluationSettings
    from evaluation.tasks.tasks import check_names, check_task_file, load_task
    from infra.slurm.parser import OneLineParser
    from pretrain.weights.folder import find_encoder

    options, rest = _parser(OneLineParser).parse_known_intermixed_args(arguments)
    _tables(options)
    names = {field.name for field in fields(EvaluationSettings)} & vars(options).keys()
    given = {name: getattr(options, name) for name in names}
    settings = checked_settings(**given, finetune=_fine_tuning_options(rest))
    check_names(settings.tasks)
    for name in settings.tasks:
        check_task_file(name)
    if not size.waits:
        manifest = Manifest.load(options.shards)
        for name in settings.tasks:
            load_task(name, manifest, settings.folds)
        for path in checkpoint_paths(options.checkpoints, all_steps=options.all_steps) if options.checkpoints else ():
            find_encoder(path)
    return CheckedCommand(arguments, Path())


def _parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser; its options have the names of the arguments of ``evaluation.evaluate``."""
    parser = parser_class(
        prog="yaware evaluate",
        description=evaluate.__doc__,
        epilog="--finetune.KEY=VALUE sets how the protocols finetune and scratch train networks",
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", help="run folders, checkpoints/step-*, exports, or hf://owner/name@revision")
    _add_feature_options(parser)
    add("--shards", required=True, help="folder of built shards")
    add("--tasks", required=True, type=_names, help="shipped tasks or YAML files, for example ad,scz,age,site")
    add("--protocols", default=("paper",), type=_names,
        help="paper (the default), linear, knn, mlp, finetune, scratch or voxels, or several: linear,knn,voxels")  # fmt: skip
    add("--all-steps", action="store_true", help="evaluate every checkpoint of the run folders, not only the latest")
    add("--layer", help="use the features of a block inside the encoder, for example layer3 or denseblock2; own: those of its "
        "end; auto: block, pooling and scale are chosen on the inner folds of each training set; default of paper and linear: "
        "the own features and spatial ones")  # fmt: skip
    add(
        "--pooling",
        default=("mean",),
        type=_names,
        help="pooling over the voxels of that block, or of the last map: mean, max, std, grid2 to grid8, none",
    )
    add("--scale", default="each", help="paper, linear: each feature has variance 1, or one scale for all: each, all")
    add("--readouts", default="auto", help="paper, linear: give the predicted proxies (yaware readouts) to the model beside "
        "the features: free of the penalty, or penalised, with a penalty of their own that is chosen on inner folds; auto: "
        "free if every checkpoint has some, but not in multiclass tasks; auto, no, free, penalised")  # fmt: skip
    add("--experiment", default="yaware", help="MLflow experiment")
    add("--folds", type=int, default=5, help="number of outer folds")
    add("--leave-site-out", action="store_true", help="make folds of whole sites")
    add("--n-train", type=_whole_numbers, default=(100, 300, 500), help="training-set sizes of learning curves")
    add("--draws", type=int, default=10, help="training sets drawn of each size")
    add("--inner-repeats", type=int, default=1, help="number of shuffles of the inner folds")
    add("--mlp-trials", type=int, default=12, help="settings that Optuna tries for each fold of protocol mlp")
    add("--repeats", type=int, default=3, help="nested cross-validations of all scans, with other folds each")
    add("--halvings", type=int, default=10,
        help="divisions of the participants into halves, for intervals that include the training sets; 0: none")  # fmt: skip
    add("--permutations", type=int, default=0,
        help="refits with permuted features for an exact test of better than chance, for example 199; each costs one "
        "cross-validation (default: none)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of folds, draws and models")
    add("--workers", type=int, help="CPUs for Ray (default: all, or the cluster of RAY_ADDRESS)")
    add("--search", default="auto", choices=("auto", "ray", "here"), help="search the grids of paper, linear, knn and voxels "
        "in Ray Tune (ray), in this process (here), or in Ray Tune if there is a cluster or much work (auto)")  # fmt: skip
    add(
        "--cache", type=Path, help="folder of computed features (default: .features in the shards, or the user's cache)"
    )
    add("--storage", type=Path, help="folder of unfinished searches; on a cluster, one that all nodes see")
    add("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    return parser


def _add_feature_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of features that other software computed."""
    add = parser.add_argument
    add("--features", nargs="+", action="append", metavar="TABLE", help="evaluate features that other software computed: a "
        ".tsv, .csv, .parquet or .npz with a row per scan, or several whose columns are put side by side; FreeSurfer's and "
        "CAT12's tables as they are; repeat the option for more candidates")  # fmt: skip
    add(
        "--name",
        action="append",
        help="name of the features in the results (default: of the first file); once per --features",
    )
    add("--encoder", action="append", metavar="MODULE:FACTORY", help="evaluate an encoder of others: a Python function that "
        "returns an object with prepare(path) and embed(batch); its code is run, on the files of --cohort")  # fmt: skip
    add("--cohort", type=Path, help="with --encoder: the cohort whose files the encoder reads")
    add("--modality", help="with --encoder: of these files: vbm, t1w or quasiraw (default: that of the shards)")
    add("--seen", type=Path, metavar="FILE", help="digests of the people that the encoders of others were trained on (yaware "
        "digests); features of test people among them are refused")  # fmt: skip
    add("--columns", type=Path, help="with --encoder: YAML file that declares the columns of the cohort's tables")
    add(
        "--join",
        action="store_true",
        help="evaluate each checkpoint also with each table's columns beside its features",
    )
    add("--common-scans", action="store_true",
        help="evaluate all candidates on the scans that every table has (default: a missing scan is an error)")  # fmt: skip


def _tables(options: argparse.Namespace) -> dict[str, Any]:
    """Return ``features`` and ``name`` as ``evaluation.evaluate`` takes them.

    Raises UserError if the names are not as many as the features, or if there is nothing to evaluate.
    """
    groups, names = options.features or [], options.name or []
    if not groups and not options.checkpoints and not options.encoder:
        raise UserError(
            "there is nothing to evaluate; name checkpoints, a table of features (--features) or an --encoder"
        )
    return {"features": named_tables(groups, names), "name": None}


def named_tables(groups: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, Sequence[str]] | None:
    """Return the files of ``--features`` by their ``--name``, or by that of their first file; None without files.

    Raises UserError if the names are not as many as the features, or if two are equal.
    """
    if names and len(names) != len(groups):
        raise UserError(f"--name is given {len(names)} times and --features {len(groups)} times; name each once")
    titles = names or [Path(group[0]).stem for group in groups]
    repeated = sorted({title for title in titles if titles.count(title) > 1})
    if repeated:
        raise UserError(f"two tables of features are named {repeated[0]!r}; give each a --name")
    return dict(zip(titles, groups, strict=True)) or None


def _fine_tuning_options(arguments: list[str]) -> dict[str, str]:
    """Return ``--finetune.KEY=VALUE`` as a dictionary. Raises UserError for any other argument."""
    options = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix(FINETUNE).partition("=")
        if not argument.startswith(FINETUNE) or not equals:
            raise UserError(f"argument {argument} is not known; see yaware evaluate --help")
        options[key] = value
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 50,100,200") from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {"evaluate": evaluate}
BATCH_CHECKS: dict[str, Callable[[list[str], JobSize], CheckedCommand]] = {"evaluate": check_batch}
