"""MLflow stores for tests: copies of one empty store, since MLflow takes a second to create one."""

from __future__ import annotations

import sqlite3
import tempfile
from functools import cache
from pathlib import Path


@cache
def empty_store() -> bytes:
    """Return the content of a store that MLflow has made and that holds nothing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="yaware-store-") as folder:
        path = Path(folder) / "mlflow.db"
        store = SqlAlchemyStore(f"sqlite:///{path}", folder)
        store.engine.dispose()
        with sqlite3.connect(path) as connection:
            # MLflow makes a default experiment where a store has none; this one's would lie in the temporary folder.
            connection.execute("delete from experiments")
        connection.close()
        return path.read_bytes()


def store_at(path: Path | str) -> str:
    """Return the URI of a sqlite store, which is created if there is no file."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(empty_store())
    return f"sqlite:///{path}"
