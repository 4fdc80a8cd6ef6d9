"""What an evaluation leaves in MLflow: a run for each checkpoint and protocol, with predictions, curves and trials."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.variant import ProtocolVariant
from infra.errors import UserError
from infra.files import write_json
from infra.tracking import runs
from infra.tracking.tracker import Tracker
from pretrain.weights.encoder import Encoder

Array = np.ndarray[Any, np.dtype[Any]]
# Protocols whose figures stand on a checkpoint's own page under the task's plain name; others with theirs before it.
PLAIN = ("paper", "linear")
TABLES = ("predictions.parquet", "embedding.parquet", "curve.csv", "trials.csv")


@dataclass
class Subject:
    """What is judged: a checkpoint, an architecture with random weights, or the scans' voxels."""

    name: str
    method: str
    step: int = 0
    weights: str = ""  # SHA-256
    encoder: Encoder | None = None
    folder: Path | None = None
    about: dict[str, str] = field(default_factory=dict)  # tags

    @property
    def config(self) -> dict[str, Any]:
        """The encoder's config.json; empty for voxels."""
        return self.encoder.config if self.encoder is not None and self.folder is not None else {}


@dataclass
class Result:
    """One subject's answers under one protocol: metrics by name, tables, trials."""

    metrics: dict[str, float]
    predictions: pd.DataFrame
    curve: pd.DataFrame
    trials: dict[str, list[dict[str, Any]]]  # by task, rows of ``evaluation.protocols.nested_cv``
    embedding: pd.DataFrame


def open_run(
    subject: Subject, variant: ProtocolVariant, manifest: Manifest, params: dict[str, Any], *, uri: str, experiment: str,
    run_id: str | None,
) -> Tracker:  # fmt: skip
    """Begin the evaluation's run, or go on with ``run_id`` after a kill. UserError where the store does not answer."""
    config = subject.config
    tags = {
        "yaware.kind": "evaluation", "yaware.run_name": subject.name, "yaware.method": subject.method,
        **variant.to_tags(), "yaware.step": str(subject.step),
        "yaware.weights_sha256": subject.weights, "yaware.manifest_digest": manifest.digest,
        "yaware.pretraining_run": str(config.get("run_id") or ""), "yaware.model_id": str(config.get("model_id") or ""),
        "yaware.simulated": str(manifest.simulated), "yaware.version": version("yaware"),
        "yaware.encoder": subject.encoder.config["encoder"]["name"] if subject.encoder is not None else "",
        **{f"yaware.{key}": value for key, value in subject.about.items()},
    }  # fmt: skip
    if config.get("run_id"):
        tags["mlflow.parentRunId"] = str(config["run_id"])
    name = f"evaluate {subject.name} step {subject.step}: {variant.label}"
    tracker = Tracker.open(uri, experiment, name, run_id=run_id, tags=tags)
    if tracker.run_id is None:
        raise UserError(f"MLflow store {uri} does not answer; start it, or choose another --tracking-uri")
    tracker.log_params(params)
    return tracker


def write_result(result: Result, folder: Path) -> None:
    """A result's tables, metrics and trials as files, from which ``log_result`` logs it; whole once ``is_whole`` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    result.predictions.to_parquet(folder / "predictions.parquet", index=False)
    result.embedding.to_parquet(folder / "embedding.parquet", index=False)
    result.curve.to_csv(folder / "curve.csv", index=False)
    trials_table(result.trials).to_csv(folder / "trials.csv", index=False)
    write_json(folder / "trials.json", result.trials)
    write_json(folder / "metrics.json", result.metrics)


def is_whole(folder: Path) -> bool:
    """Whether ``write_result`` came to its end."""
    return (folder / "metrics.json").is_file()


def log_result(tracker: Tracker, subject: Subject, protocol: str, manifest: Manifest, folder: Path, uri: str) -> None:
    """Figures to the run and to the checkpoint's page, tables as files, networks' trials as child runs; ends the run.

    ``folder`` is one of ``write_result``'s, which must stay until ``tracker.stored``. UserError where the store stops
    answering at once; later on, the tracker knows.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    model_id = subject.config.get("model_id")
    try:
        known = bool(model_id) and runs.has_model(uri, str(model_id))
    except UserError as error:
        raise UserError(f"{error}; the result is kept in {folder}: run the same command again later") from None
    data = {"dataset": str(manifest.settings["dataset"]), "dataset_digest": manifest.digest[:32]}
    # With its model id a figure stands both in this run and on the checkpoint's own page, beside those of others.
    shared = {**data, "model_id": str(model_id)} if known and protocol in PLAIN else data
    tracker.log_metrics(_new(tracker, metrics, subject.step), **shared)
    if known and protocol not in PLAIN:
        named = {f"{protocol}/{key}": value for key, value in metrics.items()}
        tracker.log_metrics(_new(tracker, named, subject.step), **data, model_id=str(model_id))
    for name in TABLES:
        tracker.log_artifact(folder / name, "evaluation")
    tracker.log_trials(trial_runs(json.loads((folder / "trials.json").read_text())))
    tracker.end()


def _new(tracker: Tracker, metrics: dict[str, float], step: int) -> list[tuple[str, float, int]]:
    """Finite figures, less those that an earlier start of the command logged: models' pages would show them twice."""
    return [
        (key, value, step) for key, value in metrics.items() if np.isfinite(value) and tracker.last_step(key) < step
    ]


def trial_runs(trials: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What ``Tracker.log_trials`` takes, of the trials that have scores of their own (networks', not grids').

    Metrics: ``inner_score``, by which trials were compared, and ``score`` after every epoch.
    """
    made = []
    for task, rows in trials.items():
        for row in (row for row in rows if row.get("scores")):
            point = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in sorted(row["point"].items())
            )
            metrics = [("inner_score", row["inner_score"], 0)]
            metrics += [("score", value, epoch) for epoch, value in enumerate(row["scores"], 1)]
            made.append({
                "name": f"{task}, {row['part']}: {point}"[:250],
                "key": json.dumps([task, row["part"], row["point"]], sort_keys=True), "params": row["point"],
                "tags": {"yaware.task": task, "yaware.part": row["part"], "yaware.stopped": row["stopped"]},
                "metrics": [each for each in metrics if np.isfinite(each[1])],
            })  # fmt: skip
    return made


def trials_table(trials: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """task, part (fold or draw), point (JSON), inner_score, and for networks steps and stopped: a row a trial."""
    rows = [
        {
            "task": task,
            **{key: value for key, value in row.items() if key != "scores"},
            "point": json.dumps(row["point"], sort_keys=True),
        }
        for task, given in trials.items()
        for row in given
    ]
    return pd.DataFrame(rows)
