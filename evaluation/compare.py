"""Checkpoints side by side. Everything comes from MLflow's store; the checkpoints themselves may be gone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import curves, tables
from evaluation.tables import Judged
from infra import runs as store
from infra.errors import UserError
from infra.tracking import default_uri

CURVES = ("loss", "lr", "grad_norm", "scans_per_second")


@dataclass
class Comparison:
    """What the table and the report show. ``judged`` holds every evaluation, ``last`` those of each run's last step."""

    experiment: str
    uri: str
    judged: list[Judged]
    last: list[Judged]
    trainings: dict[str, dict[str, list[tuple[int, float]]]]  # run name -> metric -> (step, value)
    table: pd.DataFrame  # tables.FIGURE_COLUMNS
    differences: pd.DataFrame  # tables.DIFFERENCE_COLUMNS
    curves: pd.DataFrame  # curves.CURVE_COLUMNS
    curve_differences: pd.DataFrame  # curves.DIFFERENCE_COLUMNS
    unpaired: list[str] = field(default_factory=list)  # why a pair was not compared
    provenance: list[dict[str, str]] = field(default_factory=list)
    recipes: dict[str, dict[str, str]] = field(default_factory=dict)  # run name -> key -> value, as pretrained

    @property
    def simulated(self) -> bool:
        """Whether any of the checkpoints was judged on simulated scans."""
        return any(each.run["tags"].get("yaware.simulated") == "True" for each in self.judged)

    @property
    def tasks(self) -> dict[str, tuple[str, str]]:
        """Task -> (kind, title), in the order in which they were asked for."""
        found: dict[str, tuple[str, str]] = {}
        for each in self.judged:
            for task in each.tasks:
                part = each.of(task).iloc[0]
                found.setdefault(task, (str(part["kind"]), str(part["title"])))
        return found


def compare(
    experiment: str, *, tracking_uri: str | None = None, filter: str = "", against: str | None = None
) -> Comparison:
    """Read the newest evaluation of every checkpoint and protocol of an experiment, and compare them in pairs.

    ``filter`` is one of MLflow's over the evaluation runs, such as ``tags.`yaware.method` = 'SimCLR'``. ``against`` names
    the checkpoint that others of its protocol are compared with; by default each is with each, while there are few.
    UserError where the store has no such experiment or checkpoint.
    """
    uri = tracking_uri or default_uri()
    with tempfile.TemporaryDirectory() as temporary:
        judged = [
            _read(uri, run, name, Path(temporary) / run["run_id"]) for name, run in _newest(uri, experiment, filter)
        ]
    names = [each.name for each in last_steps(judged)]
    if against is not None and against not in names:
        raise UserError(f"--against={against} is none of the checkpoints: {', '.join(names)}")
    table = tables.figures_table(judged)
    judged = _ordered(judged, table)
    last = last_steps(judged)
    differences, unpaired = tables.differences_table(last, against)
    curve_differences, other_draws = curves.curve_differences(last, against)
    pretrained = {each.run["tags"].get("yaware.pretraining_run") for each in judged}
    runs = [run for run in reversed(store.runs(uri, experiment, "pretraining")) if run["run_id"] in pretrained]
    trainings = {
        run["name"]: {metric: store.metric_history(uri, run["run_id"], metric) for metric in CURVES} for run in runs
    }
    return Comparison(
        experiment, uri, judged, last, {name: found for name, found in trainings.items() if found["loss"]},
        _in_order(table, judged), differences, curves.curves_table(last), curve_differences,
        unpaired + other_draws, [_provenance(each) for each in judged], {run["name"]: run["params"] for run in runs},
    )  # fmt: skip


def last_steps(judged: list[Judged]) -> list[Judged]:
    """Of each run and protocol the evaluation of its last step, in the given order."""
    step: dict[tuple[str, str], int] = {}
    for each in judged:
        key = each.series, each.protocol
        step[key] = max(each.step, step.get(key, -1))
    return [each for each in judged if each.step == step[each.series, each.protocol]]


def _newest(uri: str, experiment: str, filter: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, run) of the newest finished evaluation of each run name, step and protocol; names tell them apart."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in store.runs(uri, experiment, "evaluation", filter):  # newest first
        tags = run["tags"]
        if run["status"] == "FINISHED":
            newest.setdefault((tags["yaware.run_name"], tags["yaware.step"], tags.get("yaware.protocol", "")), run)
    if not newest:
        what = f" that fits --filter {filter!r}" if filter else ""
        raise UserError(
            f"experiment {experiment!r} in {uri} has no finished evaluation{what}; run `yaware evaluate` first"
        )
    steps = {name: {s for n, s, _ in newest if n == name} for name, _, _ in newest}
    protocols = {protocol for _, _, protocol in newest}
    named = []
    for (name, step, protocol), run in newest.items():
        parts = [name, *[f"step {step}"] * (len(steps[name]) > 1)]
        # Voxels and networks from scratch are named after their protocol already.
        parts += [protocol] * (len(protocols) > 1 and protocol.split(",")[0] not in name)
        named.append((", ".join(parts), run))
    return named


def _read(uri: str, run: dict[str, Any], name: str, folder: Path) -> Judged:
    path = store.download(uri, run["run_id"], "evaluation", folder)
    saliency = {}
    for file in sorted(path.glob("saliency_*.npz")):
        with np.load(file) as stored:
            saliency[file.stem.removeprefix("saliency_")] = {key: stored[key] for key in stored.files}
    predictions = pd.read_parquet(path / "predictions.parquet")
    curve = pd.read_csv(path / "curve.csv") if (path / "curve.csv").stat().st_size > 1 else pd.DataFrame()
    return Judged(name, run, predictions, curve, pd.read_parquet(path / "embedding.parquet"), saliency)


def _ordered(judged: list[Judged], table: pd.DataFrame) -> list[Judged]:
    """Runs by the mean AUC over binary tasks of their last step, best first; of a run the last step first."""
    auc = table[
        (table["figure"] == "auc") & table["task"].isin([t for j in judged for t in j.tasks if j.kind(t) == "binary"])
    ]
    mean = auc.groupby("checkpoint")["value"].mean()
    rank = {(each.series, each.protocol): float(mean.get(each.name, 0.0)) for each in last_steps(judged)}
    return sorted(judged, key=lambda j: (-rank[j.series, j.protocol], j.series, j.protocol, -j.step))


def _in_order(table: pd.DataFrame, judged: list[Judged]) -> pd.DataFrame:
    """A table's rows in the order of the checkpoints."""
    place = {each.name: number for number, each in enumerate(judged)}
    return table.sort_values("checkpoint", key=lambda column: column.map(place), kind="stable", ignore_index=True)


def _provenance(each: Judged) -> dict[str, str]:
    tags, params = each.run["tags"], each.run["params"]
    settings = [f"{params[key]} {key}" for key in ("folds", "draws") if params.get(key)]
    return {
        "checkpoint": each.name,
        "method": tags.get("yaware.method", ""),
        "encoder": tags.get("yaware.encoder", "") or "-",
        "step": tags.get("yaware.step", ""),
        "weights": tags.get("yaware.weights_sha256", "")[:10] or "-",
        "manifest": tags.get("yaware.manifest_digest", "")[:10],
        "pretraining run": tags.get("yaware.pretraining_run", "")[:10] or "-",
        "evaluation run": each.run["run_id"][:10],
        "version": tags.get("yaware.version", ""),
        "protocol": ", ".join([*[each.protocol] * bool(each.protocol), *settings, f"seed {params.get('seed')}"]),
    }
