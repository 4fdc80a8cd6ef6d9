"""Whether a database is an MLflow store, and of which version, asked before MLflow opens it.

MLflow makes its tables in any database that lacks one of them, and brings older tables up to date, without asking.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import atomic_write, read_bytes
from infra.internals import internal, replaced_internal
from infra.lean_imports import quiet_imports
from infra.processes.scratch import scratch_folder
from infra.tracking.faults import (
    REVISION_TABLE,
    REVISIONS,
    TABLES,
    hide_password,
    is_of_mlflow,
    no_store,
    sqlite_address,
)


def check_schema(uri: str, file: Path | None, create: bool) -> None:
    """Check the tables of a store's database; nothing is written.

    Args:
        uri: the store, no server of MLflow.
        file: its sqlite file; None for another database.
        create: whether MLflow may make its tables in a database that has none.

    Raises:
        UserError: if the database is not an MLflow store, or one of another version.
        sqlalchemy.exc.SQLAlchemyError: if it cannot be read.
    """
    tables, revision = _tables(uri, file)
    if not tables and create:
        return
    place = f"tracking store {hide_password(uri)}"
    if not is_of_mlflow(tables):
        raise UserError(no_store(uri, tables))
    newest, needed, known = _expected()
    missing = sorted(needed - tables)
    if revision == newest and not missing:
        return
    incomplete = f"{place}: its tables are incomplete or of another version of MLflow"
    other = f"{place}: its tables were written by another version of MLflow"
    if revision == newest or revision is None:
        shown = ", ".join(missing[:3]) or REVISION_TABLE
        raise UserError(f"{incomplete} ({shown}); restore the file from a copy, or choose another store")
    copy = f"copy the store, then bring it up to date with `mlflow db upgrade {hide_password(uri)}`"
    if revision in known:
        raise UserError(
            f"{other}, with an older schema ({revision}, here {newest}), which is not changed without your order; {copy}"
        )
    raise UserError(
        f"{other}, with a schema that is not known here ({revision}, here {newest}); if a newer MLflow wrote it, install that "
        f"version here; else {copy}"
    )


def create_sqlite(file: Path) -> None:
    """Make an empty store in a new sqlite file, whole or not at all: a kill leaves no store with some of the tables."""
    from mlflow.store.db import utils

    sqlalchemy = internal("mlflow", utils, "sqlalchemy")
    with scratch_folder("store") as folder:
        new = folder / "mlflow.db"
        engine = sqlalchemy.create_engine(f"sqlite:///{new}")
        try:
            internal("mlflow", utils, "_initialize_tables")(engine)
        finally:
            engine.dispose()
        with atomic_write(file) as stream:
            stream.write(read_bytes(new))


def reading_client(uri: str) -> Any:
    """Return an MLflow client that writes nothing when it opens a store; MLflow makes a default experiment where none is."""
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replaced_internal("mlflow", SqlAlchemyStore, "_create_default_experiment", lambda *_: None):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _tables(uri: str, file: Path | None) -> tuple[set[str], str | None]:
    """Return the names of a database's tables and the revision of MLflow's; several revisions are joined by a comma."""
    if file is not None:
        with closing(sqlite3.connect(sqlite_address(file), uri=True, timeout=5)) as connection:
            names = {str(name) for (name,) in connection.execute(TABLES)}
            rows = connection.execute(REVISIONS).fetchall() if REVISION_TABLE in names else []
    else:
        from mlflow.store.db import utils

        sqlalchemy = internal("mlflow", utils, "sqlalchemy")
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool).connect() as connected:
            names = set(sqlalchemy.inspect(connected).get_table_names())
            rows = (
                [tuple(row) for row in connected.execute(sqlalchemy.text(REVISIONS))] if REVISION_TABLE in names else []
            )
    return names, ", ".join(sorted(str(row[0]) for row in rows)) or None


@cache
def _expected() -> tuple[str, set[str], set[str]]:
    """The installed MLflow's newest revision, the tables it needs, and all revisions that it knows."""
    with quiet_imports():
        from mlflow.store.db import utils

    config = internal("mlflow", utils, "_get_alembic_config")("")
    scripts = internal("mlflow", utils, "ScriptDirectory").from_config(config)
    revisions = {str(script.revision) for script in scripts.walk_revisions()}
    newest = str(internal("mlflow", utils, "_get_latest_schema_revision")())
    return newest, set(internal("mlflow", utils, "Base").metadata.tables), revisions
