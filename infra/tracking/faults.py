"""What is wrong with a tracking store, in one line: what was found, where, and what to do. Each cause has its own line."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from infra.errors import UserError
from infra.files import other_kind

# Tables that MLflow has had in every version with a database: the number of its schema, and others.
REVISION_TABLE, CORE_TABLES = "alembic_version", {"experiments", "runs"}
REVISIONS = f"SELECT version_num FROM {REVISION_TABLE}"
TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
# Module that a database's address asks for -> what to install, and the address that uses it if it is another one.
DRIVERS = {
    "psycopg": ("psycopg[binary]", ""), "psycopg2": ("psycopg2-binary", ""), "MySQLdb": ("pymysql", "mysql+pymysql://"),
    "pymysql": ("pymysql", ""), "pyodbc": ("pyodbc", ""), "pymssql": ("pymssql", ""),
}  # fmt: skip

# Words of an error -> what they mean and what to do. The first that matches counts.
CAUSES: tuple[tuple[str, str], ...] = (
    (r"experiment .* must be in the 'active' state.*deleted|is marked deleted",
     "its experiment was deleted; restore it with `mlflow experiments restore --experiment-id {experiment}`, or choose another "
     "--experiment (run.experiment in a recipe)"),
    (r"run .* must be in the 'active' state.*deleted",
     "the run was deleted; restore it with `mlflow runs restore --run-id ID`, or start anew in another folder"),
    (r"out-of-date database schema|Can't locate revision",
     "its tables are those of another version of MLflow; copy the store, then bring it up to date with `mlflow db upgrade "
     "{uri}`; if a newer MLflow wrote it, install that version here"),
    (r"no such (table|column)|has no column named|UndefinedTable|UndefinedColumn",
     "its tables are incomplete or of another version of MLflow; restore the file from a copy, or choose another store"),
    (r"file is not a database", "this file is not a sqlite database; correct the path, or choose another store"),
    (r"disk image is malformed|disk I/O error",
     "the file is damaged; restore it from a copy, or try `sqlite3 FILE .recover`"),
    (r"database is locked|database table is locked",
     "another process holds it; wait until that process ends, or use a server (mlflow server) for many writers"),
    (r"locking protocol|No locks available|Operation not supported|Function not implemented",
     "its file system has no file locks, which sqlite needs; put the store on a local disk, or use a server (mlflow server)"),
    (r"Invalid Host header",
     "its server does not accept this host name; use an address that it accepts, or add the name to the server's "
     "MLFLOW_SERVER_ALLOWED_HOSTS"),
    # Before the faults of files: the server answers "Permission denied".
    (r"error code 401\b|401 (Client Error|Unauthorized)|Unauthorized|UNAUTHENTICATED",
     "it refuses the login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or correct "
     "~/.mlflow/credentials"),
    (r"error code 403\b|403 (Client Error|Forbidden)|PERMISSION_DENIED",
     "it does not let this user do that; ask its administrator for the permission EDIT of the experiment, or log in as "
     "another user (MLFLOW_TRACKING_USERNAME)"),
    (r"readonly database|read-only|Read-only file system",
     "it is read-only here; change its permissions, or choose a store that you can write to"),
    (r"unable to open database file|Permission denied|Is a directory|Not a directory",
     "it cannot be opened; check that folder and file exist and may be read and written by you"),
    (r"disk is full|No space left", "its disk is full; make room"),
    (r"error code 404\b|404 (Client Error|Not Found)|not in (a )?valid json|Expecting value|invalid literal|JSONDecodeError",
     "what answers there is not an MLflow server of this version; correct the address, or ask who runs it"),
    (r"error code 5\d\d\b|too many 5\d\d|50\d (Server|Internal|Bad)",
     "the server answers with an error of its own; look into the server's log"),
    (r"SSLError|CERTIFICATE_VERIFY|certificate verify",
     "its certificate cannot be checked; set MLFLOW_TRACKING_SERVER_CERT_PATH to your certificate authority's file"),
    (r"Name or service not known|getaddrinfo|NameResolution|nodename nor servname",
     "its host name is not known here; correct the address"),
    (r"password authentication failed|Access denied for user",
     "it refuses the login; correct the user and password of the address"),
    (r"Connection refused|Max retries|timed out|Connection aborted|Connection reset|Failed to establish|Network is unreachable|"
     r"could not connect|RemoteDisconnected|No route to host",
     "does not answer; start it, or choose another --tracking-uri (run.tracking_uri in a recipe)"),
)  # fmt: skip


def describe_fault(uri: str, error: BaseException, experiment: str = "ID") -> str:
    """Return one line about an error of the store ``uri``: the cause, what to do, and the error's own words."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # SQL statements are long and say nothing about the cause.
    words = re.split(r" \[SQL:| \(Background on this error", " ".join(str(error).split()))[0]
    words = re.sub(r"^\(raised as a result of Query-invoked autoflush[^)]*\) ", "", words)[:200]
    place = f"tracking store {hide_password(uri)}"
    if module := re.search(r"No module named '?([\w.]+)", text):
        return f"{place}: {_driver(module[1])} ({words})"
    for pattern, meaning in CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            meaning = meaning.format(uri=hide_password(uri), experiment=experiment)
            does = meaning if meaning.startswith("does not") else f": {meaning}"
            return f"{place}{' ' if meaning.startswith('does not') else ''}{does} ({words})"
    return f"{place} reports an error: {words or type(error).__name__}"


def hide_password(uri: str) -> str:
    """Return a URI without its password."""
    return re.sub(r"(://[^:/@]+):[^@/]+@", r"\1:***@", uri)


def _driver(module: str) -> str:
    """What to do about a missing driver of a database."""
    package, address = DRIVERS.get(module, (module, ""))
    write = f", and write {address} in the address" if address else ""
    return f"the driver of this database is not installed; pip install '{package}'{write}"


def is_of_mlflow(tables: set[str]) -> bool:
    """Return whether a database with these tables is a store of some version of MLflow, whole or not."""
    return REVISION_TABLE in tables and bool(tables & CORE_TABLES)


def no_store(uri: str, tables: set[str]) -> str:
    """Return the line about a database with these tables that is not a store."""
    listed = sorted(tables)
    more = ", ..." if len(listed) > 3 else ""
    found = f"holds other tables ({', '.join(listed[:3])}{more})" if listed else "is empty"
    return (
        f"tracking store {hide_password(uri)} is not an MLflow store: it {found}, and is left as it is; set --tracking-uri "
        "(run.tracking_uri in a recipe) to the store that the runs were logged to, or to a new file"
    )


def sqlite_address(file: Path) -> str:
    """Return the address that opens a sqlite file for reading only."""
    return f"{file.absolute().as_uri()}?mode=ro"


def check_sqlite(uri: str, file: Path) -> None:
    """Raise UserError if an existing sqlite file cannot be opened and read, or has tables of something else than MLflow.

    MLflow would try to open it for 100 s, and add its tables to those of others. A file that does not exist is left to MLflow,
    but its folder must be writable.
    """
    try:
        if not file.exists():
            folder = next(path for path in file.absolute().parents if path.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"Permission denied: {folder} is not a folder that you can write to")
            return
        check_is_file(uri, file)
        if not os.access(file, os.R_OK):
            raise PermissionError(f"Permission denied: {file}")
        refuse_foreign(uri, file)
    except (sqlite3.Error, OSError) as error:
        raise UserError(describe_fault(uri, error)) from error


def check_is_file(uri: str, file: Path) -> None:
    """Raise UserError if a folder, a pipe or a device is in place of a sqlite file."""
    if kind := other_kind(file):
        raise UserError(
            f"tracking store {uri}: {file} is {kind}, not a file; correct the address, or choose another store"
        )


def refuse_foreign(uri: str, file: Path) -> None:
    """Raise UserError if a sqlite file has tables of something else than MLflow; sqlite3.Error if it cannot be read."""
    with closing(sqlite3.connect(sqlite_address(file), uri=True, timeout=5)) as connection:
        tables = {str(name) for (name,) in connection.execute(TABLES)}
    if tables and not is_of_mlflow(tables):
        raise UserError(no_store(uri, tables))
