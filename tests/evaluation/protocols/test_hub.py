"""``evaluate`` takes an encoder at the hub by its address, as it takes an export, with the guards against leakage."""

from __future__ import annotations

from pathlib import Path

import pytest

import evaluation
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.candidates import checkpoint_paths
from infra.errors import UserError
from pretrain import export
from tests.cohorts import write_cohort
from tests.pretrain.hub.hub_server import cache_snapshot
from tests.pretrain.hub.test_download import use
from tests.pretrain.weights.encoders import write_encoders_of
from tests.stores import store_at

SMALL = {"folds": 2, "draws": 2, "n_train": (8,), "repeats": 1, "halvings": 0, "layer": "own", "search": "here"}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Shards, an export, and its folder in the cache of the hub, offline."""
    shares = {"pretrain": 0.2, "downstream": 0.8}
    build_shards(write_cohort(tmp_path / "tiny", participants=30), tmp_path / "shards", splits=shares)
    write_encoders_of(Manifest.load(tmp_path / "shards"), tmp_path / "encoder", run_name="first", step=7)
    out = export(tmp_path / "encoder", tmp_path / "out", hub_layout=True)
    snapshot = cache_snapshot(tmp_path / "cache", "lab/brains", out)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    return tmp_path / "shards", out, snapshot


@pytest.mark.jobs
def test_an_address_is_evaluated_as_the_export(published, tmp_path):
    shards, out, _ = published
    store = {"tracking_uri": store_at(tmp_path / "mlflow.db"), "cache": tmp_path / "features"}
    first, second = (
        evaluation.evaluate([path], shards, tasks=["age"], protocols=["linear"], **SMALL, **store)
        for path in ("hf://lab/brains", out)
    )
    assert len(first)
    assert first["value"].tolist() == second["value"].tolist()


def test_a_published_encoder_is_not_tested_on_its_training_people(published, tmp_path):
    task = tmp_path / "all.yaml"
    task.write_text("title: all\nkind: regression\nlabel: age\nsplits: [pretrain, downstream]\nhealthy: true\n")
    with pytest.raises(UserError, match="hf://lab/brains: pretrained on participants of the test scans"):
        evaluation.evaluate(
            ["hf://lab/brains"],
            published[0],
            tasks=[str(task)],
            protocols=["linear"],
            cache=tmp_path / "features",
            **SMALL,
        )


def test_addresses_stay_addresses(published):
    _, out, _ = published
    assert checkpoint_paths(["hf://lab/brains", out]) == [Path("hf://lab/brains"), out]
    assert checkpoint_paths("hf://lab/brains@main") == [Path("hf://lab/brains@main")]
    with pytest.raises(UserError, match="hf://lab/none cannot be loaded"):
        checkpoint_paths("hf://lab/none")
    with pytest.raises(UserError, match="hf://lab/brains is one encoder without earlier steps"):
        checkpoint_paths("hf://lab/brains", all_steps=True)


def test_a_damaged_file_of_the_cache_is_to_be_loaded_again(published, tmp_path):
    shards, _, snapshot = published
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json is missing or differs .*; remove \S+ and load it again"):
        evaluation.evaluate(
            ["hf://lab/brains"], shards, tasks=["age"], protocols=["linear"], cache=tmp_path / "features", **SMALL
        )
