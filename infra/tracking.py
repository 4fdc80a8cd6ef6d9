"""MLflow behind one door: a tracker that never stops training (infra.runs asks the store).

Default store: a sqlite file with the artifacts beside it, no server needed. A store that does not answer costs a few
seconds, then everything goes to a spool file (JSON lines) and is sent when the store answers again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.spool import Entry, Spool, warn

SECONDS_BETWEEN_TRIES = 30.0
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's own limits of log_batch
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
# Errors that the same call would meet again: the entry is dropped with a warning, where others wait in the spool.
HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would try for minutes; training waits for it, and the spool makes waiting needless.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def default_uri(root: Path = Path("mlruns")) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite store ``<root>/mlflow.db`` (made at first use, artifacts beside it)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve()}/mlflow.db"


class Tracker:
    """One MLflow run, written by global rank 0. Make it with ``Tracker.open``.

    ``run_id`` is None as long as the store has not answered. Nothing here raises because of the store.
    """

    def __init__(self, uri: str, opening: Entry, spool: Path | None) -> None:
        self.run_id: str | None = opening["run_id"]
        self._uri, self._opening, self._spool = uri, opening, Spool(spool)
        self._run: _Run | None = None
        self._last: dict[str, int] = {}
        self._retry_at, self._warned = 0.0, False

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        spool: Path | None = None,
    ) -> Tracker:
        """Create a run, or go on with ``run_id``; first send what an earlier process left in ``spool``.

        Without ``spool`` the entries of an outage are kept in memory and lost with the process.
        UserError where ``uri`` names no store that MLflow has.
        """
        _check_uri(uri)
        opening = {
            "op": "open", "id": uuid.uuid4().hex, "experiment": experiment, "run_name": run_name, "run_id": run_id,
            "tags": {key: str(value) for key, value in (tags or {}).items()}, "time": _now(),
        }  # fmt: skip
        tracker = cls(uri, opening, spool)
        tracker._catch_up()
        return tracker

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters as text. One that a resumed run had with another value goes to tag ``restart.<key>``."""
        self._do("params", params={key: str(value) for key, value in params.items()})

    def log_metrics(
        self,
        metrics: Sequence[tuple[str, float, int]],
        model_id: str | None = None,
        dataset: str | None = None,
        dataset_digest: str = "unknown",
    ) -> None:
        """Log (name, value, step) triples in few calls.

        In a resumed run, steps that a metric already has are dropped; metrics of a model (``model_id``) never are.
        """
        rows = [(str(name), float(value), int(step)) for name, value, step in metrics]
        if not rows:
            return
        for name, _, step in rows:
            self._last[name] = max(step, self.last_step(name))
        self._do("metrics", metrics=rows, model_id=model_id, dataset=dataset, digest=dataset_digest)

    def last_step(self, metric: str) -> int:
        """The last step logged of ``metric``, also by earlier processes of this run; -1 where there is none."""
        return self._last.get(metric, -1)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store one file, in ``folder`` of the run's artifacts."""
        self._do("artifact", path=str(Path(path).resolve()), folder=folder)

    def log_artifacts_dir(self, path: Path, folder: str | None = None) -> None:
        """Store the content of a directory."""
        self._do("artifacts", path=str(Path(path).resolve()), folder=folder)

    def log_text(self, text: str, artifact_path: str) -> None:
        """Store ``text`` as a file of the run's artifacts."""
        self._do("text", text=text, path=artifact_path)

    def log_dict(self, content: Any, artifact_path: str) -> None:
        """Store ``content`` as a JSON file of the run's artifacts."""
        self.log_text(json.dumps(content, indent=1, sort_keys=True) + "\n", artifact_path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._do("tags", tags={key: str(value) for key, value in tags.items()})

    def log_checkpoint(
        self, name: str, step: int, folder: Path, digest: str, metrics: Mapping[str, float] | None = None
    ) -> str | None:
        """Enter a checkpoint as a logged model without copying it; its model id, None where the store is down.

        ``folder`` and ``digest`` (SHA-256 of the weights) become tags yaware.checkpoint and yaware.checkpoint.sha256.
        """
        figures = {key: float(value) for key, value in (metrics or {}).items()}
        where = str(Path(folder).resolve())
        model_id = self._do("checkpoint", name=name, step=int(step), folder=where, digest=digest, metrics=figures)
        return None if model_id is None else str(model_id)

    def end(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED, after a last try to send the spool."""
        self._retry_at = 0.0
        self._do("end", status=status)
        if self._run is not None and status == "FINISHED":
            self._spool.replace([])
        elif self._run is None and self._spool.path is None:
            warn(f"tracking store {self._uri} stayed down; run {self._opening['run_name']!r} is not in MLflow")

    def _do(self, op: str, **arguments: Any) -> Any:
        entry = {"op": op, "time": _now(), **arguments}
        if self._run is None and time.monotonic() >= self._retry_at:
            self._catch_up()
        if self._run is not None:
            try:
                return self._run.apply(entry)
            except Exception as error:  # whatever the store does, training goes on
                self._fell_down(error)
                self._spool.append(self._opening)
        self._spool.append(entry)
        return None

    def _catch_up(self) -> None:
        """Send the spool, in its order, and open the run; what could not be sent stays in the spool."""
        entries = self._spool.read()
        if all(entry.get("id") != self._opening["id"] for entry in entries):
            entries.append(self._opening)
        run: _Run | None = None
        sent = 0
        try:
            client = client_of(self._uri)
            for entry in entries:
                if entry["op"] == "open":
                    run = _Run(client, self._uri, entry, run)
                elif run is not None:
                    run.apply(entry)
                sent += 1
        except Exception as error:  # as above
            rest = entries[sent:]
            self._spool.replace([run.opening, *rest] if run is not None else rest)
            self._fell_down(error)
            return
        assert run is not None  # the last opening is this tracker's own
        late = self.run_id is None and self._warned
        self._run, self._opening, self.run_id = run, run.opening, run.run_id
        for name, step in run.last.items():
            self._last[name] = max(step, self.last_step(name))
        # The caller noted no run id when the store was down: leave it to be found by the process that resumes.
        self._spool.replace([run.opening] if late else [])

    def _fell_down(self, error: Exception) -> None:
        self._run, self._retry_at = None, time.monotonic() + SECONDS_BETWEEN_TRIES
        if not self._warned:
            kept = self._spool.path or "memory"
            reason = " ".join(str(error).split())[:200]
            warn(f"tracking store {self._uri} does not answer ({reason}); work goes on, its figures wait in {kept}")
        self._warned = True


class _Run:
    """A run in a store that answers. ``floor`` holds, per metric, the last step that earlier processes logged."""

    def __init__(self, client: Any, uri: str, opening: Entry, previous: _Run | None) -> None:
        self.client, self.uri, self.opening = client, uri, opening
        self.run_id: str
        if opening["run_id"] is None and previous is not None and previous.continued_by(opening):
            opening["run_id"] = previous.run_id
        run = _find_run(client, opening["run_id"]) if opening["run_id"] else None
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
        # The public .metrics has values without steps, and a whole history per metric is slow to read.
        self.last: dict[str, int] = {metric.key: int(metric.step) for metric in run.data._metric_objs}
        self.floor = dict(self.last)

    def continued_by(self, opening: Entry) -> bool:
        """Whether ``opening`` is the same work begun again by a process that knew no run id."""
        same = all(self.opening[key] == opening[key] for key in ("experiment", "run_name"))
        return same and self.status != "FINISHED"

    def apply(self, entry: Entry) -> Any:
        """Send one entry; raises where it is worth another try."""
        try:
            return getattr(self, f"_{entry['op']}")(entry)
        except Exception as error:
            hopeless = getattr(error, "error_code", None) in HOPELESS
            if not hopeless and not isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            warn(f"MLflow run {self.run_id} refused {entry['op']}: {' '.join(str(error).split())[:300]}")

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
            if model is not None or step > self.floor.get(name, -1)
        ]
        for i in range(0, len(rows), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=rows[i : i + METRICS_PER_CALL])
        for row in rows:
            self.last[row.key] = max(row.step, self.last.get(row.key, -1))

    def _artifact(self, entry: Entry) -> None:
        self.client.log_artifact(self.run_id, entry["path"], entry["folder"])

    def _artifacts(self, entry: Entry) -> None:
        self.client.log_artifacts(self.run_id, entry["path"], entry["folder"])

    def _text(self, entry: Entry) -> None:
        self.client.log_text(self.run_id, entry["text"], entry["path"])

    def _tags(self, entry: Entry) -> None:
        self._batch(self.run_id, tags=entry["tags"])

    def _checkpoint(self, entry: Entry) -> str:
        import mlflow
        from mlflow.entities import LoggedModelOutput

        tags = {"yaware.checkpoint": entry["folder"], "yaware.checkpoint.sha256": entry["digest"]}
        name = re.sub(r"[/:.%\"']", "-", entry["name"])  # MLflow refuses these in a model's name
        with _environment(MLFLOW_TRACKING_URI=self.uri):
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

        made = [("params", Param(key, value)) for key, value in (params or {}).items()]
        made += [("tags", RunTag(key, value)) for key, value in (tags or {}).items()]
        for i in range(0, len(made), PARAMS_PER_CALL):
            some = made[i : i + PARAMS_PER_CALL]
            self.client.log_batch(run_id, **{kind: [x for k, x in some if k == kind] for kind in ("params", "tags")})


@contextmanager
def readable(uri: str) -> Iterator[None]:
    """A store that does not answer a query, or an unknown run, becomes a UserError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise UserError(f"tracking store {uri}: {' '.join(str(error).split())[:300]}") from error


def client_of(uri: str, create: bool = True) -> Any:
    _check_uri(uri)
    file = _sqlite_file(uri)
    if not create and file is not None and not file.is_file():
        raise UserError(f"tracking store {uri} does not exist; give the URI that the run was logged to")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if file is None or not create:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that make the tables at once would both fail
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_uri(uri: str) -> None:
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SCHEMES or ":" not in uri:
        raise UserError(
            f"tracking URI {uri!r} is not a store of MLflow; allowed are {', '.join(SCHEMES)}, "
            "e.g. sqlite:////data/mlruns/mlflow.db or http://server:5000"
        )


def _sqlite_file(uri: str) -> Path | None:
    scheme, _, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" and path else None


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        place = (file.resolve().parent / "artifacts").as_uri() if file else None  # a server knows its own place
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was quicker
    return str(found.experiment_id)


def _find_run(client: Any, run_id: str) -> Any:
    try:
        return client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise
        warn(f"MLflow run {run_id} is not in this store; a new run is made")
        return None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
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


def _now() -> int:
    return int(time.time() * 1000)
