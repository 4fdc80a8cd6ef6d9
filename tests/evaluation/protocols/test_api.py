"""``evaluation.evaluate`` as a user calls it, and protocols that are added to the table at run time."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import evaluation
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.protocols.candidates import checkpoint_paths
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.evaluate import COLUMNS, compute_result
from evaluation.protocols.probes import Predictions, Probe
from evaluation.protocols.protocols import PROTOCOLS, Protocol, frozen_features, grid_of
from evaluation.protocols.settings import EvaluationSettings, load_fine_tuning
from infra import cli, ray_cluster
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of
from pretrain.weights.encoder import Encoder
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of
from tests.stores import store_at

OPTIONS = {"width": 0.125, "norm": "group"}
SMALL = {"folds": 2, "draws": 2, "n_train": (8,), "workers": 2, "repeats": 1, "halvings": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    build_shards(
        write_cohort(root / "tiny", participants=40),
        root / "shards",
        splits={"pretrain": 0.2, "downstream": 0.8},
    )
    return root / "shards"


@pytest.fixture(scope="module")
def exports(shards, tmp_path_factory):
    """Two exported encoders, by name."""
    root, manifest = tmp_path_factory.mktemp("exports"), Manifest.load(shards)
    for seed, name in enumerate(("first", "second")):
        write_encoders_of(manifest, root / name, seed=seed, run_name=name, step=7)
    return {name: root / name for name in ("first", "second")}


def ray_is_running():
    return ray_cluster.import_ray().is_initialized()


def test_the_table_holds_the_logged_metrics_and_two_calls_in_one_process_agree(shards, exports, tmp_path):
    uri, threads = store_at(tmp_path / "mlflow.db"), set(threading.enumerate())
    given = {
        "tasks": ["ad", "age"],
        "protocols": ["linear", "voxels"],
        "tracking_uri": uri,
        "storage": tmp_path / "work",
    }
    as_object = SimpleNamespace(folder=exports["second"])
    variables = dict(os.environ)
    table = evaluation.evaluate([exports["first"], as_object], shards, experiment="one", **SMALL, **given)
    assert dict(os.environ) == variables
    assert not ray_is_running()
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads
    assert list(table.columns) == COLUMNS
    expected = [("ad", metric) for metric in ("auc", "bacc", "ap", "brier")]
    expected += [("age", metric) for metric in ("mae", "r2", "pearson")]
    for key, rows in table.groupby(["checkpoint", "step", "protocol"]):
        assert key in {("first", 7, "linear"), ("second", 7, "linear"), ("voxels", 0, "voxels")}
        assert list(zip(rows["task"], rows["metric"], strict=True)) == expected
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert set(table["covers"]) == {"people"}  # without halves
    logged = {run["run_id"]: run["metrics"] for run in runs.runs(uri, "one", "evaluation")}
    assert not any(".fixed" in name for metrics in logged.values() for name in metrics)
    for row in table.itertuples():
        key = f"{row.task}.{row.metric}"
        assert (row.value, row.low, row.high) == tuple(
            logged[row.run_id][name] for name in (key, f"{key}.low", f"{key}.high")
        )
    again = evaluation.evaluate(
        [exports["first"], as_object], Manifest.load(shards), experiment="two", **SMALL, **given
    )
    assert not ray_is_running()
    pd.testing.assert_frame_equal(again.drop(columns="run_id"), table.drop(columns="run_id"))
    assert not set(again["run_id"]) & set(table["run_id"])


def test_what_an_interrupted_call_has_logged_is_logged_again_if_it_was_deleted(shards, exports, tmp_path, monkeypatch):
    monkeypatch.setattr(EvaluationContext, "remove_work_folders", lambda self: None)  # as if killed before
    uri, computed = store_at(tmp_path / "mlflow.db"), []

    def evaluate_and_count(*arguments):
        computed.append(arguments)
        return compute_result(*arguments)

    monkeypatch.setattr("evaluation.protocols.evaluate.compute_result", evaluate_and_count)

    def call():
        table = evaluation.evaluate(
            [exports["first"]], shards, tasks=["age"], protocols=["linear"], tracking_uri=uri, experiment="one",
            storage=tmp_path / "work", **SMALL,
        )  # fmt: skip
        (stored,) = runs.runs(uri, "one", "evaluation")
        assert set(table["run_id"]) == {stored["run_id"]}
        assert stored["status"] == "FINISHED"
        assert stored["metrics"]["age.mae"] == table.set_index("metric")["value"]["mae"]
        return table

    first = call()
    pd.testing.assert_frame_equal(call(), first)
    client_of(uri).delete_run(first["run_id"][0])
    again = call()
    pd.testing.assert_frame_equal(again.drop(columns="run_id"), first.drop(columns="run_id"))
    assert again["run_id"][0] != first["run_id"][0]
    assert len(computed) == 1, "the result was kept"


def test_unfinished_work_for_stores_of_one_relative_name_in_two_folders_is_kept_apart(shards, tmp_path, monkeypatch):
    """Two copies of a project evaluate the same checkpoint into ``sqlite:///mlflow.db``."""
    found = set()
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        context = EvaluationContext(
            manifest=Manifest.load(shards), tasks=[], rows=np.arange(2), settings=EvaluationSettings(tasks=["age"]),
            cache=tmp_path, storage=tmp_path / "work", uri="sqlite:///mlflow.db", experiment="one",
        )  # fmt: skip
        found.add(context.work_folder("linear", Candidate("first", "y-aware"), {}))
    assert len(found) == 2


@pytest.mark.parametrize("with_ray", [False, pytest.param(True, marks=pytest.mark.jobs)])
def test_ray_is_stopped_and_the_run_marked_failed_after_an_error(shards, exports, tmp_path, monkeypatch, with_ray):
    uri, started = store_at(tmp_path / "mlflow.db"), []

    def broken(context, candidate):
        if with_ray:
            ray_cluster.connect()
        started.append(ray_is_running())
        raise RuntimeError("no inputs")

    protocol = Protocol("fails", "checkpoint", "linear", broken, PROTOCOLS["linear"].search)
    monkeypatch.setitem(PROTOCOLS, "broken", protocol)
    with pytest.raises(RuntimeError, match="no inputs"):
        evaluation.evaluate(
            exports["first"],
            shards,
            tasks="ad",
            protocols="broken",
            tracking_uri=uri,
            storage=tmp_path / "work",
            **SMALL,
        )
    assert started == [with_ray]
    assert not ray_is_running()
    (run,) = runs.runs(uri, "yaware", "evaluation")
    assert run["status"] == "FAILED"


def nearest_centroid(split, kind, params, seed):
    """A model that is not part of the project: the difference of the distances to the two class means."""
    overall = split.train.mean(0)
    distances = []
    for label in (0, 1):
        mean = split.train[split.labels == label].mean(0)
        centroid = (1 - params["shrinkage"]) * mean + params["shrinkage"] * overall
        distances.append(np.linalg.norm(split.test - centroid, axis=1))
    score = distances[0] - distances[1]
    return Predictions(score, 1 / (1 + np.exp(-score)))


def mean_intensity(context, candidate):
    """Inputs that are not part of the project: one number for each scan."""
    return np.array([[float(context.manifest.read_volume(int(row)).mean())] for row in context.rows])


CENTROID = Probe(nearest_centroid, [{"shrinkage": 0.0}, {"shrinkage": 0.5}])


def test_a_protocol_with_a_new_model_costs_one_entry_of_the_table(shards, exports, tmp_path, monkeypatch, capsys):
    """It is evaluated, logged with its tags, trials and settings, and compared like the others."""
    uri = store_at(tmp_path / "mlflow.db")
    centroid = Protocol(
        "nearest centroid", "checkpoint", "centroid", frozen_features, grid_of(CENTROID), uses_layer=True
    )
    intensity = Protocol("mean intensity", "shards", "centroid", mean_intensity, grid_of(CENTROID))
    monkeypatch.setitem(PROTOCOLS, "centroid", centroid)
    monkeypatch.setitem(PROTOCOLS, "intensity", intensity)
    table = evaluation.evaluate(
        list(exports.values()), shards, tasks="ad", protocols=["centroid", "intensity"], layer="layer2", experiment="toy",
        tracking_uri=uri, storage=tmp_path / "work", **SMALL,
    )  # fmt: skip
    assert list(table.groupby(["checkpoint", "protocol"]).groups) == [
        ("first", "centroid"), ("intensity", "intensity"), ("second", "centroid"),
    ]  # fmt: skip
    logged = {run["tags"]["yaware.run_name"]: run for run in runs.runs(uri, "toy", "evaluation")}
    assert logged["first"]["tags"]["yaware.layer"] == "layer2"
    assert logged["first"]["params"]["inner_repeats"] == "1"
    assert logged["intensity"]["tags"]["yaware.layer"] == ""
    path = runs.download(uri, logged["first"]["run_id"], "evaluation", tmp_path)
    assert set(pd.read_csv(path / "trials.csv")["point"]) == {'{"shrinkage": 0.0}', '{"shrinkage": 0.5}'}
    out = tmp_path / "report.html"
    assert cli.run(["compare", "--experiment", "toy", "--tracking-uri", uri, "--out", str(out)]) == 0
    metrics = pd.read_csv(tmp_path / "report_metrics.csv")
    names = {"first, centroid, layer2 mean", "second, centroid, layer2 mean", "intensity"}
    assert set(metrics["checkpoint"]) == names
    differences = pd.read_csv(tmp_path / "report_differences.csv")
    assert {frozenset(pair) for pair in zip(differences["first"], differences["second"], strict=True)} == {
        frozenset(pair) for pair in (names - {name} for name in names)
    }  # the baseline is compared with both


def test_checkpoints_are_paths_or_objects_with_a_folder(tmp_path, exports):
    run = SimpleNamespace(folder=tmp_path / "run")
    assert checkpoint_paths("a") == checkpoint_paths(["a"]) == [checkpoint_paths("a")[0]]
    assert checkpoint_paths(run) == [tmp_path / "run"]
    assert checkpoint_paths([tmp_path, run]) == [tmp_path, tmp_path / "run"]
    encoder = Encoder.from_pretrained(exports["first"])
    assert checkpoint_paths(encoder) == [encoder.folder] == [exports["first"]]
    in_memory = Encoder(encoder.network, encoder.config, encoder.preprocessing)
    for wrong, name in ((3, "int"), ([3], "int"), (torch.nn.Identity(), "Identity"), (in_memory, "Encoder")):
        with pytest.raises(UserError, match=f"^checkpoints: {name} is neither a path nor an object with a folder"):
            checkpoint_paths(wrong)


def test_settings_of_fine_tuning_may_be_numbers_or_text():
    typed = load_fine_tuning(
        {"epochs": 3, "lr": 1e-3, "curve": True, "precision": "fp32", "gpus_per_trial": None}, seed=5
    )
    text = load_fine_tuning({"epochs": "3", "lr": "0.001", "curve": "true", "precision": "fp32"}, seed=5)
    assert typed == text
    assert (typed.seed, typed.epochs, typed.curve) == (5, 3, True)
    with pytest.raises(UserError, match=r"unknown key 'finetune.epoch' \(did you mean 'epochs'\?\)"):
        load_fine_tuning({"epoch": 3}, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ()}, "tasks is empty; name at least one"),
        ({"folds": 1}, "folds=1 is too small; it must be at least 2"),
        ({"protocols": ()}, "protocols is empty; allowed: paper, linear"),
        ({"protocols": "liner"}, r"protocol 'liner' is not known \(did you mean 'linear'\?\)"),
        ({"search": "there"}, "search='there' is not known; allowed: auto, ray, here"),
        (
            {"search": "here", "protocols": ("linear", "mlp")},
            "search=here is not possible for mlp, which Ray Tune searches",
        ),
        ({"finetune": {"batch": 3, "ranks": 2}}, "finetune.batch=3 is too small for 2 ranks; it must be at least 4"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(wrong, message):
    with pytest.raises(UserError, match=message):
        evaluation.evaluate("nowhere", "nowhere", **{"tasks": "ad", **wrong})
