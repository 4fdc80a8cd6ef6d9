"""MLflow behind one door: a tracker that never stops training (infra.tracking.runs asks the store).

Default store: a sqlite file with the artifacts beside it, no server needed. A store that does not answer costs a few
seconds, then everything goes to a spool file (JSON lines) and is sent when the store answers again.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.tracking.mlflow_store import StoredRun, check_uri, client_of
from infra.tracking.spool import Entry, Spool, warn

SECONDS_BETWEEN_TRIES, MOST_SECONDS_BETWEEN_TRIES = 30.0, 600.0  # doubled at each failure: a try may take 20 s


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
        self._run: StoredRun | None = None
        self._last: dict[str, int] = {}
        self._retry_at, self._failures, self._warned = 0.0, 0, False
        self._refused = False

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
        check_uri(uri)
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

    def log_trials(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Store a search's trials as child runs with tag yaware.kind=trial, each once however often it is logged.

        A trial has a ``name``, a ``key`` of its own among all of this run, ``params``, ``tags``, and ``metrics``, which are
        (name, value, step) triples.
        """
        made = [
            {
                "name": each["name"], "key": each["key"], "tags": {k: str(v) for k, v in each["tags"].items()},
                "params": {k: str(v) for k, v in each["params"].items()},
                "metrics": [(str(name), float(value), int(step)) for name, value, step in each["metrics"]],
            }
            for each in trials
        ]  # fmt: skip
        if made:
            self._do("trials", trials=made)

    @property
    def answers(self) -> bool:
        """Whether the store took the last entry, and all before it."""
        return self._run is not None

    @property
    def stored(self) -> bool:
        """Whether the store has all that was logged so far: nothing waits, and no file or trial was refused."""
        return self._run is not None and not (self._refused or self._run.refused)

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
        run, error = _send(self._uri, entries, self._spool)
        self._refused = self._refused or (run is not None and run.refused)
        if error is not None:
            self._fell_down(error)
            return
        assert run is not None  # the last opening is this tracker's own
        late = self.run_id is None and self._warned
        self._run, self._opening, self.run_id, self._failures = run, run.opening, run.run_id, 0
        for name, step in run.last.items():
            self._last[name] = max(step, self.last_step(name))
        # The caller noted no run id when the store was down: leave it to be found by the process that resumes.
        self._spool.replace([run.opening] if late else [])

    def _fell_down(self, error: Exception) -> None:
        pause = min(SECONDS_BETWEEN_TRIES * 2**self._failures, MOST_SECONDS_BETWEEN_TRIES)
        self._refused = self._refused or (self._run is not None and self._run.refused)
        self._run, self._retry_at, self._failures = None, time.monotonic() + pause, self._failures + 1
        if not self._warned:
            kept = self._spool.path or "memory"
            reason = " ".join(str(error).split())[:200]
            warn(f"tracking store {self._uri} does not answer ({reason}); work goes on, its figures wait in {kept}")
        self._warned = True


def send_spool(uri: str, path: Path) -> bool:
    """Send what a process that has ended left in its spool file; False, with a warning, where the store is still down."""
    spool = Spool(path)
    _, error = _send(uri, spool.read(), spool)
    if error is None:
        spool.replace([])
        return True
    warn(f"tracking store {uri} does not answer ({' '.join(str(error).split())[:200]}); {path} waits on")
    return False


def _send(uri: str, entries: Sequence[Entry], spool: Spool) -> tuple[StoredRun | None, Exception | None]:
    """Send entries in their order; the run that they end in. On an error ``spool`` holds what was not sent."""
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
    except Exception as error:  # whatever the store does, training goes on
        rest = entries[sent:]
        spool.replace([run.opening, *rest] if run is not None else rest)
        return run, error
    return run, None


def _now() -> int:
    return int(time.time() * 1000)
