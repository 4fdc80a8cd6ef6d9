"""The names inside MLflow and fsspec that this project uses: each exists, and a missing one raises LibraryChanged."""

from __future__ import annotations

from types import SimpleNamespace

import fsspec
import pytest
from mlflow.entities import RunData

from data_pipeline.storage import remote
from infra.internals import LibraryChanged
from infra.tracking import mlflow_store


def test_the_names_exist():
    assert RunData()._metric_objs == []
    assert fsspec.filesystem("memory")._strip_protocol("memory://folder/file") == "/folder/file"


def test_a_run_of_mlflow_without_metric_objects_raises(monkeypatch):
    info = SimpleNamespace(run_id="run", experiment_id="1")
    run = SimpleNamespace(info=info, data=SimpleNamespace(params={}))
    monkeypatch.setattr(mlflow_store, "_get_run", lambda client, run_id: run)
    monkeypatch.setattr(mlflow_store.StoredRun, "_batch", lambda *_, **__: None)
    client = SimpleNamespace(update_run=lambda *_, **__: None)
    with pytest.raises(LibraryChanged, match="mlflow .* has no attribute '_metric_objs'"):
        mlflow_store.StoredRun(client, "sqlite://", {"run_id": "run", "tags": {}}, None)


def test_a_file_system_without_strip_protocol_raises(monkeypatch):
    monkeypatch.setattr(remote, "filesystem", lambda url, access: SimpleNamespace())
    with pytest.raises(LibraryChanged, match="fsspec .* has no attribute '_strip_protocol'"):
        remote.list_tars("memory://folder", remote.Access())
