"""Logs evaluations to MLflow: one run per candidate and protocol, with metrics, tables and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.results import TABLES
from evaluation.protocols.variant import ProtocolVariant
from infra.errors import UserError
from infra.files import read_text
from infra.tracking import runs
from infra.tracking.tracker import Tracker


def open_run(
    context: EvaluationContext,
    candidate: Candidate,
    variant: ProtocolVariant,
    params: Mapping[str, Any],
    run_id: str | None,
) -> Tracker:
    """Start the MLflow run of an evaluation, or continue ``run_id`` after a kill.

    Raises UserError if the store cannot be used; the line says why.
    """
    config, manifest = candidate.config, context.manifest
    tags = {
        "yaware.kind": "evaluation", "yaware.run_name": candidate.name, "yaware.method": candidate.method,
        **variant.to_tags(), "yaware.step": str(candidate.step),
        "yaware.weights_sha256": candidate.digest, "yaware.manifest_digest": manifest.digest,
        "yaware.pretraining_run": str(config.get("run_id") or ""), "yaware.model_id": str(config.get("model_id") or ""),
        "yaware.simulated": str(manifest.simulated), "yaware.version": version("yaware"),
        "yaware.encoder": candidate.encoder.config["encoder"]["name"] if candidate.encoder is not None else "",
        "yaware.beside": json.dumps({task.name: task.beside for task in context.tasks}),
        **{f"yaware.{key}": value for key, value in candidate.tags.items()},
    }  # fmt: skip
    if config.get("run_id"):
        tags["mlflow.parentRunId"] = str(config["run_id"])
    name = f"evaluate {candidate.name} step {candidate.step}: {variant.label}"
    tracker = Tracker.open(context.uri, context.experiment, name, run_id=run_id, tags=tags)
    if tracker.run_id is None:
        raise UserError(tracker.fault)
    tracker.log_params(params)
    return tracker


def log_result(
    tracker: Tracker, candidate: Candidate, prefix: str, manifest: Manifest, folder: Path, uri: str
) -> None:  # fmt: skip
    """Log a result and end its run: metrics to the run and to the checkpoint's page, tables, networks' trials as child runs.

    Args:
        tracker: of the evaluation's run.
        candidate: what was evaluated.
        prefix: of the metrics on the checkpoint's page; empty for plain names.
        manifest: of the shards.
        folder: written by ``results.write_result``; must be kept until ``tracker.stored``.
        uri: of the store.

    Raises:
        UserError: if the store does not answer at the start; later failures are known to the tracker.
    """
    metrics = json.loads(read_text(folder / "metrics.json"))
    model_id = candidate.config.get("model_id")
    try:
        has_page = bool(model_id) and runs.has_model(uri, str(model_id))
    except UserError as error:
        raise UserError(f"{error}; the result is kept in {folder}: run the same command again later") from None
    data = {"dataset": str(manifest.settings["dataset"]), "dataset_digest": manifest.digest[:32]}
    # A metric that is logged with a model id appears in this run and on the checkpoint's page.
    with_model = {**data, "model_id": str(model_id)}
    tracker.log_metrics(
        _unlogged(tracker, metrics, candidate.step), **(with_model if has_page and not prefix else data)
    )
    if has_page and prefix:
        prefixed = {f"{prefix}/{key}": value for key, value in metrics.items()}
        tracker.log_metrics(_unlogged(tracker, prefixed, candidate.step), **with_model)
    for name in TABLES:
        tracker.log_artifact(folder / name, "evaluation")
    tracker.log_trials(trial_runs(json.loads(read_text(folder / "trials.json"))))
    tracker.end()


def _unlogged(tracker: Tracker, metrics: dict[str, float], step: int) -> list[tuple[str, float, int]]:
    """Return the finite metrics that are not logged yet; after a restart the page of a model would show them twice."""
    return [
        (key, value, step) for key, value in metrics.items() if np.isfinite(value) and tracker.last_step(key) < step
    ]


def trial_runs(trials: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the child runs that ``Tracker.log_trials`` logs: one for every trial of a network, none for grids.

    Their metrics are ``inner_score``, by which trials are compared, and ``score`` after every epoch.
    """
    children = []
    for task, rows in trials.items():
        for row in (row for row in rows if row.get("scores")):
            params = ", ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in sorted(row["point"].items())
            )
            metrics = [("inner_score", row["inner_score"], 0)]
            metrics += [("score", value, epoch) for epoch, value in enumerate(row["scores"], 1)]
            children.append({
                "name": f"{task}, {row['part']}: {params}"[:250],
                "key": json.dumps([task, row["part"], row["point"]], sort_keys=True), "params": row["point"],
                "tags": {"yaware.task": task, "yaware.part": row["part"], "yaware.stopped": row["stopped"]},
                "metrics": [metric for metric in metrics if np.isfinite(metric[1])],
            })  # fmt: skip
    return children
