"""Connections to the MLflow store: clients, and runs that accept entries. The only module that imports mlflow."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import locked_file
from infra.internals import internal
from infra.lean_imports import quiet_imports, without_optional
from infra.tracking.database import check_schema, create_sqlite, reading_client
from infra.tracking.faults import check_is_file, check_sqlite, describe_fault, hide_password, refuse_foreign
from infra.tracking.spool import Entry, warn

METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # limits of MLflow's log_batch
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
# Errors that a retry cannot solve: the entry is dropped with a warning. After any other error it stays in the spool.
PERMANENT_ERRORS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
STORE_LIBRARIES = ("mlflow", "sqlalchemy", "alembic", "requests", "urllib3", "sqlite3")
DEFAULT_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Two lines with pictographs at the end of every run and trial, which a console that is not UTF-8 cannot print.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # By default MLflow retries for minutes and training waits for it. The spool makes these retries unnecessary.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class StoredRun:
    """An MLflow run in a store that is reachable; entries are sent with ``apply``.

    ``last`` holds the last step of each metric, ``last_before`` the last step that earlier processes logged.
    """

    def __init__(self, client: Any, uri: str, opening: Entry, previous: StoredRun | None) -> None:
        self.client, self.uri, self.opening = client, uri, opening
        self.run_id: str
        if opening["run_id"] is None and previous is not None and previous.continued_by(opening):
            opening["run_id"] = previous.run_id
        run = _get_run(client, opening["run_id"]) if opening["run_id"] else None
        if run is None:
            experiment = _experiment_id(client, uri, opening["experiment"])
            name, tags, started = opening["run_name"], opening["tags"], opening["time"]
            run = client.create_run(experiment, run_name=name, tags=tags, start_time=started)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            self._batch(run.info.run_id, tags=opening["tags"])
        self.run_id, self.experiment_id = str(run.info.run_id), str(run.info.experiment_id)
        opening["run_id"] = self.run_id
        self.status, self.params = "RUNNING", dict(run.data.params)
        # The public .metrics has no steps, and reading the whole history of every metric is slow.
        stored = internal("mlflow", run.data, "_metric_objs")
        self.last: dict[str, int] = {metric.key: int(metric.step) for metric in stored}
        self.last_before = dict(self.last)
        self.incomplete = False  # whether a file or trials were rejected for good

    def continued_by(self, opening: Entry) -> bool:
        """Return whether ``opening`` restarts this run: the same names, from a process that knew no run id."""
        same = all(self.opening[key] == opening[key] for key in ("experiment", "run_name"))
        return same and self.status != "FINISHED"

    def apply(self, entry: Entry) -> Any:
        """Send one entry. Raises the error if a retry may succeed; warns and drops the entry otherwise."""
        try:
            return getattr(self, f"_{entry['op']}")(entry)
        except Exception as error:
            permanent = getattr(error, "error_code", None) in PERMANENT_ERRORS
            if not permanent and not isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            self.incomplete = self.incomplete or entry["op"] in ("artifact", "trials")
            warn(f"MLflow run {self.run_id} rejected {entry['op']}: {' '.join(str(error).split())[:300]}")

    def _params(self, entry: Entry) -> None:
        new = {key: value for key, value in entry["params"].items() if key not in self.params}
        changed = {f"restart.{key}": v for key, v in entry["params"].items() if self.params.get(key, v) != v}
        self._batch(self.run_id, params=new, tags=changed)
        self.params.update(new)

    def _metrics(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        model, dataset = entry["model_id"], entry["dataset"]
        extra = {"model_id": model, "dataset_name": dataset, "dataset_digest": entry["digest"] if dataset else None}
        rows = [
            Metric(name, value, entry["time"], step, **extra)
            for name, value, step in entry["metrics"]
            if model is not None or step > self.last_before.get(name, -1)
        ]
        for i in range(0, len(rows), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=rows[i : i + METRICS_PER_CALL])
        for row in rows:
            self.last[row.key] = max(row.step, self.last.get(row.key, -1))

    def _artifact(self, entry: Entry) -> None:
        self.client.log_artifact(self.run_id, entry["path"], entry["folder"])

    def _trials(self, entry: Entry) -> None:
        """Log each trial once, as a child run. A child run that a kill or an outage left unfinished is written again."""
        from mlflow.entities import Metric

        finished = set()
        for run in self._children("trial"):
            if run.info.status == "FINISHED":
                finished.add(run.data.tags.get("yaware.trial"))
            else:
                self.client.delete_run(run.info.run_id)
        for trial in entry["trials"]:
            if trial["key"] in finished:
                continue
            tags = {"mlflow.parentRunId": self.run_id, "yaware.kind": "trial", "yaware.trial": trial["key"]}
            child = self.client.create_run(
                self.experiment_id, run_name=trial["name"], tags={**trial["tags"], **tags}, start_time=entry["time"]
            )
            self._batch(child.info.run_id, params=trial["params"])
            rows = [Metric(name, value, entry["time"], step) for name, value, step in trial["metrics"]]
            for i in range(0, len(rows), METRICS_PER_CALL):
                self.client.log_batch(child.info.run_id, metrics=rows[i : i + METRICS_PER_CALL])
            self.client.set_terminated(child.info.run_id, "FINISHED", entry["time"])

    def _children(self, kind: str) -> Iterator[Any]:
        token, condition = None, f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`yaware.kind` = '{kind}'"
        while True:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _tags(self, entry: Entry) -> None:
        self._batch(self.run_id, tags=entry["tags"])

    def _checkpoint(self, entry: Entry) -> str:
        import mlflow
        from mlflow.entities import LoggedModelOutput

        tags = {"yaware.checkpoint": entry["folder"], "yaware.checkpoint.sha256": entry["digest"]}
        name = re.sub(r"[/:.%\"']", "-", entry["name"])  # MLflow does not allow these in a model's name
        # MLflow would import IPython to ask whether this is a notebook.
        with temporary_environment(MLFLOW_TRACKING_URI=self.uri), without_optional("IPython"):
            model = mlflow.create_external_model(
                name, source_run_id=self.run_id, model_type="encoder", params={"step": str(entry["step"])}, tags=tags,
                experiment_id=self.experiment_id,
            )  # fmt: skip
        model_id = str(model.model_id)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, entry["step"])])
        metrics = [(key, value, entry["step"]) for key, value in entry["metrics"].items()]
        self._metrics({**entry, "metrics": metrics, "model_id": model_id, "dataset": None})
        return model_id

    def _end(self, entry: Entry) -> None:
        self.status = entry["status"]
        self.client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _batch(
        self, run_id: str, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        from mlflow.entities import Param, RunTag

        rows = [("params", Param(key, value)) for key, value in (params or {}).items()]
        rows += [("tags", RunTag(key, value)) for key, value in (tags or {}).items()]
        for i in range(0, len(rows), PARAMS_PER_CALL):
            batch = rows[i : i + PARAMS_PER_CALL]
            self.client.log_batch(run_id, **{kind: [x for k, x in batch if k == kind] for kind in ("params", "tags")})


@contextmanager
def query_errors(uri: str) -> Iterator[None]:
    """Raise errors of the store inside the block (unreachable store, other tables, unknown run) as UserError.

    The error itself is the ``__cause__``.
    """
    try:
        yield
    except Exception as error:
        # MLflow passes on errors of the libraries that it uses.
        library = type(error).__module__.partition(".")[0]
        if library not in STORE_LIBRARIES and not isinstance(error, (OSError, ImportError)):
            raise
        raise UserError(describe_fault(uri, error)) from error


def client_of(uri: str, create: bool = True) -> Any:
    """Return an MLflow client of the store ``uri``, with telemetry off and few retries.

    A sqlite store that does not exist is created if ``create``; else nothing is written. Raises UserError if ``uri`` is not a
    store URI, if the sqlite file is missing and ``create`` is False, or if the database is not an MLflow store of this version.
    """
    check_uri(uri)
    file = _sqlite_file(uri)
    if not create and file is not None and not file.exists():
        raise UserError(
            f"tracking store {uri} does not exist; set --tracking-uri to the store that the run was logged to"
        )
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if file is not None:
        check_sqlite(uri, file)
    with quiet_imports():
        from mlflow import MlflowClient

    # It prints tracebacks of several pages for errors that are raised, too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with query_errors(uri):
        if is_server(uri):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        if not create or file is None:
            check_schema(uri, file, create)
            return MlflowClient(tracking_uri=uri, registry_uri=uri) if create else reading_client(uri)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(Path(f"{file}.lock")):  # if two processes create the tables at once, both fail
            if not file.exists():
                create_sqlite(file)
            check_schema(uri, file, create)
            return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_server(uri: str) -> bool:
    """Return whether an address is that of a server of MLflow, whose tables are its own business."""
    return uri.startswith(("http:", "https:", "databricks"))


def check_uri(uri: str) -> None:
    """Raise UserError if ``uri`` has none of the schemes in ``SCHEMES``, or is a sqlite address without a file."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SCHEMES or ":" not in uri:
        raise UserError(
            f"tracking URI {hide_password(uri)!r} is not an MLflow store; allowed schemes are {', '.join(SCHEMES)}, "
            "e.g. sqlite:////data/mlruns/mlflow.db or http://server:5000"
        )
    if scheme == "sqlite":
        file = re.fullmatch(r"sqlite(\+pysqlite)?:///([^?]+)(\?.*)?", uri)
        if file is None or file[2] == ":memory:" or file[2].startswith("file:"):
            raise UserError(
                f"tracking URI {uri!r} names no file; write sqlite:///relative/path.db or sqlite:////absolute/path.db (a "
                "database in memory would be lost with the process)"
            )


def check_not_foreign(uri: str) -> None:
    """Raise UserError if ``uri`` is not a store's address, or a sqlite file of something else. Other faults may pass."""
    check_uri(uri)
    file = _sqlite_file(uri)
    if file is not None:
        with suppress(sqlite3.Error, OSError):  # the run then keeps its entries in a file
            check_is_file(uri, file)
            if file.exists():
                refuse_foreign(uri, file)


def _sqlite_file(uri: str) -> Path | None:
    scheme, _, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" and path else None


def absolute_uri(uri: str) -> str:
    """Return a store's URI; a relative path of a sqlite file becomes absolute, so that two folders' stores differ."""
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.resolve()}"


def _experiment_id(client: Any, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        file = _sqlite_file(uri)
        location = (file.resolve().parent / "artifacts").as_uri() if file else None  # a server has its own default
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process created it meanwhile
    check_not_deleted(uri, experiment)
    return str(experiment.experiment_id)


def tag_experiment(uri: str, name: str, key: str, value: str) -> None:
    """Set a tag of an experiment, which is created if it is not there. Raises UserError if the store refuses."""
    with query_errors(uri):
        client = client_of(uri)
        client.set_experiment_tag(_experiment_id(client, uri, name), key, value)


def check_not_deleted(uri: str, experiment: Any) -> None:
    """Raise UserError if an experiment of the store was deleted."""
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {experiment.name!r} of {hide_password(uri)} was deleted; restore it with `mlflow experiments "
            f"restore --experiment-id {experiment.experiment_id}`, or choose another --experiment (run.experiment in a recipe)"
        )


def _get_run(client: Any, run_id: str) -> Any:
    try:
        return client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise
        warn(f"MLflow run {run_id} is not in this store; creating a new run")
        return None


@contextmanager
def temporary_environment(**values: str) -> Iterator[None]:
    """Set environment variables inside the block: some MLflow functions read the store's URI only from there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
