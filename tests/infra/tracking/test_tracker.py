"""Tracker and queries: logging, resumed runs, an unreachable store, the spool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.tracking import runs as queries
from infra.tracking import tracker
from infra.tracking.tracker import Tracker

DOWN = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracker.default_uri(tmp_path_factory.mktemp("tracking") / "mlruns")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def open_run(uri: str, experiment: str, run_id: str | None = None, spool: Path | None = None) -> Tracker:
    return Tracker.open(uri, experiment, "first", run_id=run_id, tags={"yaware.kind": "pretraining"}, spool=spool)


def test_a_query_returns_everything_that_a_run_logged(uri: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    run = open_run(uri, "whole")
    run.log_params({"loss.name": "yaware", "batch": 8, **{f"p{i}": i for i in range(150)}})
    run.log_metrics([("loss", 1 / (step + 1), step) for step in range(2500)])
    run.log_artifact(tmp_path / "recipe.yaml", "recipe")
    run.set_tags({"place": "here"})
    run.end()
    (row,) = queries.runs(uri, "whole", "pretraining")
    assert (row["run_id"], row["name"], row["status"]) == (run.run_id, "first", "FINISHED")
    assert row["params"]["batch"] == "8"
    assert len(row["params"]) == 152
    assert row["tags"]["place"] == "here"
    assert row["metrics"]["loss"] == pytest.approx(1 / 2500)
    assert queries.metric_history(uri, row["run_id"], "loss")[:2] == [(0, 1.0), (1, 0.5)]
    assert len(queries.metric_history(uri, row["run_id"], "loss")) == 2500
    assert queries.download(uri, row["run_id"], "recipe/recipe.yaml", tmp_path / "got").read_text() == "seed: 1\n"
    assert (Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / row["run_id"]).is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "recipe.yaml"]  # no other file is created


def test_checkpoints_are_logged_models_with_the_metrics_of_their_evaluations(uri: str, tmp_path: Path):
    run = open_run(uri, "models")
    ids = [run.log_checkpoint(f"a/b-{step}", step, tmp_path, "f" * 64, {"knn": 0.5}) for step in (20, 10)]
    evaluation = Tracker.open(uri, "models", "evaluation", tags={"yaware.kind": "evaluation"})
    evaluation.log_metrics([("auc", 0.75, 10)], model_id=ids[1], dataset="adni", dataset_digest="12ab")
    checkpoints = queries.checkpoints(uri, str(run.run_id))
    assert [(row["model_id"], row["step"]) for row in checkpoints] == [(ids[1], 10), (ids[0], 20)]
    assert (checkpoints[0]["path"], checkpoints[0]["sha256"], checkpoints[0]["name"]) == (
        str(tmp_path),
        "f" * 64,
        "a-b-10",
    )
    auc = {"name": "auc", "value": 0.75, "step": 10, "dataset": "adni", "run_id": evaluation.run_id}
    assert auc in checkpoints[0]["metrics"]
    assert [metric["name"] for metric in checkpoints[1]["metrics"]] == ["knn"]
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert [row["name"] for row in queries.runs(uri, "models", "evaluation")] == ["evaluation"]


def test_a_resumed_run_drops_steps_already_logged_and_tags_changed_params(uri: str):
    run = open_run(uri, "resume")
    run.log_params({"lr": 1, "seed": 3})
    run.log_metrics([("loss", float(step), step) for step in range(5)])
    run.end("FAILED")
    again = open_run(uri, "resume", run_id=run.run_id)
    assert (again.run_id, again.last_step("loss"), again.last_step("other")) == (run.run_id, 4, -1)
    again.log_params({"lr": 2, "seed": 3, "new": 0})
    again.log_metrics([("loss", -1.0, step) for step in range(3, 7)] + [("other", 1.0, 0)])
    again.end()
    (row,) = queries.runs(uri, "resume", "pretraining")
    assert row["params"] == {"lr": "1", "seed": "3", "new": "0"}
    assert {key: v for key, v in row["tags"].items() if key.startswith("restart.")} == {"restart.lr": "2"}
    assert queries.metric_history(uri, row["run_id"], "loss") == [*((s, float(s)) for s in range(5)), (5, -1), (6, -1)]
    assert row["metrics"]["other"] == 1.0


def test_a_run_id_that_the_store_lacks_starts_a_new_run(uri: str, capsys: pytest.CaptureFixture[str]):
    assert open_run(uri, "moved", run_id="0" * 32).run_id not in (None, "0" * 32)
    assert "creating a new run" in capsys.readouterr().err


def test_an_unreachable_store_costs_seconds_and_loses_no_entry(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tracker.client_of(uri)  # import mlflow now, outside the time measured
    spool, started = tmp_path / "out" / "spool.jsonl", time.monotonic()
    for first in (0, 3):  # the second process resumes at step 3 without a run id
        run = open_run(DOWN, "down", spool=spool)
        run.log_params({"lr": first})
        for step in range(first, first + 5):
            run.log_metrics([("loss", float(first), step)])
        assert run.log_checkpoint("model", first, tmp_path, "0" * 64) is None
        run.end("FAILED")
        assert (run.run_id, run.last_step("loss")) == (None, first + 4)
    assert time.monotonic() - started < 5
    assert capsys.readouterr().err.count("does not answer") == 2  # once per process
    assert all(json.loads(line)["op"] for line in spool.read_text().splitlines())
    with spool.open("a") as stream:
        stream.write('{"op": "metr')  # as after a kill while writing
    run = open_run(uri, "down", spool=spool)
    run.log_metrics([("loss", 9.0, step) for step in (7, 8)])
    run.end()
    (row,) = queries.runs(uri, "down", "pretraining")
    assert (row["run_id"], row["status"], row["params"]["lr"]) == (run.run_id, "FINISHED", "0")
    assert row["tags"]["restart.lr"] == "3"
    assert [value for _, value in queries.metric_history(uri, row["run_id"], "loss")] == [0] * 5 + [3] * 3 + [9]
    assert [model["step"] for model in queries.checkpoints(uri, row["run_id"])] == [0, 3]
    assert not spool.exists()


def test_a_store_that_returns_receives_the_spool(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracker, "SECONDS_BETWEEN_TRIES", 0.0)
    spool = tmp_path / "spool.jsonl"
    run = open_run(uri, "outage", spool=spool)
    run.log_metrics([("loss", 0.0, 0)])
    run._uri, run._run = DOWN, None
    run.log_metrics([("loss", 1.0, 1)])
    assert spool.is_file()
    run._uri = uri
    run.log_metrics([("loss", 2.0, 2)])
    assert not spool.exists()
    assert queries.metric_history(uri, str(run.run_id), "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def make_trial(number: int) -> dict[str, object]:
    scores = [("score", 0.1 * epoch, epoch) for epoch in (1, 2)]
    trial = {"name": f"ad, fold {number}", "key": str(number), "tags": {"yaware.task": "ad"}, "params": {"lr": number}}
    return {**trial, "metrics": [("inner_score", 0.2, 0), *scores]}


def test_trials_are_child_runs_that_are_written_once(uri: str, monkeypatch: pytest.MonkeyPatch):
    run = open_run(uri, "trials")
    trials = [make_trial(0), make_trial(1)]
    assert run._run is not None
    log_batch = run._run.client.log_batch

    def fail_at_second_trial(run_id: str, **rows: object) -> None:
        if rows.get("params") and rows["params"][0].value == "1":  # type: ignore[index]
            raise ConnectionError("gone")
        log_batch(run_id, **rows)

    monkeypatch.setattr(run._run.client, "log_batch", fail_at_second_trial)
    run.log_trials(trials)  # the second is started but not finished
    assert not run.stored
    assert sorted(row["status"] for row in queries.runs(uri, "trials", "trial")) == ["FINISHED", "RUNNING"]
    again = open_run(uri, "trials", run_id=run.run_id)
    for _ in range(2):
        again.log_trials(trials)
    again.end()
    assert again.stored
    trial_runs = sorted(queries.runs(uri, "trials", "trial"), key=lambda row: row["name"])
    assert [row["name"] for row in trial_runs] == ["ad, fold 0", "ad, fold 1"]
    for number, row in enumerate(trial_runs):
        assert (row["status"], row["params"]) == ("FINISHED", {"lr": str(number)})
        assert (row["tags"]["mlflow.parentRunId"], row["tags"]["yaware.task"]) == (run.run_id, "ad")
        assert row["metrics"]["inner_score"] == 0.2
        assert queries.metric_history(uri, row["run_id"], "score") == [(1, 0.1), (2, 0.2)]
    assert [row["run_id"] for row in queries.runs(uri, "trials", "pretraining")] == [run.run_id]


def test_stored_tells_whether_the_store_has_everything(uri: str, tmp_path: Path):
    run = open_run(uri, "known")
    assert run.stored
    run._uri, run._run, run._retry_at = DOWN, None, 0.0
    run.log_metrics([("loss", 0.0, 0)])
    assert not run.stored
    run._uri = uri
    run.end()
    assert run.stored
    run.log_artifact(tmp_path / "absent.txt")
    assert run.connected
    assert not run.stored
    with pytest.raises(UserError, match="127.0.0.1"):
        queries.has_model(DOWN, "m-0")
    assert not queries.has_model(uri, "m-0")


def test_rejected_entries_are_dropped_with_a_warning(uri: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run = open_run(uri, "refused", spool=tmp_path / "spool.jsonl")
    run.log_artifact(tmp_path / "absent.txt")
    run.log_metrics([("bad\nname", 1.0, 0)])
    run.log_metrics([("loss", 1.0, 0)])
    warnings = capsys.readouterr().err
    assert warnings.count(f"MLflow run {run.run_id} rejected artifact: ") == 1
    assert warnings.count(f"MLflow run {run.run_id} rejected metrics: ") == 1
    assert queries.metric_history(uri, str(run.run_id), "loss") == [(0, 1.0)]
    assert not (tmp_path / "spool.jsonl").exists()


def test_failed_queries_name_the_cause(uri: str, tmp_path: Path):
    open_run(uri, "pretraining-a").end()
    with pytest.raises(UserError, match="did you mean 'pretraining-a'.*it has .*Default"):
        queries.runs(uri, "pretrainng-a", "pretraining")
    with pytest.raises(UserError, match="does not exist"):
        queries.runs(tracker.default_uri(tmp_path / "none"), "x", "pretraining")
    with pytest.raises(UserError, match="127.0.0.1"):
        queries.runs(DOWN, "x", "pretraining")
    with pytest.raises(UserError, match="is not an MLflow store"):
        open_run("mlruns", "x")
    with pytest.raises(UserError, match="not found"):
        queries.checkpoints(uri, "0" * 32)
    assert not (tmp_path / "none").exists()


def test_the_default_uri_is_the_environment_variable_or_a_sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert tracker.default_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert queries.ui_command("sqlite:///a b.db") == "mlflow ui --backend-store-uri 'sqlite:///a b.db'"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracker.default_uri() == "http://server:5000"


def test_two_processes_can_create_the_store_at_the_same_time(tmp_path: Path):
    code = (
        "from infra.tracking.tracker import *; t = Tracker.open(default_uri(), 'both', 'r', tags={'yaware.kind': 'k'}); "
        "assert t.run_id; t.end()"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in started] == ["", ""]  # nothing on stderr
    assert [process.returncode for process in started] == [0, 0]
    assert len(queries.runs(tracker.default_uri(), "both", "k")) == 2
