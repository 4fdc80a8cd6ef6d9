"""Checkpoints side by side. Everything comes from MLflow's store; the checkpoints themselves may be gone."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from evaluation.comparison import curves, tables
from evaluation.comparison.tables import Judged
from evaluation.protocols.variant import ProtocolVariant
from infra.errors import UserError
from infra.tracking import runs as store
from infra.tracking.tracker import default_uri

Run = dict[str, Any]  # as infra.tracking.runs gives it
DIGITS = 8  # of an id or checksum that tells equal names apart
CURVES = ("loss", "lr", "grad_norm", "scans_per_second")


class Key(NamedTuple):
    """What is one row of the comparison: the same weights of the same pretraining, judged by the same protocol."""

    name: str
    pretraining: str  # id of the MLflow run, or empty
    step: str
    weights: str  # SHA-256, or empty
    variant: ProtocolVariant


@dataclass
class Comparison:
    """What the table and the report show. ``judged`` holds every evaluation, ``last`` those of each run's last step."""

    experiment: str
    uri: str
    judged: list[Judged]
    last: list[Judged]
    trainings: dict[str, dict[str, list[tuple[int, float]]]]  # run name -> metric -> (step, value)
    table: pd.DataFrame  # tables.METRIC_COLUMNS
    differences: pd.DataFrame  # tables.DIFFERENCE_COLUMNS
    curves: pd.DataFrame  # curves.CURVE_COLUMNS
    curve_differences: pd.DataFrame  # curves.DIFFERENCE_COLUMNS
    unpaired: list[str] = field(default_factory=list)  # why a pair was not compared
    superseded: list[str] = field(default_factory=list)  # tasks of evaluations that newer ones answer
    provenance: list[dict[str, str]] = field(default_factory=list)
    recipes: dict[str, dict[str, str]] = field(default_factory=dict)  # run name -> key -> value, as pretrained

    @property
    def simulated(self) -> bool:
        """Whether any of the checkpoints was judged on simulated scans."""
        return any(run["tags"].get("yaware.simulated") == "True" for each in self.judged for run in each.runs)

    @property
    def tasks(self) -> dict[str, tuple[str, str]]:
        """Task -> (kind, title), in the order in which they were asked for."""
        found: dict[str, tuple[str, str]] = {}
        for each in self.judged:
            for task in each.tasks:
                part = each.of(task).iloc[0]
                found.setdefault(task, (str(part["kind"]), str(part["title"])))
        return found

    def label(self, task: str, figure: str) -> str:
        """A figure's name, with its unit where that is known: an MAE of ages is in years."""
        years = figure == "mae" and all(tables.predicts_age(j.of(task)) for j in self.judged if task in j.tasks)
        return f"{tables.LABELS[figure]} (years)" if years else tables.LABELS[figure]


def compare(
    experiment: str, *, tracking_uri: str | None = None, filter: str = "", against: str | None = None
) -> Comparison:
    """Read the newest evaluation of every checkpoint, protocol and task of an experiment, and compare them in pairs.

    ``filter`` is one of MLflow's over the evaluation runs, such as ``tags.`yaware.method` = 'SimCLR'``. ``against`` names
    the checkpoint that others of its protocol are compared with; by default each is with each, while there are few.
    UserError where the store has no such experiment or checkpoint.
    """
    uri = tracking_uri or default_uri()
    finished = _finished(uri, experiment, filter)
    names_of = _names(finished)
    with tempfile.TemporaryDirectory() as temporary:
        found = [_read(uri, runs, *names_of[key], Path(temporary)) for key, runs in finished.items()]
    judged, superseded = [each for each, _ in found], [line for _, lines in found for line in lines]
    names = [each.name for each in last_steps(judged)]
    if against is not None and against not in names:
        raise UserError(f"--against={against} is none of the checkpoints: {', '.join(names)}")
    table = tables.metrics_table(judged)
    judged = _ordered(judged, table)
    last = last_steps(judged)
    differences, unpaired = tables.differences_table(last, against)
    curve_differences, other_draws = curves.curve_differences(last, against)
    pretrained = {str(each.run["tags"].get("yaware.pretraining_run")): each.series for each in judged}
    runs = [run for run in reversed(store.runs(uri, experiment, "pretraining")) if run["run_id"] in pretrained]
    trainings = {
        pretrained[run["run_id"]]: {metric: store.metric_history(uri, run["run_id"], metric) for metric in CURVES}
        for run in runs
    }
    return Comparison(
        experiment, uri, judged, last, {name: logged for name, logged in trainings.items() if logged["loss"]},
        _in_order(table, judged), differences, curves.curves_table(last), curve_differences,
        unpaired + other_draws, superseded, [_provenance(each, run) for each in judged for run in each.runs],
        {pretrained[run["run_id"]]: run["params"] for run in runs},
    )  # fmt: skip


def last_steps(judged: list[Judged]) -> list[Judged]:
    """Of each run and protocol the evaluation of its last step, in the given order."""
    step: dict[tuple[str, str], int] = {}
    for each in judged:
        key = each.series, each.protocol
        step[key] = max(each.step, step.get(key, -1))
    return [each for each in judged if each.step == step[each.series, each.protocol]]


def _finished(uri: str, experiment: str, filter: str) -> dict[Key, list[Run]]:
    """The finished evaluations of each checkpoint by each protocol, newest first; UserError where there is none."""
    found: dict[Key, list[Run]] = {}
    for run in store.runs(uri, experiment, "evaluation", filter):  # newest first
        if run["status"] == "FINISHED":
            tags = run["tags"]
            key = Key(
                tags["yaware.run_name"], tags.get("yaware.pretraining_run", ""), tags["yaware.step"],
                tags.get("yaware.weights_sha256", ""), ProtocolVariant.from_tags(tags),
            )  # fmt: skip
            found.setdefault(key, []).append(run)
    if not found:
        what = f" that fits --filter {filter!r}" if filter else ""
        raise UserError(
            f"experiment {experiment!r} in {uri} has no finished evaluation{what}; run `yaware evaluate` first"
        )
    return found


def _names(keys: Collection[Key]) -> dict[Key, tuple[str, str]]:
    """The pretraining's name and the evaluation's of each, with as much behind it as tells it from all others."""
    pretrainings = {key.name: {k.pretraining for k in keys if k.name == key.name} for key in keys}
    several = len({key.variant for key in keys}) > 1
    named = {}
    for key in keys:
        mine = [k for k in keys if (k.name, k.pretraining) == (key.name, key.pretraining)]
        series = key.name
        if len(pretrainings[key.name]) > 1 and key.pretraining:
            series += f" ({key.pretraining[:DIGITS]})"
        parts = [series, *[f"step {key.step}"] * (len({k.step for k in mine}) > 1)]
        if len({k.weights for k in mine if k.step == key.step}) > 1:
            parts.append(f"weights {key.weights[:DIGITS]}")
        # Baselines are already named after their protocol.
        label = key.variant.label
        behind = key.variant.options if key.variant.is_baseline else [label] * bool(label)
        named[key] = series, ", ".join([*parts, *behind * several])
    return named


def _read(uri: str, runs: list[Run], series: str, name: str, folder: Path) -> tuple[Judged, list[str]]:
    """A checkpoint's evaluations by one protocol (newest first) as one, and a line for each that counts no more.

    Of a task that was evaluated several times the newest answers count.
    """
    predictions, curve, lines = [], [], []
    saliency: dict[str, dict[str, Any]] = {}
    source: dict[str, Run] = {}
    embedding = pd.DataFrame()
    for run in runs:
        asked = {Path(task).stem for task in run["params"].get("tasks", "").split(",") if task}
        known = set(source)
        if not asked or asked - known:
            path = store.download(uri, run["run_id"], "evaluation", folder / run["run_id"])
            part = pd.read_parquet(path / "predictions.parquet")
            asked = set(part["task"])
            source |= {task: run for task in dict.fromkeys(part["task"]) if task not in known}
            predictions.append(part[~part["task"].isin(known)])
            if (path / "curve.csv").stat().st_size > 1:
                part = pd.read_csv(path / "curve.csv")
                curve.append(part[~part["task"].isin(known)])
            saliency = {**_saliency(path), **saliency}
            embedding = embedding if len(embedding) else pd.read_parquet(path / "embedding.parquet")
        if asked & known:
            lines.append(_superseded(name, run, {task: source[task] for task in source if task in asked & known}))
    earlier = {task: run for task, run in source.items() if run is not runs[0]}
    return Judged(name, runs[0], _joined(predictions), _joined(curve), embedding, saliency, series, earlier), lines


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables below each other; those without rows say nothing of the columns."""
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _superseded(name: str, run: Run, newer: dict[str, Run]) -> str:
    """A line on tasks of an evaluation that a newer one answers."""
    shards = {each["tags"].get("yaware.manifest_digest") for each in (run, *newer.values())}
    by = ", ".join(dict.fromkeys(each["run_id"][:10] for each in newer.values()))
    other = " on other shards" * (len(shards) > 1)
    return f"{name}: {', '.join(newer)} of evaluation {run['run_id'][:10]}{other}, by {by}"


def _saliency(path: Path) -> dict[str, dict[str, Any]]:
    """Task -> the arrays of its stored map."""
    found = {}
    for file in sorted(path.glob("saliency_*.npz")):
        with np.load(file) as stored:
            found[file.stem.removeprefix("saliency_")] = {key: stored[key] for key in stored.files}
    return found


def _ordered(judged: list[Judged], table: pd.DataFrame) -> list[Judged]:
    """Runs by the mean AUC over binary tasks of their last step, best first; of a run the last step first."""
    auc = table[
        (table["metric"] == "auc") & table["task"].isin([t for j in judged for t in j.tasks if j.kind(t) == "binary"])
    ]
    mean = auc.groupby("checkpoint")["value"].mean()
    rank = {(each.series, each.protocol): float(mean.get(each.name, 0.0)) for each in last_steps(judged)}
    return sorted(judged, key=lambda j: (-rank[j.series, j.protocol], j.series, j.protocol, -j.step))


def _in_order(table: pd.DataFrame, judged: list[Judged]) -> pd.DataFrame:
    """A table's rows in the order of the checkpoints."""
    place = {each.name: number for number, each in enumerate(judged)}
    return table.sort_values("checkpoint", key=lambda column: column.map(place), kind="stable", ignore_index=True)


def _provenance(each: Judged, run: Run) -> dict[str, str]:
    """A row for one of the evaluations of a checkpoint; with its tasks where there are several."""
    tags, params = run["tags"], run["params"]
    tasks = [task for task in each.tasks if each.run_of(task)["run_id"] == run["run_id"]]
    settings = [f"{params[key]} {key}" for key in ("folds", "draws") if params.get(key)]
    return {
        "checkpoint": each.name + f" ({', '.join(tasks)})" * (len(each.runs) > 1),
        "method": tags.get("yaware.method", ""),
        "encoder": tags.get("yaware.encoder", "") or "-",
        "step": tags.get("yaware.step", ""),
        "weights": tags.get("yaware.weights_sha256", "")[:10] or "-",
        "manifest": tags.get("yaware.manifest_digest", "")[:10],
        "pretraining run": tags.get("yaware.pretraining_run", "")[:10] or "-",
        "evaluation run": run["run_id"][:10],
        "version": tags.get("yaware.version", ""),
        "protocol": ", ".join([*[each.protocol] * bool(each.protocol), *settings, f"seed {params.get('seed')}"]),
    }
