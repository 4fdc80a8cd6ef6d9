"""Questions to the tracking store, answered with plain dicts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.errors import UserError, nearest
from infra.tracking.mlflow_store import client_of, readable

# What a store that answers says of a logged model that it does not have.
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND")


def runs(uri: str, experiment: str, kind: str, filter: str = "") -> list[dict[str, Any]]:
    """Runs with tag yaware.kind=``kind``, newest first; ``filter`` is one of MLflow's, joined by "and".

    Each is a dict of run_id, name, tags, params, metrics (last values), start_time (ms since 1970), status.
    UserError where the store or the experiment is missing.
    """
    client = client_of(uri, create=False)
    with readable(uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(each.name for each in client.search_experiments())
            raise UserError(
                f"experiment {experiment!r} is not in {uri}{nearest(experiment, names)}; it has {', '.join(names)}"
            )
        condition = f"tags.`yaware.kind` = '{kind}'" + (f" and {filter}" if filter else "")
        where = {"filter_string": condition, "order_by": ["attributes.start_time DESC"]}
        return [_run_row(run) for run in _pages(client.search_runs, [found.experiment_id], where)]


def metric_history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """All (step, value) of a metric, by step; empty where the run has none of that name."""
    client = client_of(uri, create=False)
    with readable(uri):
        return sorted((int(metric.step), float(metric.value)) for metric in client.get_metric_history(run_id, name))


def download(uri: str, run_id: str, artifact_path: str, to: Path) -> Path:
    """Copy an artifact (a file or a directory) of a run into folder ``to``; the path of the copy."""
    client = client_of(uri, create=False)
    to.mkdir(parents=True, exist_ok=True)
    with readable(uri):
        return Path(client.download_artifacts(run_id, artifact_path, str(to)))


def checkpoints(uri: str, run_id: str) -> list[dict[str, Any]]:
    """The checkpoints of a run, by step.

    Each is a dict of model_id, name, step, path (folder), sha256, run_id, tags, params and metrics, which are the
    evaluations so far: a list of dicts of name, value, step, dataset (or None), run_id (of the evaluation).
    """
    client = client_of(uri, create=False)
    with readable(uri):
        experiment = client.get_run(run_id).info.experiment_id
        where = {"filter_string": f"source_run_id = '{run_id}'"}
        found = [_model_row(model) for model in _pages(client.search_logged_models, [experiment], where)]
    return sorted(found, key=lambda row: int(row["step"]))


def has_model(uri: str, model_id: str) -> bool:
    """Whether the store knows a logged model; UserError where the store does not answer."""
    client = client_of(uri, create=False)
    try:
        with readable(uri):
            client.get_logged_model(model_id)
    except UserError as error:
        if getattr(error.__cause__, "error_code", None) in UNKNOWN:
            return False
        raise
    return True


def checkpoint(uri: str, model_id: str) -> dict[str, Any]:
    """One checkpoint by its model id, as ``checkpoints`` gives it; UserError where it is not in the store."""
    client = client_of(uri, create=False)
    with readable(uri):
        return _model_row(client.get_logged_model(model_id))


def find_run(uri: str, given: str, experiment: str) -> dict[str, Any]:
    """A run (as ``runs`` gives it) by its id, or the newest pretraining of that name in ``experiment``."""
    client = client_of(uri, create=False)
    if re.fullmatch(r"[0-9a-f]{32}", given):
        with readable(uri):
            return _run_row(client.get_run(given))
    known = runs(uri, experiment, "pretraining")
    for row in known:
        if row["name"] == given:
            return row
    names = sorted({str(row["name"]) for row in known})
    raise UserError(
        f"{given!r} is no model id, run id or pretraining of experiment {experiment!r}{nearest(given, names)}; "
        f"its pretrainings: {', '.join(names) or 'none'}"
    )


def ui_command(uri: str) -> str:
    """What to type to see the store: the viewer's command, or for a server its address."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _run_row(run: Any) -> dict[str, Any]:
    content, about = run.data, run.info
    return {
        "run_id": about.run_id, "name": about.run_name, "tags": dict(content.tags), "params": dict(content.params),
        "metrics": dict(content.metrics), "start_time": about.start_time, "status": about.status,
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


def _pages(search: Any, experiments: list[str], where: dict[str, Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(experiments, **where, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
