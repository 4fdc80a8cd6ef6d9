"""Readers write into no database, and writers into none but a store of this MLflow."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from infra import cli
from infra.errors import UserError
from infra.tracking import registry, runs
from infra.tracking.database import check_schema
from infra.tracking.faults import describe_fault
from infra.tracking.mlflow_store import client_of
from infra.tracking.tracker import Tracker, store_uri
from tests.stores import store_at


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    Tracker.open(f"sqlite:///{file}", "kept", "n", tags={"yaware.kind": "evaluation"}).end()
    return file


def sql(file, command):
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(command)
        connection.commit()


def older(file):
    """Make tables such as an older MLflow left: its revision, and without the tables that came later."""
    sql(file, "UPDATE alembic_version SET version_num='451aebb31d03'; DROP TABLE logged_models; DROP TABLE datasets")


NONE = "is not an MLflow store: it holds other tables"
DATABASES = {
    "bookmarks": (lambda file: sql(file, "CREATE TABLE bookmarks(url)"), f"{NONE} \\(bookmarks\\)"),
    "experiments": (lambda file: sql(file, "CREATE TABLE experiments(a)"), f"{NONE} \\(experiments\\)"),
    "experiments and runs": (lambda file: sql(file, "CREATE TABLE experiments(a); CREATE TABLE runs(b)"), NONE),
    "another program of alembic": (
        lambda file: sql(file, "CREATE TABLE users(a); CREATE TABLE alembic_version(version_num); "
                               "INSERT INTO alembic_version VALUES ('abcdef')"), NONE),
    "no revision": (
        lambda file: sql(file, "CREATE TABLE experiments(a); CREATE TABLE runs(b); CREATE TABLE alembic_version(version_num)"),
        "incomplete or of another version of MLflow"),
    "strange columns": (
        lambda file: sql(file, "CREATE TABLE experiments(a); CREATE TABLE runs(b); CREATE TABLE alembic_version(c); "
                               "INSERT INTO alembic_version VALUES (1)"), "incomplete or of another version of MLflow"),
    "two revisions": (lambda file: sql(file, "INSERT INTO alembic_version VALUES ('abcdef')"), "another version of MLflow"),
    "older": (older, "another version of MLflow, with an older schema .* not changed without your order; .*`mlflow db upgrade"),
    "newer": (
        lambda file: sql(file, "UPDATE alembic_version SET version_num='ffff'"),
        "another version of MLflow, with a schema that is not known here",
    ),
    "a table of the newest missing": (lambda file: sql(file, "DROP TABLE logged_models"), r"incomplete .*\(logged_models\)"),
}  # fmt: skip
OF_MLFLOW = ("two revisions", "older", "newer", "a table of the newest missing")


def made(kind, good, tmp_path):
    file = tmp_path / "mlflow.db"
    if kind in OF_MLFLOW:
        shutil.copy(good, file)
    DATABASES[kind][0](file)
    return file


def state(file):
    return file.read_bytes(), file.stat().st_mtime_ns, sorted(path.name for path in file.parent.iterdir())


READERS = {
    "runs": lambda uri: runs.runs(uri, "kept", "evaluation"),
    "history": lambda uri: runs.metric_history(uri, "0" * 32, "loss"),
    "checkpoint": lambda uri: registry.find_checkpoint(uri, "name@alias", experiment="kept"),
}


@pytest.mark.parametrize("kind", DATABASES)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_leaves_what_is_no_store_as_it_is(good, tmp_path, kind, reader):
    file = made(kind, good, tmp_path)
    before = state(file)
    with pytest.raises(UserError, match=DATABASES[kind][1]) as caught:
        READERS[reader](f"sqlite:///{file}")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state(file) == before


@pytest.mark.parametrize("kind", DATABASES)
def test_a_writer_leaves_it_as_it_is_too(good, tmp_path, kind, capfd):
    file = made(kind, good, tmp_path)
    before = state(file)[:2]
    with pytest.raises(UserError, match=DATABASES[kind][1]):
        client_of(f"sqlite:///{file}")
    assert Tracker.open(f"sqlite:///{file}", "kept", "n").run_id is None
    assert state(file)[:2] == before


@pytest.mark.parametrize("kind", ["bookmarks", "experiments", "older"])
def test_compare_says_so_in_one_line(good, tmp_path, capfd, kind):
    file = made(kind, good, tmp_path)
    before = state(file)
    command = [
        "compare",
        "--experiment",
        "kept",
        "--tracking-uri",
        f"sqlite:///{file}",
        "--out",
        str(tmp_path / "r.html"),
    ]
    assert cli.run(command) == 2
    printed = capfd.readouterr().err
    assert printed.startswith(f"yaware: error: tracking store sqlite:///{file}")
    assert printed.count("\n") == 1
    assert state(file) == before


def test_a_reader_fills_no_empty_file_and_a_writer_does(tmp_path):
    file = tmp_path / "mlflow.db"
    file.touch()
    before = state(file)
    with pytest.raises(UserError, match="is not an MLflow store: it is empty"):
        client_of(f"sqlite:///{file}", create=False)
    assert state(file) == before
    assert Tracker.open(f"sqlite:///{file}", "kept", "n").run_id is not None


def test_a_reader_leaves_a_store_as_it_is(good, tmp_path):
    file = tmp_path / "mlflow.db"
    shutil.copy(good, file)
    before = state(file)
    assert len(runs.runs(f"sqlite:///{file}", "kept", "evaluation")) == 1
    assert state(file) == before


def test_a_reader_makes_no_default_experiment(tmp_path):
    uri = store_at(tmp_path / "mlflow.db")
    before = state(tmp_path / "mlflow.db")
    with pytest.raises(UserError, match="experiment 'kept' is not in"):
        runs.runs(uri, "kept", "evaluation")
    assert state(tmp_path / "mlflow.db") == before


def test_a_new_store_is_made_whole(tmp_path, monkeypatch):
    """A kill while MLflow makes its tables must not leave a store with some of them."""
    from mlflow.store.db import utils

    def dies(engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE experiments(a)")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_initialize_tables", dies)
    with pytest.raises(KeyboardInterrupt):
        client_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.undo()
    assert Tracker.open(f"sqlite:///{tmp_path}/mlflow.db", "kept", "n").run_id is not None


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.timeout(60)
def test_a_pipe_or_folder_in_place_of_the_file(tmp_path, kind):
    file = tmp_path / "mlflow.db"
    os.mkfifo(file) if kind == "pipe" else file.mkdir()
    for call in (lambda uri: client_of(uri, create=False), client_of, store_uri):
        with pytest.raises(UserError, match=f"mlflow.db is a (named )?{kind}, not a file"):
            call(f"sqlite:///{file}")


def test_other_databases_are_asked_in_the_same_way(good, tmp_path):
    """A server's tables are listed by SQLAlchemy; here it lists those of sqlite files."""
    sql(tmp_path / "a.db", "CREATE TABLE bookmarks(url)")
    with pytest.raises(UserError, match=NONE):
        check_schema(f"sqlite:///{tmp_path}/a.db", None, create=True)
    older(shutil.copy(good, tmp_path / "b.db"))
    with pytest.raises(UserError, match="an older schema"):
        check_schema(f"sqlite:///{tmp_path}/b.db", None, create=True)
    check_schema(f"sqlite:///{good}", None, create=False)
    check_schema(f"sqlite:///{tmp_path}/new.db", None, create=True)
    with pytest.raises(UserError, match="it is empty"):
        check_schema(f"sqlite:///{tmp_path}/new.db", None, create=False)


def test_a_run_starts_with_no_database_of_something_else(tmp_path):
    sql(tmp_path / "a.db", "CREATE TABLE bookmarks(url)")
    with pytest.raises(UserError, match=NONE):
        store_uri(f"sqlite:///{tmp_path}/a.db")
    (tmp_path / "b.db").write_bytes(b"x" * 5000)  # a damaged store stops no run
    for name in ("b.db", "new.db"):
        assert store_uri(f"sqlite:///{tmp_path}/{name}") == f"sqlite:///{tmp_path}/{name}"


@pytest.mark.parametrize(
    "uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:a.db", "sqlite://a.db", "sqlite+x:///a.db",
            "sqlite:///file:a?mode=memory&uri=true"],
)  # fmt: skip
def test_a_sqlite_address_names_a_file(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (client_of, store_uri, lambda uri: Tracker.open(uri, "kept", "n")):
        with pytest.raises(UserError, match="names no file; write sqlite:///relative"):
            call(uri)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "module", "words"),
    [
        ("postgresql://h/x", "psycopg", r"pip install 'psycopg\[binary\]' \("),
        ("postgresql+psycopg2://h/x", "psycopg2", r"pip install 'psycopg2-binary' \("),
        ("mysql://h/x", "MySQLdb", r"pip install 'pymysql', and write mysql\+pymysql:// in the address \("),
        ("mysql+pymysql://h/x", "pymysql", r"pip install 'pymysql' \("),
        ("mssql+pyodbc://h/x", "pyodbc", r"pip install 'pyodbc' \("),
    ],
)
def test_the_driver_is_the_one_that_was_asked_for(address, module, words):
    error = ModuleNotFoundError(f"No module named '{module}'")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(describe_fault(address, error))


@pytest.mark.parametrize(
    "wrong", ["foo", "tags.x", "metrics.a > 'b'", "attributes.zzz = 1", "tags.a = 'b' or tags.c = 'd'", "'"]
)
def test_a_wrong_filter_is_named(good, wrong, tmp_path, capfd):
    command = [
        "compare",
        "--experiment",
        "kept",
        "--tracking-uri",
        f"sqlite:///{good}",
        "--out",
        str(tmp_path / "r.html"),
    ]
    assert cli.run([*command, "--filter", wrong]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith(f"yaware: error: --filter {wrong!r} is not a filter of MLflow (")
    assert printed.count("\n") == 1
