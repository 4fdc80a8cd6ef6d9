"""Print what a demo has shown, read from its output files: ``python -m infra.demo.summary demo``."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from infra.errors import UserError
from infra.files import read_text

NEXT_STEPS = """Where to go on
  {report}    the comparison: open it in a browser
  {preview}    scans, and two augmented views of each
  mlflow ui --backend-store-uri {store}    runs, metrics and checkpoints
  docs/first_run.md    what each step did; docs/own_scans.md: the same with your scans"""


def summary(folder: Path) -> str:
    """Return the summary of the demo in ``folder``: data, pretraining, primary metrics, and where to go on.

    Raises UserError if a file is missing, that is, if the demo has not finished.
    """
    try:
        lines = ["What the demo has shown", *_data_lines(folder), *_run_lines(folder), *_metric_lines(folder)]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} not found: the demo has not finished; run `make demo`") from None
    paths = {"report": folder / "report.html", "preview": folder / "preview.png"}
    store = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
    return "\n".join([*lines, "", NEXT_STEPS.format(**paths, store=store)])


def _data_lines(folder: Path) -> Iterator[str]:
    manifest = json.loads(read_text(folder / "shards" / "manifest.json"))
    scans = sum(shard["scans"] for shard in manifest["shards"])
    shape = " x ".join(str(side) for side in manifest["grid"]["shape"])
    yield f"  data         {scans:,} simulated scans of {shape} voxels in {len(manifest['shards'])} shards"


def _run_lines(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "runs").glob("*/metrics.jsonl")):
        steps = [json.loads(line) for line in read_text(path).splitlines()]
        if not steps:
            continue  # the untrained encoder
        first, last = steps[0]["loss"], steps[-1]["loss"]
        yield f"  pretraining  {path.parent.name}: {len(steps)} steps, loss {first:.3f} at first, {last:.3f} at the end"


def _metric_lines(folder: Path) -> Iterator[str]:
    """Yield a table of the primary metric of each task (the first of its rows), with 95 % intervals."""
    with (folder / "report_metrics.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    primary: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        primary.setdefault((row["checkpoint"], row["task"]), row)
    checkpoints, tasks = (list(dict.fromkeys(keys)) for keys in zip(*primary, strict=True))
    width = max(len(name) for name in [*checkpoints, "by chance"])
    yield "  evaluation   primary metric and 95 % interval on participants who were not trained on"
    header = "".join(f"{task + ' ' + primary[checkpoints[0], task]['metric']:>24}" for task in tasks)
    yield f"    {'':<{width}}{header}"
    for name in checkpoints:
        cells = [_cell(primary[name, task]) if (name, task) in primary else "" for task in tasks]
        yield f"    {name:<{width}}" + "".join(f"{cell:>24}" for cell in cells)
    chances = [primary[checkpoints[0], task]["chance"] for task in tasks]
    yield f"    {'by chance':<{width}}" + "".join(f"{float(chance):>24.2f}" for chance in chances)


def _cell(row: dict[str, str]) -> str:
    value, low, high = (float(row[column]) for column in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of the demo")
    print(summary(parser.parse_args().folder))
