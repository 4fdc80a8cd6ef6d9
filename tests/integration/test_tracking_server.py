"""The MLflow server of a group, PostgreSQL, artifacts through the server and passwords, with the real commands."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.error
import urllib.request
from functools import partial

import pytest

from infra import cli
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of, query_errors
from infra.tracking.tracker import Tracker, send_spool
from tests.faults.rank_process import start, wait
from tests.runs import ROOT, losses
from tests.tracking_server import ADMIN, Server, database, page_blocks, server, why_not

REASON = why_not()
PAGE = ROOT / "docs" / "tracking_server.md"
STEPS, WRONG = 4, "not-the-password"
pytestmark = [
    pytest.mark.distributed, pytest.mark.timeout(1800), pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    """A server with the users ann and ben."""
    allowed = {"MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.lab.org,127.0.0.1:*"}  # as docs/tracking_server.md says
    with database() as used, server(used, **allowed) as running, pytest.MonkeyPatch.context() as patch:
        from mlflow.server import get_app_client

        for name, value in running.log_in(ADMIN).items():
            patch.setenv(name, value)
        for user in ("ann", "ben"):
            running.passwords[user] = f"password of {user}"
            get_app_client("basic-auth", tracking_uri=running.uri).create_user(user, running.passwords[user])
        yield running


@pytest.fixture
def log_in(served: Server, monkeypatch):
    """Return a function that logs this process in as a user."""

    def enter(user: str, password: str | None = None) -> None:
        for name, value in served.log_in(user, password).items():
            monkeypatch.setenv(name, value)

    return enter


def evaluation(served: Server, experiment: str, name: str, **options: object) -> Tracker:
    return Tracker.open(served.uri, experiment, name, tags={"yaware.kind": "evaluation"}, **options)


@pytest.mark.jobs
def test_two_users_log_runs_files_and_checkpoints_into_one_experiment(served, log_in, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("kept")
    for user in ("ann", "ben"):
        log_in(user)
        tracker = evaluation(served, "shared", user)
        tracker.log_metrics([("loss", 2.0, 1), ("loss", 1.0, 2)])
        tracker.log_artifact(tmp_path / "notes.txt", "files")
        assert tracker.log_checkpoint("c", 2, tmp_path, "0" * 64, {"age_mae": 5.0})
        tracker.end()
        assert tracker.stored
    rows = {row["name"]: row for row in runs.runs(served.uri, "shared", "evaluation")}
    assert set(rows) == {"ann", "ben"}
    for row in rows.values():
        assert runs.metric_history(served.uri, row["run_id"], "loss") == [(1, 2.0), (2, 1.0)]
        assert runs.download(served.uri, row["run_id"], "files/notes.txt", tmp_path / row["name"]).read_text() == "kept"
        assert [model["step"] for model in runs.checkpoints(served.uri, row["run_id"])] == [2]
    # The server has the files; the users write none of them.
    kept = list((served.database.folder / "artifacts").rglob("notes.txt"))
    assert len(kept) == 2
    assert "View run" not in capfd.readouterr().out


@pytest.mark.jobs
def test_what_the_server_refuses_is_told_in_one_line_and_sent_later(served, log_in, tmp_path, capfd):
    spool = tmp_path / "spool.jsonl"
    log_in("ann", WRONG)
    tracker = evaluation(served, "late", "n", spool=spool)
    for step in range(3):
        tracker.log_metrics([("loss", 1.0 / (1 + step), step)])
    tracker.end()
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert "it refuses the login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in printed
    assert WRONG not in printed
    log_in("ann")
    assert send_spool(served.uri, spool)
    assert not spool.exists()
    (row,) = runs.runs(served.uri, "late", "evaluation")
    assert runs.metric_history(served.uri, row["run_id"], "loss") == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]


@pytest.mark.jobs
def test_a_running_job_sends_what_waits_when_its_file_of_credentials_is_corrected(served, monkeypatch, tmp_path, capfd):
    for name in served.log_in("ann"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".mlflow/credentials"
    file.parent.mkdir()
    text = "[mlflow]\nmlflow_tracking_username = ann\nmlflow_tracking_password = "
    file.write_text(text + WRONG)
    tracker = evaluation(served, "corrected", "n", spool=tmp_path / "spool.jsonl")
    tracker.log_metrics([("loss", 1.0, 1)])
    assert not tracker.connected
    file.write_text(text + served.passwords["ann"])
    tracker.end()  # tries at once; otherwise the next try is 30 s later
    assert tracker.stored
    (row,) = runs.runs(served.uri, "corrected", "evaluation")
    assert runs.metric_history(served.uri, row["run_id"], "loss") == [(1, 1.0)]
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.jobs
def test_a_user_who_may_not_do_something_is_told_so(served, log_in):
    log_in("ann")
    evaluation(served, "anns own", "first").end()
    (row,) = runs.runs(served.uri, "anns own", "evaluation")
    log_in("ben")
    client = client_of(served.uri)
    experiment = client.get_run(row["run_id"]).info.experiment_id
    words = "it does not let this user do that; ask its administrator for the permission EDIT"
    with pytest.raises(UserError, match=words), query_errors(served.uri):
        client.delete_experiment(experiment)
    log_in("ann")
    client_of(served.uri).delete_experiment(experiment)


@pytest.mark.jobs
@pytest.mark.parametrize(("host", "status", "words"), [("mlflow.lab.org", 401, "not authenticated"),
                                                       ("other.org", 403, "Invalid Host header")])  # fmt: skip
def test_the_server_answers_only_the_host_names_that_it_was_given(served, host, status, words):
    request = urllib.request.Request(
        f"{served.uri}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == status
    assert words in refused.value.read().decode()


# -- with the real commands


def arguments(shards, output, served: Server, **more: object) -> list[str]:
    given = {
        "data.shards": shards, "run.output": output, "train.steps": STEPS, "batch.global": 8, "checkpoint.every_steps": 2,
        "encoder.options": "{width: 0.25, norm: group}", "run.tracking_uri": served.uri, "monitor.every_epochs": 0, **more,
    }  # fmt: skip
    return ["--config", "demo-cpu", *(f"--{key}={value}" for key, value in given.items())]


def set_variables(variables: dict[str, str], rank: int) -> None:
    os.environ.update(variables)


def pretraining(folder, command, variables):
    folder.mkdir()
    return start(command, folder, 1, harm=partial(set_variables, variables))


@pytest.fixture(scope="module")
def trained(served, shards, tmp_path_factory):
    """The folder of two pretrainings, of two users at once: ``ann/run`` and ``ben/run``, in the experiment ``both``."""
    folder = tmp_path_factory.mktemp("both")
    started = [
        pretraining(
            folder / user,
            arguments(shards, folder / user / "run", served, **{"run.experiment": "both", "run.name": user}),
            served.log_in(user),
        )
        for user in ("ann", "ben")
    ]
    for ranks, user in zip(started, ("ann", "ben"), strict=True):
        assert wait(ranks, 600) == [0], (folder / user / "rank-0.log").read_text()[-3000:]
    return folder


@pytest.mark.slow
def test_two_pretrainings_at_once_land_with_their_metrics_and_recipes(served, trained, log_in, tmp_path):
    log_in("ben")
    rows = {row["name"]: row for row in runs.runs(served.uri, "both", "pretraining")}
    assert set(rows) == {"ann", "ben"}
    for user, row in rows.items():
        output = trained / user / "run"
        assert row["status"] == "FINISHED"
        assert runs.metric_history(served.uri, row["run_id"], "loss") == losses(output)
        assert [model["step"] for model in runs.checkpoints(served.uri, row["run_id"])] == [2, 4]
        copy = runs.download(served.uri, row["run_id"], "recipe/recipe.yaml", tmp_path / user)
        assert copy.read_bytes() == (output / "recipe.yaml").read_bytes()
        assert "yaware: warning" not in (trained / user / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_pretraining_with_a_wrong_password_trains_and_its_metrics_arrive_later(
    served, shards, log_in, tmp_path, capsys
):
    folder = tmp_path / "late"
    command = arguments(shards, folder / "run", served, **{"run.experiment": "refused"})
    assert wait(pretraining(folder, command, served.log_in("ann", WRONG)), 600) == [0]
    log = (folder / "rank-0.log").read_text()
    assert log.count("it refuses the login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") == 1
    assert WRONG not in log
    assert [step for step, _ in losses(folder / "run")] == list(range(STEPS))
    assert (folder / "run/mlflow-spool.jsonl").is_file()
    log_in("ann")
    assert cli.run(["pretrain", *command]) == 0
    assert "sent to MLflow the metrics that had been waiting" in capsys.readouterr().out
    (row,) = runs.runs(served.uri, "refused", "pretraining")
    assert row["status"] == "FINISHED"
    assert runs.metric_history(served.uri, row["run_id"], "loss") == losses(folder / "run")
    assert len(runs.checkpoints(served.uri, row["run_id"])) == 2


@pytest.mark.slow
def test_evaluate_and_compare_read_and_write_on_the_server(served, trained, shards, log_in, tmp_path, monkeypatch):
    log_in("ben")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.uri)
    protocol = ["--tasks", "age", "--protocols", "linear", "--folds", "2", "--draws", "1", "--n-train", "10",
                "--repeats", "1", "--halvings", "0", "--workers", "1", "--experiment", "both"]  # fmt: skip
    checkpoints = [str(trained / user / "run") for user in ("ann", "ben")]
    storage = ["--storage", str(tmp_path / "search")]
    assert cli.run(["evaluate", *checkpoints, "--shards", str(shards), *protocol, *storage]) == 0
    rows = runs.runs(served.uri, "both", "evaluation")
    assert len(rows) == 2
    assert all(row["metrics"] for row in rows)
    assert cli.run(["compare", "--experiment", "both", "--out", str(tmp_path / "report.html")]) == 0
    assert "ann" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_add_a_user_and_back_up_restore_and_upgrade(served, trained, log_in, tmp_path):
    """The commands of docs/tracking_server.md in one shell; a second server on the restored database shows the same runs."""
    used = served.database
    variables = {
        **used.environment,
        "SERVER": served.uri,
        "BACKUP": str(tmp_path),
        "RESTORED": str(tmp_path / "restored"),
    }
    blocks = [block for heading in ("Users", "Back up", "Restore", "Upgrade") for block in page_blocks(PAGE, heading)]
    assert len(blocks) >= 5
    script = "set -euo pipefail\n" + "".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    served.passwords["carla"] = re.search(r"^carla: (\S+)$", done.stdout, re.MULTILINE)[1]
    log_in("carla")
    here = runs.runs(served.uri, "both", "pretraining")
    with server(used, PGDATABASE="mlflow_restored", TRACKING_ARTIFACTS=str(tmp_path / "restored")) as other:
        assert runs.runs(other.uri, "both", "pretraining") == here
        for row in here:
            for name in ("loss", "lr"):
                history = runs.metric_history(other.uri, row["run_id"], name)
                assert history == runs.metric_history(served.uri, row["run_id"], name)
                assert history
            copy = runs.download(other.uri, row["run_id"], "recipe/recipe.yaml", tmp_path / row["name"])
            assert copy.read_bytes() == (trained / row["name"] / "run/recipe.yaml").read_bytes()
        log_in("carla", WRONG)
        tracker = evaluation(other, "both", "refused", spool=tmp_path / "spool.jsonl")
        assert "it refuses the login" in tracker.fault
