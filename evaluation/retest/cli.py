"""``yaware reliability``: the command line of ``evaluation.reliability``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from evaluation.cli import named_tables
from infra.errors import UserError
from infra.files import check_output


def reliability(arguments: list[str]) -> int:
    """Measure how well features and predictions repeat in people who were scanned several times or on several scanners."""
    options = vars(_parser().parse_args(arguments))
    out, names = options.pop("out"), options.pop("name")
    check_output(out, "--out")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out={out} is a page of HTML; give a name that ends in .html")
    features = named_tables(options.pop("features") or [], names or [])
    from evaluation.retest.api import reliability as run
    from evaluation.retest.page import summary_text
    from infra.tracking.runs import ui_command
    from infra.tracking.tracker import default_uri

    found = run(features=features, **options)
    print(summary_text(found.summary).to_string(index=False))
    page, *others = found.report(out)
    print(f"reliability: page: {page.resolve().as_uri()}")
    print(f"reliability: tables and picture beside it: {', '.join(path.name for path in others)}")
    print(f"reliability: logged to MLflow; to browse: {ui_command(options['tracking_uri'] or default_uri())}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yaware reliability", description=reliability.__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", help="run folders (latest checkpoint), checkpoints/step-*, or exports")
    add("--shards", required=True, help="folder of built shards, in which some people have several scans")
    add("--features", nargs="+", action="append", metavar="TABLE", help="features that other software computed, as for yaware "
        "evaluate; a column predicted_NAME is a prediction, predicted_age in years")  # fmt: skip
    add("--name", action="append", help="name of the features in the results; once per --features")
    add("--encoder", action="append", metavar="MODULE:FACTORY", help="an encoder of others, as for yaware evaluate")
    add("--cohort", type=Path, help="with --encoder: the cohort whose files the encoder reads")
    add("--modality", help="with --encoder: of these files (default: that of the shards)")
    add("--columns", type=Path, help="with --encoder: YAML file that declares the columns of the cohort's tables")
    add("--seen", type=Path, metavar="FILE", help="digests of the people that the encoders of others were trained on (yaware "
        "digests); if some of them are measured, the features are refused")  # fmt: skip
    add("--voxels", action="store_true", help="measure also 5,000 drawn voxels")
    add("--scanner", default="site", help="column that tells scanners apart (default: site)")
    add("--query", help="pandas query that selects the scans, for example 'split == \"downstream\"': people on whom no "
        "encoder was trained (default: everybody with several scans)")  # fmt: skip
    add("--layer", help="use the features of a block inside the encoder, for example layer3")
    add("--pooling", default=("mean",), type=lambda text: tuple(text.split(",")), help="pooling over its voxels")
    add("--all-steps", action="store_true", help="measure every checkpoint of the run folders")
    add("--seed", type=int, default=0, help="seed of the drawn voxels and people")
    add("--experiment", default="yaware", help="MLflow experiment (default: yaware)")
    add("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
    add("--cache", type=Path, help="folder of computed features")
    add("--out", type=Path, default=Path("reliability.html"), help="HTML page to write (default: reliability.html)")
    return parser


COMMANDS: dict[str, Callable[[list[str]], int]] = {"reliability": reliability}
