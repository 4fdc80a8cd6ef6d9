"""Log a run to MLflow without ever stopping training (``infra.tracking.runs`` reads the store).

The default store is a sqlite file with the artifacts beside it; no server is needed. If the store is unreachable, a call
takes a few seconds, then entries go to a spool file (JSON lines), which is sent when the store is reachable again.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.tracking.faults import describe_fault
from infra.tracking.mlflow_store import StoredRun, check_not_foreign, check_uri, client_of
from infra.tracking.spool import Entry, Spool, warn

# The wait doubles at each failure, because one try may take 20 s.
SECONDS_BETWEEN_TRIES, MOST_SECONDS_BETWEEN_TRIES = 30.0, 600.0


def default_uri(root: Path = Path("mlruns")) -> str:
    """Return MLFLOW_TRACKING_URI if set, else the sqlite store ``<root>/mlflow.db`` (created at first use)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve()}/mlflow.db"


def store_uri(uri: str | None = None) -> str:
    """Return the store to log to: ``uri``, or ``default_uri()``.

    Raises UserError if it is not a store's address, or a database of something else, into which nothing may be written.
    """
    uri = uri or default_uri()
    check_not_foreign(uri)
    return uri


class Tracker:
    """One MLflow run, written by global rank 0. Create it with ``Tracker.open``.

    ``run_id`` is None until the store has been reached once. No method raises because of the store.
    """

    def __init__(self, uri: str, opening: Entry, spool: Path | None) -> None:
        self.run_id: str | None = opening["run_id"]
        self._uri, self._opening, self._spool = uri, opening, Spool(spool)
        self._run: StoredRun | None = None
        self._last: dict[str, int] = {}
        self._retry_at, self._failures, self._warned = 0.0, 0, False
        self._incomplete = False
        self.fault = ""  # what was wrong with the store at the last failure

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
        """Create a run, or continue ``run_id``; entries that an earlier process left in ``spool`` are sent first.

        Args:
            uri: MLflow store, for example ``sqlite:////data/mlruns/mlflow.db`` or ``http://server:5000``.
            experiment: MLflow experiment; created if it does not exist.
            run_name: name of a new run.
            run_id: the run to continue; None creates a new one.
            tags: tags of the run.
            spool: file for entries that cannot be sent. None keeps them in memory; they are lost with the process.

        Raises:
            UserError: if ``uri`` is not an MLflow store URI.
        """
        check_uri(uri)
        opening = {
            "op": "open", "id": uuid.uuid4().hex, "experiment": experiment, "run_name": run_name, "run_id": run_id,
            "tags": {key: str(value) for key, value in (tags or {}).items()}, "time": _now(),
        }  # fmt: skip
        tracker = cls(uri, opening, spool)
        tracker._connect()
        return tracker

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters as text. If a resumed run has another value, the new one becomes tag ``restart.<key>``."""
        self._log("params", params={key: str(value) for key, value in params.items()})

    def log_metrics(
        self,
        metrics: Sequence[tuple[str, float, int]],
        model_id: str | None = None,
        dataset: str | None = None,
        dataset_digest: str = "unknown",
    ) -> None:
        """Log (name, value, step) triples in as few calls as possible.

        In a resumed run, steps that a metric already has are dropped, except for metrics of a model (``model_id``).
        """
        rows = [(str(name), float(value), int(step)) for name, value, step in metrics]
        if not rows:
            return
        for name, _, step in rows:
            self._last[name] = max(step, self.last_step(name))
        self._log("metrics", metrics=rows, model_id=model_id, dataset=dataset, digest=dataset_digest)

    def last_step(self, metric: str) -> int:
        """Return the last step logged of ``metric``, by earlier processes too; -1 if there is none."""
        return self._last.get(metric, -1)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy one file into ``folder`` of the run's artifacts."""
        self._log("artifact", path=str(Path(path).resolve()), folder=folder)

    def log_trials(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Log the trials of a search as child runs with tag yaware.kind=trial. A trial logged twice is stored once.

        Each trial is a mapping with ``name``, ``key`` (unique within the run), ``params``, ``tags`` and ``metrics``,
        a list of (name, value, step) triples.
        """
        rows = [
            {
                "name": trial["name"], "key": trial["key"], "tags": {k: str(v) for k, v in trial["tags"].items()},
                "params": {k: str(v) for k, v in trial["params"].items()},
                "metrics": [(str(name), float(value), int(step)) for name, value, step in trial["metrics"]],
            }
            for trial in trials
        ]  # fmt: skip
        if rows:
            self._log("trials", trials=rows)

    @property
    def connected(self) -> bool:
        """Whether the store has accepted the last entry and all entries before it."""
        return self._run is not None

    @property
    def stored(self) -> bool:
        """Whether the store has everything that was logged: nothing is spooled, and no file or trial was rejected."""
        return self._run is not None and not (self._incomplete or self._run.incomplete)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._log("tags", tags={key: str(value) for key, value in tags.items()})

    def log_checkpoint(
        self, name: str, step: int, folder: Path, digest: str, metrics: Mapping[str, float] | None = None
    ) -> str | None:
        """Log a checkpoint as an MLflow logged model, without copying it. Return its model id, or None if spooled.

        ``folder`` and ``digest`` (SHA-256 of the weights) become tags yaware.checkpoint and yaware.checkpoint.sha256.
        """
        values = {key: float(value) for key, value in (metrics or {}).items()}
        path = str(Path(folder).resolve())
        model_id = self._log("checkpoint", name=name, step=int(step), folder=path, digest=digest, metrics=values)
        return None if model_id is None else str(model_id)

    def end(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, after one more attempt to send the spool."""
        self._retry_at = 0.0
        self._log("end", status=status)
        if self._run is not None and status == "FINISHED":
            self._spool.replace([])
        elif self._run is None and self._spool.path is None:
            warn(f"tracking store {self._uri} stayed unreachable; run {self._opening['run_name']!r} is not in MLflow")

    def _log(self, op: str, **arguments: Any) -> Any:
        entry = {"op": op, "time": _now(), **arguments}
        if self._run is None and time.monotonic() >= self._retry_at:
            self._connect()
        if self._run is not None:
            try:
                return self._run.apply(entry)
            except Exception as error:  # no error of the store may stop training
                self._disconnect(error)
                self._spool.append(self._opening)
        self._spool.append(entry)
        return None

    def _connect(self) -> None:
        """Send the spool in order and open the run; entries that could not be sent stay in the spool."""
        entries = self._spool.read()
        if all(entry.get("id") != self._opening["id"] for entry in entries):
            entries.append(self._opening)
        run, error = _send(self._uri, entries, self._spool)
        self._incomplete = self._incomplete or (run is not None and run.incomplete)
        if error is not None:
            self._disconnect(error)
            return
        assert run is not None  # the entries contain this tracker's opening
        late = self.run_id is None and self._warned
        self._run, self._opening, self.run_id, self._failures = run, run.opening, run.run_id, 0
        for name, step in run.last.items():
            self._last[name] = max(step, self.last_step(name))
        # The caller has recorded no run id if the store was down at first: keep it for the process that resumes.
        self._spool.replace([run.opening] if late else [])

    def _disconnect(self, error: Exception) -> None:
        pause = min(SECONDS_BETWEEN_TRIES * 2**self._failures, MOST_SECONDS_BETWEEN_TRIES)
        self._incomplete = self._incomplete or (self._run is not None and self._run.incomplete)
        self.fault = _fault(self._uri, error)
        self._run, self._retry_at, self._failures = None, time.monotonic() + pause, self._failures + 1
        if not self._warned:
            kept = self._spool.path or "memory"
            warn(f"{self.fault}; continuing, metrics are kept in {kept}")
        self._warned = True


def send_spool(uri: str, path: Path) -> bool:
    """Send the spool file of a process that has ended. Return False, with a warning, if the store is still down."""
    spool = Spool(path)
    _, error = _send(uri, spool.read(), spool)
    if error is None:
        spool.replace([])
        return True
    warn(f"{_fault(uri, error)}; {path} is kept")
    return False


def _fault(uri: str, error: Exception) -> str:
    """Return one line about an error of the store."""
    return str(error) if isinstance(error, UserError) else describe_fault(uri, error)


def _send(uri: str, entries: Sequence[Entry], spool: Spool) -> tuple[StoredRun | None, Exception | None]:
    """Send entries in order. Return the last run and the error, if any; ``spool`` then holds the entries not sent."""
    run: StoredRun | None = None
    sent = 0
    try:
        client = client_of(uri)
        for entry in entries:
            if entry["op"] == "open":
                run = StoredRun(client, uri, entry, run)
            elif run is not None:
                run.apply(entry)
            sent += 1
    except Exception as error:  # no error of the store may stop training
        rest = entries[sent:]
        spool.replace([run.opening, *rest] if run is not None else rest)
        return run, error
    return run, None


def _now() -> int:
    return int(time.time() * 1000)
