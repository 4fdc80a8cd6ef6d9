"""Query the tracking store; results are plain dicts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError, nearest
from infra.tracking.mlflow_store import check_not_deleted, client_of, query_errors

# Error codes of a reachable store for a filter that it does not understand, and for a logged model that it does not have.
WRONG_FILTER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
UNKNOWN_MODEL = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND")


def runs(uri: str, experiment: str, kind: str, filter: str = "") -> list[dict[str, Any]]:
    """Return the runs with tag yaware.kind=``kind``, newest first.

    ``filter`` is an MLflow filter that must hold too. Each run is a dict with run_id, name, tags, params, metrics (last
    values), start_time (ms since 1970) and status. Raises UserError if the store or the experiment does not exist, or if the
    filter is none.
    """
    client = client_of(uri, create=False)
    with query_errors(uri):
        stored = client.get_experiment_by_name(experiment)
        if stored is None:
            names = sorted(other.name for other in client.search_experiments())
            raise UserError(
                f"experiment {experiment!r} is not in {uri}{nearest(experiment, names)}; it has {', '.join(names)}"
            )
        check_not_deleted(uri, stored)
        condition = f"tags.`yaware.kind` = '{kind}'" + (f" and {filter}" if filter else "")
        query = {"filter_string": condition, "order_by": ["attributes.start_time DESC"]}
        try:
            return [_run_row(run) for run in _pages(client.search_runs, [stored.experiment_id], query)]
        except Exception as error:
            if not filter.strip() or getattr(error, "error_code", None) not in WRONG_FILTER:
                raise
            words = " ".join(str(error).split())[:200]
            raise UserError(
                f"--filter {filter!r} is not a filter of MLflow ({words}); write for example "
                "\"tags.`yaware.run_name` = 'y-aware'\" "
                'or "metrics.auc > 0.7", joined by and'
            ) from None


def metric_history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return all (step, value) pairs of a metric, sorted by step; empty if the run does not have the metric."""
    client = client_of(uri, create=False)
    with query_errors(uri):
        return sorted((int(metric.step), float(metric.value)) for metric in client.get_metric_history(run_id, name))


def download(uri: str, run_id: str, artifact_path: str, folder: Path) -> Path:
    """Copy an artifact (a file or a directory) of a run into ``folder``. Return the path of the copy."""
    client = client_of(uri, create=False)
    folder.mkdir(parents=True, exist_ok=True)
    with query_errors(uri):
        return Path(client.download_artifacts(run_id, artifact_path, str(folder)))


def checkpoints(uri: str, run_id: str) -> list[dict[str, Any]]:
    """Return the checkpoints of a run, sorted by step.

    Each is a dict with model_id, name, step, path (folder), sha256, run_id, tags, params and metrics. The metrics are the
    results of evaluations: a list of dicts with name, value, step, dataset (or None) and run_id (of the evaluation).
    """
    client = client_of(uri, create=False)
    with query_errors(uri):
        experiment = client.get_run(run_id).info.experiment_id
        query = {"filter_string": f"source_run_id = '{run_id}'"}
        rows = [_model_row(model) for model in _pages(client.search_logged_models, [experiment], query)]
    return sorted(rows, key=lambda row: int(row["step"]))


def has_model(uri: str, model_id: str) -> bool:
    """Return whether the store has a logged model. Raises UserError if the store does not answer."""
    client = client_of(uri, create=False)
    return _found(uri, lambda: client.get_logged_model(model_id), UNKNOWN_MODEL) is not None


def is_finished(uri: str, run_id: str) -> bool:
    """Return whether the store has a run that has ended well and was not deleted. Raises UserError if it does not answer."""
    client = client_of(uri)
    run = _found(uri, lambda: client.get_run(run_id), ("RESOURCE_DOES_NOT_EXIST",))
    return run is not None and bool(run.info.lifecycle_stage == "active" and run.info.status == "FINISHED")


def _found(uri: str, read: Callable[[], Any], unknown: Sequence[str]) -> Any:
    """Return what is read from the store; None if it answers with one of the error codes ``unknown``."""
    try:
        with query_errors(uri):
            return read()
    except UserError as error:
        if getattr(error.__cause__, "error_code", None) in unknown:
            return None
        raise


def checkpoint(uri: str, model_id: str) -> dict[str, Any]:
    """Return one checkpoint by its model id, in the form of ``checkpoints``. Raises UserError if it is not in the store."""
    client = client_of(uri, create=False)
    with query_errors(uri):
        return _model_row(client.get_logged_model(model_id))


def find_run(uri: str, reference: str, experiment: str) -> dict[str, Any]:
    """Return a run, in the form of ``runs``, by its id or by the name of a pretraining in ``experiment`` (the newest).

    Raises UserError if there is none.
    """
    client = client_of(uri, create=False)
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        with query_errors(uri):
            return _run_row(client.get_run(reference))
    pretrainings = runs(uri, experiment, "pretraining")
    for row in pretrainings:
        if row["name"] == reference:
            return row
    names = sorted({str(row["name"]) for row in pretrainings})
    raise UserError(
        f"{reference!r} is not a model id, a run id or a pretraining of experiment {experiment!r}"
        f"{nearest(reference, names)}; its pretrainings: {', '.join(names) or 'none'}"
    )


def ui_command(uri: str) -> str:
    """Return how to browse the store: the command of MLflow's viewer, or the address of a server."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _run_row(run: Any) -> dict[str, Any]:
    data, info = run.data, run.info
    return {
        "run_id": info.run_id, "name": info.run_name, "tags": dict(data.tags), "params": dict(data.params),
        "metrics": dict(data.metrics), "start_time": info.start_time, "status": info.status,
    }  # fmt: skip


def _model_row(model: Any) -> dict[str, Any]:
    metrics = [
        {"name": m.key, "value": m.value, "step": m.step, "dataset": m.dataset_name, "run_id": m.run_id}
        for m in model.metrics or []
    ]
    tags, params = dict(model.tags), dict(model.params)
    return {
        "model_id": model.model_id, "name": model.name, "step": int(params.get("step", -1)),
        "path": tags.get("yaware.checkpoint"), "sha256": tags.get("yaware.checkpoint.sha256"),
        "run_id": model.source_run_id, "tags": tags, "params": params, "metrics": metrics,
    }  # fmt: skip


def _pages(search: Any, experiments: list[str], query: dict[str, Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(experiments, **query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
