"""What is wrong with a tracking store is said in one line, and each cause has its own."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest

from infra import cli
from infra.distributed import free_port
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.faults import describe_fault, hide_password
from infra.tracking.mlflow_store import client_of
from infra.tracking.tracker import Tracker
from tests.stores import store_at


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A store with one evaluation in experiment ``kept``."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracker = Tracker.open(f"sqlite:///{file}", "kept", "n", tags={"yaware.kind": "evaluation"})
    tracker.end()
    return file


def sql(command):
    def change(file):
        with closing(sqlite3.connect(file)) as connection:
            connection.executescript(command)

    return change


def delete_experiment(file):
    client = client_of(f"sqlite:///{file}")
    client.delete_experiment(client.get_experiment_by_name("kept").experiment_id)


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


FAULTS = {
    "newer": (
        sql("UPDATE alembic_version SET version_num='ffffffffffff'"),
        "another version of MLflow, with a schema that is not known here .*`mlflow db upgrade",
    ),
    "older": (
        sql("UPDATE alembic_version SET version_num='451aebb31d03'"),
        "another version of MLflow, with an older schema .* is not changed without your order; .*`mlflow db upgrade",
    ),
    "no table": (sql("DROP TABLE runs"), "its tables are incomplete or of another version of MLflow"),
    "no database": (lambda file: file.write_bytes(b"x" * 5000), "this file is not a sqlite database; correct the path"),
    "cut": (lambda file: os.truncate(file, 60000), "the file is damaged; restore it from a copy"),
    "deleted": (
        delete_experiment,
        r"experiment 'kept' of .* was deleted; restore it with `mlflow experiments restore --exp",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_cannot_be_used_says_why(good, tmp_path, capfd, fault):
    harm, words = FAULTS[fault]
    file = tmp_path / "mlflow.db"
    shutil.copy(good, file)
    harm(file)
    with pytest.raises(UserError, match=words) as caught:
        runs.runs(f"sqlite:///{file}", "kept", "evaluation")
    assert str(file) in str(caught.value)
    assert "does not answer" not in str(caught.value)
    tracker = Tracker.open(f"sqlite:///{file}", "kept", "n2")  # training goes on
    assert tracker.run_id is None
    capfd.readouterr()
    command = ["compare", "--experiment", "kept", "--tracking-uri", f"sqlite:///{file}"]
    assert cli.run([*command, "--out", str(tmp_path / "report.html")]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("yaware: error: ")
    assert printed.count("\n") == 1, printed
    assert re.search(words, tracker.fault)
    assert re.search(words, printed)


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_in_place_of_the_file_is_found_at_once(tmp_path, create):
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file; correct the address"):
        client_of(f"sqlite:///{tmp_path}/mlflow.db", create=create)


def test_a_file_that_another_process_holds(good, tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"
    shutil.copy(good, file)
    connect = sqlite3.connect
    monkeypatch.setattr("infra.tracking.faults.sqlite3.connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    with closing(connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="another process holds it; wait until that process ends"):
            client_of(f"sqlite:///{file}", create=False)


@contextmanager
def web_server(status, body=b"<html>hello</html>"):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses the login; set MLFLOW_TRACKING_USERNAME"),
        (403, "it does not let this user do that; ask its administrator for the permission EDIT"),
        (404, "what answers there is not an MLflow server of this version"),
        (200, "what answers there is not an MLflow server of this version"),
        (500, "the server answers with an error of its own; look into the server's log"),
    ],
)
def test_what_a_web_server_answers(status, words):
    with web_server(status) as uri, pytest.raises(UserError, match=words):
        runs.runs(uri, "kept", "evaluation")


def test_a_server_that_is_not_there():
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        UserError, match=f"tracking store {uri} does not answer; start it, or choose another --tracking-uri"
    ):
        runs.runs(uri, "kept", "evaluation")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(37, "No locks available"), "has no file locks, which sqlite needs"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "it is read-only here"),
        (OSError("failed with error code 401 != 200. Response body: 'Permission denied'"), "it refuses the login"),
        (OSError("failed with error code 403 != 200. Response body: 'Permission denied'"), "does not let this user do"),
        (OSError("error code 403 != 200. Response body: 'Invalid Host header - p'"), "does not accept this host name"),
        (PermissionError(13, "Permission denied"), "it cannot be opened"),
        (sqlite3.OperationalError("database or disk is full"), "its disk is full; make room"),
        (ModuleNotFoundError("No module named 'psycopg2'"), "pip install 'psycopg2-binary'"),
        (
            ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
            "its certificate cannot be checked",
        ),
        (ValueError("something new"), "reports an error: something new"),
    ],
)
def test_other_causes(error, words):
    line = describe_fault("postgresql://ann:secret@db/mlflow", error)
    assert words in line
    assert line.startswith("tracking store postgresql://ann:***@db/mlflow")


def test_passwords_are_hidden():
    assert hide_password("mysql+pymysql://a:b@h:1/x") == "mysql+pymysql://a:***@h:1/x"
    assert hide_password("http://host:5000") == "http://host:5000"


def evaluation(uri, status, **tags):
    tracker = Tracker.open(uri, "kept", "e", tags={"yaware.kind": "evaluation", "yaware.step": "3", **tags})
    if status:
        tracker.end(status)
    return tracker


def compare(uri, tmp_path, capfd, *more):
    capfd.readouterr()
    command = ["compare", "--experiment", "kept", "--tracking-uri", uri, "--out", str(tmp_path / "report.html"), *more]
    assert cli.run(command) == 2
    return capfd.readouterr().err


def test_compare_says_why_there_is_nothing_to_compare(tmp_path, capfd):
    uri, tags = store_at(tmp_path / "mlflow.db"), {"yaware.run_name": "y-aware"}
    Tracker.open(uri, "kept", "p", tags={"yaware.kind": "pretraining"}).end()
    assert "has no evaluation, but pretrainings (1); run `yaware evaluate` first" in compare(uri, tmp_path, capfd)
    evaluation(uri, "FAILED", **tags)
    evaluation(uri, "", **tags)
    assert "no finished evaluation, but unfinished ones (1 failed, 1 running): wait" in compare(uri, tmp_path, capfd)
    finished = evaluation(uri, "FINISHED", **tags)
    filtered = compare(uri, tmp_path, capfd, "--filter", "tags.mark = 'a'")
    assert "no finished evaluation that matches --filter \"tags.mark = 'a'\", but 1 others; change it" in filtered
    lost = compare(uri, tmp_path, capfd)  # it has no tables
    assert f"the tables of its evaluation {finished.run_id[:8]} cannot be read" in lost
    assert "of artifacts was moved or changed since" in lost
    strange = evaluation(uri, "FINISHED")
    assert f"evaluation {strange.run_id[:8]} of experiment 'kept' has no tag yaware.run_name" in compare(
        uri, tmp_path, capfd
    )
