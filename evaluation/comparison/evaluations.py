"""Evaluations of checkpoints as MLflow stores them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.features.chosen import choices_text
from evaluation.protocols.variant import ProtocolVariant
from evaluation.statistics.metrics import METRICS, PROBABILITY_METRICS, Statistic
from infra.errors import UserError
from infra.files import regular_file
from infra.processes.scratch import scratch_folder
from infra.tracking import runs as store
from infra.tracking.faults import hide_password

RunRow = dict[str, Any]  # a row of infra.tracking.runs
NEEDED = ("predictions.parquet", "curve.csv", "embedding.parquet")  # tables of an evaluation
DIGITS = 8  # of a run id or checksum, where names are equal without it


@dataclass
class CheckpointEvaluation:
    """A checkpoint evaluated by one protocol: the results of one evaluation run, or of several on different tasks.

    Attributes:
        name: unique name in the comparison.
        run: the newest evaluation run.
        predictions: a row per scan and task; columns as ``yaware evaluate`` stores them in predictions.parquet.
        curve: learning-curve draws; columns task, n_train, draw, auc.
        embedding: a row per scan; first two principal components x and y, and the scan's age, sex, site, diagnosis.
        saliency: task -> arrays of its occlusion map (``map``, ``background``, ...).
        pretraining: name of the pretraining, shared by its checkpoints and unique among pretrainings.
        resamples: the metrics of further cross-validations (``results.RESAMPLE_COLUMNS``); empty if none were made.
        chosen: a row per task and fold with the settings chosen on inner folds, such as layer, pooling, scale and penalty.
        earlier: task -> its evaluation run, for tasks whose results are not from ``run``.
    """

    name: str
    run: RunRow
    predictions: pd.DataFrame
    curve: pd.DataFrame
    embedding: pd.DataFrame
    saliency: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: str = ""
    earlier: dict[str, RunRow] = field(default_factory=dict)
    resamples: pd.DataFrame = field(default_factory=pd.DataFrame)
    chosen: pd.DataFrame = field(default_factory=pd.DataFrame)

    def run_of(self, task: str) -> RunRow:
        """Return the evaluation run that a task's results are from."""
        return self.earlier.get(task, self.run)

    def beyond_paper(self, task: str) -> list[str]:
        """Return what the evaluation of a task does and the y-Aware paper did not; see ``ProtocolVariant.beyond_paper``."""
        return self.variant.beyond_paper(_beside(self.run_of(task)["tags"].get("yaware.beside", ""), task))

    @property
    def runs(self) -> list[RunRow]:
        """All evaluation runs with results in use, newest first."""
        return list({run["run_id"]: run for run in (self.run, *self.earlier.values())}.values())

    @property
    def weights(self) -> str:
        """SHA-256 of the weights; empty for voxels and networks from scratch."""
        return str(self.run["tags"].get("yaware.weights_sha256", ""))

    @property
    def variant(self) -> ProtocolVariant:
        """The protocol with its options."""
        return ProtocolVariant.from_tags(self.run["tags"])

    @property
    def protocol(self) -> str:
        """The protocol's label, for example ``linear`` or ``paper, sites left out``."""
        return self.variant.label

    @property
    def simulated(self) -> bool:
        """Whether any of the scans are simulated."""
        return any(run["tags"].get("yaware.simulated") == "True" for run in self.runs)

    @property
    def step(self) -> int:
        """The pretraining step of the checkpoint."""
        return int(self.run["tags"]["yaware.step"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the evaluation."""
        return list(dict.fromkeys(self.predictions["task"]))

    def predictions_of(self, task: str) -> pd.DataFrame:
        """Return the predictions of a task."""
        return self.predictions[self.predictions["task"] == task]

    def chosen_features(self, task: str) -> str:
        """Return the features that the folds of a task chose (``--layer auto``), as text; empty if they were given."""
        if "scale" not in self.chosen:
            return ""
        rows = self.chosen[(self.chosen["task"] == task) & self.chosen["scale"].notna()]
        return choices_text([dict(zip(rows.columns, row, strict=True)) for row in rows.to_numpy()])

    def kind(self, task: str) -> str:
        """Return binary, multiclass or regression."""
        return str(self.predictions_of(task)["kind"].iloc[0])


def _beside(tag: str, task: str) -> list[str] | None:
    """Return the columns of a task's covariates and confounds from the tag of its run; None if it does not tell them."""
    try:
        columns = json.loads(tag).get(task)
    except (ValueError, AttributeError):
        return None
    return [str(column) for column in columns] if isinstance(columns, list) else None


def labels_of(predictions: pd.DataFrame) -> NDArray[Any]:
    """Return one task's labels (N,): int64 classes, or float64 numbers of a regression."""
    return predictions["label"].to_numpy(float if predictions["kind"].iloc[0] == "regression" else np.int64)


def probabilities_of(predictions: pd.DataFrame) -> NDArray[Any] | None:
    """Return one task's probabilities, or None if the evaluation stored none.

    (N,) of the positive class, or (N, K) of every class of a multiclass task.
    """
    if predictions["kind"].iloc[0] == "multiclass":
        columns = [name for name in predictions if re.fullmatch(r"p\d+", str(name)) and predictions[name].notna().all()]
        return predictions[sorted(columns, key=lambda name: int(str(name)[1:]))].to_numpy() if columns else None
    stored = "probability" in predictions and predictions["probability"].notna().all()
    return predictions["probability"].to_numpy() if stored else None


def metrics_of(predictions: pd.DataFrame) -> Iterator[tuple[str, Statistic, NDArray[Any]]]:
    """Yield name, function and input of every metric of one task; the first is the task's primary metric.

    The input is the answers (N,), or the probabilities for metrics of probabilities. Those are left out if no
    probabilities were stored.
    """
    kind = str(predictions["kind"].iloc[0])
    for name, statistic in METRICS[kind].items():
        yield name, statistic, predictions["answer"].to_numpy()
    probabilities = probabilities_of(predictions)
    for name, statistic in PROBABILITY_METRICS[kind].items():
        if probabilities is not None:
            yield name, statistic, probabilities


def last_steps(evaluations: list[CheckpointEvaluation]) -> list[CheckpointEvaluation]:
    """Return the evaluations of the last step of each pretraining and protocol, in the given order."""
    last: dict[tuple[str, str], int] = {}
    for evaluation in evaluations:
        key = evaluation.pretraining, evaluation.protocol
        last[key] = max(evaluation.step, last.get(key, -1))
    return [each for each in evaluations if each.step == last[each.pretraining, each.protocol]]


def read_evaluations(uri: str, experiment: str, filter: str) -> tuple[list[CheckpointEvaluation], list[str]]:
    """Read the newest results of every checkpoint, protocol and task of an experiment.

    ``filter`` is an MLflow filter over the evaluation runs. Also returns a line for each evaluation with results that
    newer ones supersede. Raises UserError if the store has no such experiment, or no finished evaluation in it.
    """
    runs_of = _finished_runs(uri, experiment, filter)
    names = _names(runs_of)
    evaluations, superseded = [], []
    with scratch_folder("evaluations") as temporary:
        for identity, runs in runs_of.items():
            pretraining, name = names[identity]
            evaluation, lines = _read(uri, runs, pretraining, name, temporary)
            evaluations.append(evaluation)
            superseded += lines
    return evaluations, superseded


class _Identity(NamedTuple):
    """Identifies a row of the comparison: the same weights of the same pretraining, evaluated by the same protocol."""

    name: str
    pretraining: str  # id of the MLflow run, or empty
    step: str
    weights: str  # SHA-256, or empty
    variant: ProtocolVariant


def _finished_runs(uri: str, experiment: str, filter: str) -> dict[_Identity, list[RunRow]]:
    """Group the finished evaluation runs by checkpoint and protocol, newest first."""
    runs_of: dict[_Identity, list[RunRow]] = {}
    for run in store.runs(uri, experiment, "evaluation", filter):  # newest first
        if run["status"] == "FINISHED":
            tags = run["tags"]
            absent = [tag for tag in ("yaware.run_name", "yaware.step") if tag not in tags]
            if absent:
                raise UserError(
                    f"evaluation {run['run_id'][:DIGITS]} of experiment {experiment!r} has no tag {absent[0]}; another program "
                    f"logged it, or its tags were changed: delete it (`mlflow runs delete --run-id {run['run_id']}`)"
                )
            identity = _Identity(
                tags["yaware.run_name"], tags.get("yaware.pretraining_run", ""), tags["yaware.step"],
                tags.get("yaware.weights_sha256", ""), ProtocolVariant.from_tags(tags),
            )  # fmt: skip
            runs_of.setdefault(identity, []).append(run)
    if not runs_of:
        raise UserError(_why_none(uri, experiment, filter))
    return runs_of


def _why_none(uri: str, experiment: str, filter: str) -> str:
    """Return one line that says why an experiment has no finished evaluation, and what to do."""
    place = f"experiment {experiment!r} in {hide_password(uri)}"
    runs = store.runs(uri, experiment, "evaluation")
    finished = [run for run in runs if run["status"] == "FINISHED"]
    if finished:
        return f"{place} has no finished evaluation that matches --filter {filter!r}, but {len(finished)} others; change it"
    if runs:
        counts = Counter(str(run["status"]).lower() for run in runs)
        listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        return (
            f"{place} has no finished evaluation, but unfinished ones ({listed}): wait for those that run, and start those "
            "that failed again with the same `yaware evaluate`"
        )
    pretrainings = len(store.runs(uri, experiment, "pretraining"))
    elsewhere = f", but pretrainings ({pretrainings})" if pretrainings else ""
    return (
        f"{place} has no evaluation{elsewhere}; run `yaware evaluate` first, or choose the --experiment and --tracking-uri "
        "that it was given (deleted runs do not count)"
    )


def _names(identities: Collection[_Identity]) -> dict[_Identity, tuple[str, str]]:
    """Return unique names of each row's pretraining and of the row itself, as short as they can be."""
    several_protocols = len({identity.variant for identity in identities}) > 1
    names = {}
    for identity in identities:
        same_name = [other for other in identities if other.name == identity.name]
        same_run = [other for other in same_name if other.pretraining == identity.pretraining]
        pretraining = identity.name
        if len({other.pretraining for other in same_name}) > 1 and identity.pretraining:
            pretraining += f" ({identity.pretraining[:DIGITS]})"
        parts = [pretraining]
        if len({other.step for other in same_run}) > 1:
            parts.append(f"step {identity.step}")
        if len({other.weights for other in same_run if other.step == identity.step}) > 1:
            parts.append(f"weights {identity.weights[:DIGITS]}")
        if several_protocols and identity.variant.is_baseline:  # a baseline's name holds its protocol already
            parts += identity.variant.options
        elif several_protocols and identity.variant.label:
            parts.append(identity.variant.label)
        names[identity] = pretraining, ", ".join(parts)
    return names


def _read(
    uri: str, runs: list[RunRow], pretraining: str, name: str, folder: Path
) -> tuple[CheckpointEvaluation, list[str]]:
    """Merge the runs of one checkpoint and protocol (newest first); the newest results of each task are used.

    Also returns a line for each run with superseded results.
    """
    predictions, curves, resamples, chosen, superseded = [], [], [], [], []
    saliency: dict[str, dict[str, Any]] = {}
    source: dict[str, RunRow] = {}  # task -> the run that its results are from
    embedding = pd.DataFrame()
    for run in runs:
        tasks = {Path(task).stem for task in run["params"].get("tasks", "").split(",") if task}
        done = set(source)
        if not tasks or tasks - done:
            path = _download_tables(uri, run, name, folder / run["run_id"])
            table = pd.read_parquet(regular_file(path / "predictions.parquet"))
            tasks = set(table["task"])
            source |= {task: run for task in dict.fromkeys(table["task"]) if task not in done}
            predictions.append(table[~table["task"].isin(done)])
            if (path / "curve.csv").stat().st_size > 1:
                curve = pd.read_csv(regular_file(path / "curve.csv"))
                curves.append(curve[~curve["task"].isin(done)])
            if (path / "resamples.csv").exists():  # versions before it logged none
                table = pd.read_csv(regular_file(path / "resamples.csv"), float_precision="round_trip")
                resamples.append(table[~table["task"].isin(done)])
            if (path / "chosen.csv").exists():
                table = pd.read_csv(regular_file(path / "chosen.csv"))
                chosen.append(table[~table["task"].isin(done)])
            saliency = {**_read_saliency(path), **saliency}
            embedding = embedding if len(embedding) else pd.read_parquet(regular_file(path / "embedding.parquet"))
        if tasks & done:
            superseded.append(
                _superseded_line(name, run, {task: source[task] for task in source if task in tasks & done})
            )
    evaluation = CheckpointEvaluation(
        name=name, run=runs[0], predictions=_concatenate(predictions), curve=_concatenate(curves), embedding=embedding,
        saliency=saliency, pretraining=pretraining, resamples=_concatenate(resamples), chosen=_concatenate(chosen),
        earlier={task: run for task, run in source.items() if run is not runs[0]},
    )  # fmt: skip
    return evaluation, superseded


def _download_tables(uri: str, run: RunRow, name: str, folder: Path) -> Path:
    """Copy the tables of an evaluation. Raises UserError if the store's artifacts do not have them."""
    try:
        path = store.download(uri, run["run_id"], "evaluation", folder)
        missing = [table for table in NEEDED if not (path / table).is_file()]
        reason = f"{', '.join(missing)} missing" if missing else ""
    except UserError as error:
        reason = str(error)
    if reason:
        raise UserError(
            f"{name}: the tables of its evaluation {run['run_id'][:DIGITS]} cannot be read ({reason}); the folder or bucket of "
            "artifacts was moved or changed since: bring it back, or delete the run (`mlflow runs delete --run-id "
            f"{run['run_id']}`) and evaluate again"
        )
    return path


def _concatenate(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate the tables that have rows; an empty one may lack columns or have other dtypes."""
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _superseded_line(name: str, run: RunRow, newer: dict[str, RunRow]) -> str:
    """Say which tasks of a run are superseded, and by which runs."""
    digests = {each["tags"].get("yaware.manifest_digest") for each in (run, *newer.values())}
    other_shards = " on other shards" if len(digests) > 1 else ""
    newer_ids = ", ".join(dict.fromkeys(each["run_id"][:10] for each in newer.values()))
    return f"{name}: {', '.join(newer)} of evaluation {run['run_id'][:10]}{other_shards}, by {newer_ids}"


def _read_saliency(path: Path) -> dict[str, dict[str, Any]]:
    """Return task -> arrays of its stored map."""
    maps = {}
    for file in sorted(path.glob("saliency_*.npz")):
        with np.load(regular_file(file)) as stored:
            maps[file.stem.removeprefix("saliency_")] = {key: stored[key] for key in stored.files}
    return maps
