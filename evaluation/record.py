"""What an evaluation leaves in MLflow: a run for each checkpoint and protocol, with predictions, curves and trials."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.manifest import Manifest
from infra import runs
from infra.errors import UserError
from infra.tracking import Tracker
from pretrain.export import Encoder

Array = np.ndarray[Any, np.dtype[Any]]
# Protocols whose figures stand on a checkpoint's own page under the task's plain name; others with theirs before it.
PLAIN = ("paper", "linear")


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
    """One subject's answers under one protocol: metrics by name, and tables."""

    metrics: dict[str, float]
    predictions: pd.DataFrame
    curve: pd.DataFrame
    trials: pd.DataFrame
    embedding: pd.DataFrame


def open_run(
    subject: Subject, protocol: str, label: str, manifest: Manifest, params: dict[str, Any], *, uri: str, experiment: str,
    run_id: str | None,
) -> Tracker:  # fmt: skip
    """Begin the evaluation's run, or go on with ``run_id`` after a kill. UserError where the store does not answer."""
    config = subject.config
    tags = {
        "yaware.kind": "evaluation", "yaware.run_name": subject.name, "yaware.method": subject.method,
        "yaware.protocol": label, "yaware.protocol_kind": protocol, "yaware.step": str(subject.step),
        "yaware.weights_sha256": subject.weights, "yaware.manifest_digest": manifest.digest,
        "yaware.pretraining_run": str(config.get("run_id") or ""), "yaware.model_id": str(config.get("model_id") or ""),
        "yaware.simulated": str(manifest.simulated), "yaware.version": version("yaware"),
        "yaware.encoder": subject.encoder.config["encoder"]["name"] if subject.encoder is not None else "",
        **{f"yaware.{key}": value for key, value in subject.about.items()},
    }  # fmt: skip
    if config.get("run_id"):
        tags["mlflow.parentRunId"] = str(config["run_id"])
    name = f"evaluate {subject.name} step {subject.step}: {label}"
    tracker = Tracker.open(uri, experiment, name, run_id=run_id, tags=tags)
    if tracker.run_id is None:
        raise UserError(f"MLflow store {uri} does not answer; start it, or choose another --tracking-uri")
    tracker.log_params(params)
    return tracker


def log_result(tracker: Tracker, subject: Subject, protocol: str, manifest: Manifest, result: Result, uri: str) -> None:
    """Figures to the run and to the checkpoint's page, tables as files; ends the run."""
    found = [(key, value, subject.step) for key, value in result.metrics.items() if np.isfinite(value)]
    model_id = subject.config.get("model_id")
    known = bool(model_id) and runs.has_model(uri, str(model_id))
    data = {"dataset": str(manifest.settings["dataset"]), "dataset_digest": manifest.digest[:32]}
    if known and protocol in PLAIN:
        # With its model id a figure stands both in this run and on the checkpoint's own page, beside those of others.
        tracker.log_metrics(found, model_id=str(model_id), **data)
    else:
        tracker.log_metrics(found, **data)
        if known:
            named = [(f"{protocol}/{key}", value, step) for key, value, step in found]
            tracker.log_metrics(named, model_id=str(model_id), **data)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result.predictions.to_parquet(folder / "predictions.parquet", index=False)
        result.embedding.to_parquet(folder / "embedding.parquet", index=False)
        result.curve.to_csv(folder / "curve.csv", index=False)
        result.trials.to_csv(folder / "trials.csv", index=False)
        for path in sorted(folder.iterdir()):
            tracker.log_artifact(path, "evaluation")
    tracker.end()


def trials_table(trials: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """task, part (fold or draw), point (JSON), inner_score, and for networks steps and stopped: a row a trial."""
    rows = [
        {"task": task, **row, "point": json.dumps(row["point"], sort_keys=True)}
        for task, given in trials.items()
        for row in given
    ]
    return pd.DataFrame(rows)
