"""Checkpoints side by side. Everything comes from MLflow's store; the checkpoints themselves may be gone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.statistics import FIGURES, HIGHER_IS_BETTER, paired_difference
from infra import runs as store
from infra.errors import UserError
from infra.tracking import default_uri

CURVES = ("loss", "lr", "grad_norm", "scans_per_second")


@dataclass
class Judged:
    """One evaluated checkpoint, as the store knows it."""

    name: str
    run: dict[str, Any]
    predictions: pd.DataFrame
    curve: pd.DataFrame
    embedding: pd.DataFrame


@dataclass
class Comparison:
    """What the table and the report show."""

    experiment: str
    uri: str
    judged: list[Judged]
    trainings: dict[str, dict[str, list[tuple[int, float]]]]  # run name -> metric -> (step, value)
    table: pd.DataFrame  # a row per checkpoint and figure: value, low, high
    differences: pd.DataFrame  # a row per task and pair: difference, low, high
    provenance: list[dict[str, str]] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        """Whether any of the checkpoints was judged on simulated scans."""
        return any(each.run["tags"].get("yaware.simulated") == "True" for each in self.judged)


def compare(experiment: str, *, tracking_uri: str | None = None, filter: str = "") -> Comparison:
    """Read the newest evaluation of every checkpoint of an experiment and compare them in pairs.

    ``filter`` is one of MLflow's over the evaluation runs, such as ``tags."yaware.method" = 'SimCLR'``.
    """
    uri = tracking_uri or default_uri()
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for run in store.runs(uri, experiment, "evaluation", filter):  # newest first
        if run["status"] == "FINISHED":
            newest.setdefault((run["tags"]["yaware.run_name"], run["tags"]["yaware.step"]), run)
    if not newest:
        raise UserError(f"experiment {experiment!r} in {uri} has no finished evaluation; run `yaware evaluate` first")
    names = [name for name, _ in newest]
    with tempfile.TemporaryDirectory() as temporary:
        judged = [
            _read(uri, run, name if names.count(name) == 1 else f"{name}, step {step}", Path(temporary) / run["run_id"])
            for (name, step), run in newest.items()
        ]
    judged.sort(key=lambda each: -_rank(each))
    trainings = {
        run["name"]: {metric: store.metric_history(uri, run["run_id"], metric) for metric in CURVES}
        for run in reversed(store.runs(uri, experiment, "pretraining"))
        if any(run["run_id"] == each.run["tags"].get("yaware.pretraining_run") for each in judged)
    }
    return Comparison(
        experiment, uri, judged, {name: curves for name, curves in trainings.items() if curves["loss"]},
        figures_table(judged), differences_table(judged), [_provenance(each) for each in judged],
    )  # fmt: skip


def figures_table(judged: list[Judged]) -> pd.DataFrame:
    """checkpoint, task, title, figure, value, low, high: as logged."""
    rows = []
    for each in judged:
        for (task, kind, title), _ in each.predictions.groupby(["task", "kind", "title"], sort=False):
            for figure in FIGURES[str(kind)]:
                key, metrics = f"{task}.{figure}", each.run["metrics"]
                rows.append(
                    {"checkpoint": each.name, "task": task, "title": title, "figure": figure, "value": metrics.get(key),
                     "low": metrics.get(f"{key}.low"), "high": metrics.get(f"{key}.high")}
                )  # fmt: skip
    return pd.DataFrame(rows)


def differences_table(judged: list[Judged]) -> pd.DataFrame:
    """task, figure, first, second, difference, low, high for every pair judged on the same scans, over participants."""
    rows = []
    for number, first in enumerate(judged):
        for second in judged[number + 1 :]:
            both = first.predictions.merge(
                second.predictions, on=["task", "kind", "title", "key"], suffixes=("", "_other")
            )
            for (task, kind), part in both.groupby(["task", "kind"], sort=False):
                same = (
                    len(part) == (first.predictions["task"] == task).sum() == (second.predictions["task"] == task).sum()
                )
                if not same:
                    continue  # judged on other scans: no pairs to compare
                figure = next(iter(FIGURES[str(kind)]))
                labels, one, other, people = (
                    part[c].to_numpy() for c in ("label", "answer", "answer_other", "participant")
                )
                value, low, high = paired_difference(FIGURES[str(kind)][figure], labels, one, other, people)
                rows.append(
                    {"task": task, "figure": figure, "first": first.name, "second": second.name, "difference": value,
                     "low": low, "high": high}
                )  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "figure", "first", "second", "difference", "low", "high"])


def verdict(row: Any) -> str:
    """In words: which of a pair is better, if the interval leaves 0 out."""
    if row.low <= 0 <= row.high:
        return "no difference shown"
    higher, lower = (row.first, row.second) if row.difference > 0 else (row.second, row.first)
    if row.figure == "bacc":
        return f"{higher} higher"  # good for a diagnosis, bad for a site
    return f"{higher if HIGHER_IS_BETTER[row.figure] else lower} better"


def print_comparison(comparison: Comparison) -> None:
    """The table on the terminal, and the paired differences below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 118)
    kind = "simulated data" if comparison.simulated else "data"
    table = Table(title=f"experiment {comparison.experiment}, {kind}: value [95 % interval]", title_justify="left")
    table.add_column("checkpoint")
    keys = list(dict.fromkeys(zip(comparison.table["task"], comparison.table["figure"], strict=True)))
    keys = [key for key in keys if key[1] != "r2"]
    for task, figure in keys:
        table.add_column(f"{task} {LABELS[figure]}", justify="right")
    for name, part in comparison.table.groupby("checkpoint", sort=False):
        cells = []
        for task, figure in keys:
            found = part[(part["task"] == task) & (part["figure"] == figure)]
            cells.append(shown(found.iloc[0]) if len(found) else "-")
        table.add_row(str(name), *cells)
    console.print(table)
    for row in comparison.differences.itertuples():
        sign = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        console.print(
            f"{row.task} {LABELS[str(row.figure)]}: {row.first} - {row.second} = {sign}: {verdict(row)}",
            highlight=False,
        )


LABELS = {"auc": "AUC", "bacc": "balanced accuracy", "mae": "MAE", "r2": "R²"}


def shown(row: Any) -> str:
    """``0.812 [0.75, 0.87]``; years with one digit."""
    if row["figure"] == "mae":
        return f"{row['value']:.2f} [{row['low']:.1f}, {row['high']:.1f}]"
    return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _read(uri: str, run: dict[str, Any], name: str, folder: Path) -> Judged:
    path = store.download(uri, run["run_id"], "evaluation", folder)
    return Judged(
        name, run, pd.read_parquet(path / "predictions.parquet"), pd.read_csv(path / "curve.csv"),
        pd.read_parquet(path / "embedding.parquet"),
    )  # fmt: skip


def _rank(each: Judged) -> float:
    """Mean AUC over binary tasks, by which the checkpoints are ordered."""
    values = [value for key, value in each.run["metrics"].items() if key.endswith(".auc")]
    return sum(values) / len(values) if values else 0.0


def _provenance(each: Judged) -> dict[str, str]:
    tags, params = each.run["tags"], each.run["params"]
    return {
        "checkpoint": each.name,
        "method": tags.get("yaware.method", ""),
        "encoder": tags.get("yaware.encoder", ""),
        "step": tags.get("yaware.step", ""),
        "weights": tags.get("yaware.weights_sha256", "")[:12],
        "manifest": tags.get("yaware.manifest_digest", "")[:12],
        "pretraining run": tags.get("yaware.pretraining_run", "")[:12] or "-",
        "evaluation run": each.run["run_id"][:12],
        "version": tags.get("yaware.version", ""),
        "protocol": f"{params.get('folds')} folds, {params.get('draws')} draws, seed {params.get('seed')}",
    }
