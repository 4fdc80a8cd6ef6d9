"""Every protocol is run by the real command on tiny checkpoints; the dual of the voxel model equals the primal."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.features.voxels import voxel_coordinates
from evaluation.protocols.nested_cv import trial_row
from evaluation.protocols.probes import LINEAR, FeatureTable, fit_predict, linear
from evaluation.protocols.record import trial_runs
from evaluation.protocols.variant import ProtocolVariant
from infra import cli, ray_cluster
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.mlflow_store import StoredRun
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import block_names, intermediate_features
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of
from tests.runs import ROOT, environment
from tests.stores import store_at

OPTIONS = {"width": 0.125, "norm": "group"}
SMALL = ["--folds", "2", "--draws", "2", "--n-train", "8,500", "--repeats", "1", "--halvings", "0"]
NETWORKS = ["--finetune.epochs=2", "--finetune.trials=2", "--finetune.halving=1", "--finetune.precision=fp32"]


def write_checkpoint(run, manifest, step, seed):
    """Write a checkpoint as pretraining does."""
    folder = run / "checkpoints" / f"step-{step:08d}" / "encoder"
    write_encoders_of(manifest, folder, seed=seed, run_name=run.name, step=step)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.jobs)])
def place(request):
    """Where searches run: small ones in the calling process, or all of them on a Ray cluster that is there already."""
    with ray_cluster.session(3) if request.param == "ray" else contextlib.nullcontext():
        yield


@pytest.fixture
def cluster():
    with ray_cluster.session(3):
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("protocols")
    cohort = write_cohort(root / "tiny", participants=54)
    shards = root / "shards"
    build_shards(cohort, shards, splits={"pretrain": 0.2, "downstream": 0.8})
    for step in (2, 4):
        write_checkpoint(root / "runs" / "first", Manifest.load(shards), step, step)
    return root, shards


def evaluate(world, name, *more):
    """Run ``yaware evaluate`` with a store of its own; return the store and its runs by (label of the protocol, step)."""
    root, shards = world
    uri = store_at(root / f"{name}.db")
    given = ["evaluate", str(root / "runs" / "first"), "--shards", str(shards), "--experiment", name, "--workers", "2"]
    assert cli.run([*given, *SMALL, "--storage", str(root / "storage"), "--tracking-uri", uri, *more]) == 0
    assert not list((root / "storage").iterdir())  # the work folders are removed
    found = {
        (ProtocolVariant.from_tags(row["tags"]).label, row["tags"]["yaware.step"]): row
        for row in runs.runs(uri, name, "evaluation")
    }
    assert all(row["status"] == "FINISHED" for row in found.values())
    return uri, found


def tables(uri, row, folder):
    path = runs.download(uri, row["run_id"], "evaluation", folder / row["run_id"])
    return (
        pd.read_parquet(path / "predictions.parquet"),
        pd.read_csv(path / "curve.csv"),
        pd.read_csv(path / "trials.csv"),
    )


def test_protocols_on_frozen_features_over_all_steps(world, place, tmp_path):
    tasks = ["--tasks", "ad,site", "--protocols", "paper,voxels", "--all-steps"]
    name = f"frozen-{ray_cluster.has_cluster()}"
    uri, found = evaluate(world, name, *tasks)
    assert set(found) == {("paper", "2"), ("paper", "4"), ("voxels", "0")}
    assert not runs.runs(uri, name, "trial")  # trials of grids have no runs of their own
    keys = []
    for (protocol, _), row in found.items():
        predictions, curve, trials = tables(uri, row, tmp_path)
        ad, site = predictions[predictions["task"] == "ad"], predictions[predictions["task"] == "site"]
        assert set(ad) >= {"key", "participant", "label", "answer", "probability", "fold", "age", "sex", "site"}
        assert ad["answer"].notna().all()
        assert ad["probability"].between(0, 1).all()
        np.testing.assert_allclose(site[["p0", "p1"]].sum(axis=1), 1.0)
        assert set(trials["task"]) == {"ad", "site"}
        assert set(curve["n_train"]) == {8}
        assert row["tags"].get("yaware.leakage.checked") == (None if protocol == "voxels" else "participants, voxels")
        assert {"ad.auc", "ad.auc.low", "ad.brier", "site.bacc"} <= set(row["metrics"])
        keys.append(ad.sort_values("key")[["key", "fold", "label"]].to_numpy().tolist())
    assert all(scans == keys[0] for scans in keys)  # every candidate has the same scans in the same folds


def test_layer_pooling_and_left_out_sites_are_separate_tags(world):
    more = ["--tasks", "age", "--protocols", "knn", "--layer", "layer2", "--pooling", "mean,std", "--leave-site-out"]
    _, found = evaluate(world, "layer", *more, "--inner-repeats", "2")
    (((label, _), row),) = found.items()
    assert label == "knn, layer2 mean+std, sites left out"
    names = ("protocol", "model", "evaluates", "leave_site_out", "layer", "pooling")
    tags = tuple(row["tags"][f"yaware.{name}"] for name in names)
    assert tags == ("knn", "knn", "checkpoint", "True", "layer2", "mean,std")


def test_a_network_trial_is_named_after_task_fold_and_params():
    point = {"lr": 0.00123456, "hidden": 16}
    row = trial_row("fold 1", {"point": point, "scores": [0.5, 0.75, float("-inf")], "done": False})
    grid = {"part": "fold 0", "point": {"penalty": 1.0}, "inner_score": 0.5, "seconds": 1.0}
    (trial,) = trial_runs({"ad": [row], "age": [grid]})
    assert trial["name"] == "ad, fold 1: hidden=16, lr=0.001235"
    assert trial["params"] == point
    assert trial["metrics"] == [("inner_score", 0.75, 0), ("score", 0.5, 1), ("score", 0.75, 2)]
    assert trial["tags"] == {"yaware.task": "ad", "yaware.part": "fold 1", "yaware.stopped": True}


@pytest.mark.parametrize("times", [1, 1000])
def test_no_result_is_lost_if_the_store_fails(world, monkeypatch, capsys, times):
    root, shards = world
    name = f"outage-{times}"
    uri, storage = store_at(root / f"{name}.db"), root / name
    given = ["evaluate", str(root / "runs" / "first" / "checkpoints" / "latest"), "--shards", str(shards), *SMALL]
    given += ["--tasks", "ad", "--protocols", "linear", "--experiment", name, "--workers", "2"]
    given += ["--storage", str(storage), "--tracking-uri", uri]
    calls, log_artifact = [], StoredRun._artifact

    def failing(self, entry):
        calls.append(entry)
        if len(calls) <= times:
            raise ConnectionError("the store is gone")
        log_artifact(self, entry)

    monkeypatch.setattr(StoredRun, "_artifact", failing)
    status = cli.run(given)
    printed = capsys.readouterr()
    (row,) = runs.runs(uri, name, "evaluation")
    if times > 1:  # the store stays down
        assert status == 2
        assert "run the same command again" in printed.err.splitlines()[-1]
        assert "logged to MLflow" not in printed.out
        assert row["status"] != "FINISHED"
        monkeypatch.setattr(StoredRun, "_artifact", log_artifact)
        monkeypatch.setattr("evaluation.protocols.evaluate.compute_result", None)  # would raise if called
        status = cli.run(given)
    assert status == 0
    assert not list(storage.iterdir())
    (again,) = runs.runs(uri, name, "evaluation")
    assert (again["run_id"], again["status"]) == (row["run_id"], "FINISHED")
    predictions, curve, trials = tables(uri, again, root / name)
    assert predictions["answer"].notna().all()
    assert len(trials) == 2 * len(LINEAR.grid)
    assert curve.empty  # the protocol linear has no learning curves
    assert "ad.auc" in again["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("protocol", "subject"), [("mlp", "first"), ("finetune", "first"), ("scratch", "scratch resnet18")]
)
def test_protocols_that_search_with_optuna(world, cluster, tmp_path, protocol, subject):
    options = NETWORKS if protocol != "mlp" else ["--mlp-trials", "2"]
    curve = ["--finetune.curve=true", "--draws", "1"] if protocol == "finetune" else []
    uri, found = evaluate(world, protocol, "--tasks", "ad,age", "--protocols", protocol, *options, *curve)
    ((_, row),) = found.items()
    assert row["tags"]["yaware.run_name"] == subject
    predictions, drawn, trials = tables(uri, row, tmp_path)
    assert predictions["answer"].notna().all()
    assert predictions.loc[predictions["task"] == "ad", "probability"].between(0, 1).all()
    assert len(trials[trials["part"].str.startswith("fold")]) == 2 * 2 * 2  # tasks x folds x trials
    assert "scores" not in trials
    children = runs.runs(uri, protocol, "trial")
    assert len({child["name"] for child in children}) == len(children) == len(trials)
    for child in children:
        assert child["tags"]["mlflow.parentRunId"] == row["run_id"]
        assert {"lr"} <= set(child["params"])
        scores = [value for _, value in runs.metric_history(uri, child["run_id"], "score")]
        assert max(scores) == child["metrics"]["inner_score"]
    assert list(drawn["n_train"]) == ([8] if curve else [])
    assert np.isfinite(row["metrics"]["age.mae"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_fine_tuning_on_two_ranks(world, cluster):
    more = ["--tasks", "ad", "--protocols", "finetune", *NETWORKS, "--finetune.trials=0", "--finetune.ranks=2"]
    _, found = evaluate(world, "ranks", *more, "--workers", "3")
    ((_, row),) = found.items()
    assert row["params"]["finetune.ranks"] == "2"
    assert np.isfinite(row["metrics"]["ad.auc"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_killed_evaluation_continues_in_the_same_run(world, cluster):
    root, shards = world
    uri, storage = store_at(root / "killed.db"), root / "killed"
    command = [
        sys.executable, "-m", "infra.cli", "evaluate", str(root / "runs" / "first"), "--shards", str(shards), *SMALL,
        "--tasks", "ad", "--protocols", "knn,mlp", "--mlp-trials", "5", "--experiment", "killed", "--workers", "2",
        "--storage", str(storage), "--tracking-uri", uri,
    ]  # fmt: skip
    log = (root / "killed.log").open("w")
    driver = subprocess.Popen(command, cwd=ROOT, env=environment(root), stdout=log, stderr=log)
    limit = time.monotonic() + 400
    while not list(storage.glob("*/ad-*-results/trial-*.json")):
        assert driver.poll() is None, (root / "killed.log").read_text()[-3000:]
        assert time.monotonic() < limit, "the search did not reach its first trial"
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(family, timeout=60)
    records = storage.glob("*/ad-*-results/trial-*.json")
    done = {path: path.stat().st_mtime_ns for path in records if json.loads(path.read_text())["done"]}
    open_runs = {row["run_id"] for row in runs.runs(uri, "killed", "evaluation")}
    again = subprocess.Popen(command, cwd=ROOT, env=environment(root), stdout=log, stderr=log)
    rewritten = set()
    while again.poll() is None:
        rewritten |= {path for path, then in done.items() if path.exists() and path.stat().st_mtime_ns != then}
        time.sleep(0.05)
    log.close()
    assert again.returncode == 0, (root / "killed.log").read_text()[-3000:]
    assert not rewritten
    found = runs.runs(uri, "killed", "evaluation")
    assert {row["run_id"] for row in found} == open_runs
    assert [row["status"] for row in found] == ["FINISHED", "FINISHED"]


def test_the_dual_of_the_voxel_model_makes_the_predictions_of_the_primal(world, tmp_path):
    manifest = Manifest.load(world[1])
    rows = np.arange(30)
    labels = (manifest.scans["age"].to_numpy()[rows] > 40).astype(int)
    voxels = np.stack([manifest.read_volume(int(row)).astype(np.float64).ravel() for row in rows])
    none = np.empty((30, 0))
    predictions = []
    for chosen in (rows, rows[3:28]):  # the second time from the cache, for some of its rows
        dual = voxel_coordinates(manifest, chosen, tmp_path / "gram.npz")
        train, test = np.arange(len(chosen) - 8), np.arange(len(chosen) - 8, len(chosen))
        pair = []
        for features in (dual, voxels[chosen]):
            scaled = features / np.sqrt(features[train].var(0).sum())  # dual and primal have different scales
            table = FeatureTable(
                scaled, labels[chosen], np.arange(len(chosen)), "binary",
                covariates=none[chosen], confounds=none[chosen], scale="all",
            )  # fmt: skip
            params = {"penalty": 1.0 * features.shape[1]}
            pair.append(fit_predict(linear, params, table, train, test).predicted)
        np.testing.assert_allclose(pair[0], pair[1], rtol=2e-2, atol=2e-3)
        predictions.append(pair[0])
    assert np.ptp(predictions[0]) > 0.1


def test_features_of_any_block(world):
    encoder = Encoder.from_pretrained(world[0] / "runs" / "first")
    volumes = torch.randn(3, 1, 14, 16, 12)
    assert {"conv1", "layer1", "layer4", "layer2.0"} <= set(block_names(encoder.network))
    with torch.no_grad():
        own = encoder(volumes)
        torch.testing.assert_close(
            intermediate_features(encoder.network, "layer4", ["mean"])(volumes), own
        )  # where it ends
        both = intermediate_features(encoder.network, "layer2", ["mean", "max", "std"])(volumes)
        inner = encoder.network.trunk[:6](volumes).flatten(2)
    expected = torch.cat([inner.mean(2), inner.amax(2), inner.std(2, correction=0)], dim=1)
    torch.testing.assert_close(both, expected)
    with pytest.raises(UserError, match=r"layer='layer9' is not a block of this encoder \(did you mean 'layer\d'"):
        intermediate_features(encoder.network, "layer9", ["mean"])
    with pytest.raises(UserError, match="pooling='median' is not known"):
        intermediate_features(encoder.network, "layer1", ["median"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--protocols", "knnn"], "protocol 'knnn' is not known (did you mean 'knn'?)"),
        (["--protocols", "age-supervised"], "protocol age-supervised is a pretraining: run yaware pretrain"),
        (["--finetune.epoch=3"], "unknown key 'finetune.epoch' (did you mean 'epochs'?)"),
        (["--finetune.batch=3", "--finetune.ranks=2"], "finetune.batch=3 is too small for 2 ranks; it must be at least 4"),
        (["--fintune.epochs=3"], "argument --fintune.epochs=3 is not known"),
        (["--layer", "layer9"], "layer='layer9' is not a block of this encoder"),
        (["--inner-repeats", "0"], "inner_repeats=0 is too small; it must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(world, capsys, more, text):
    root, shards = world
    given = ["evaluate", str(root / "runs" / "first"), "--shards", str(shards), "--tasks", "ad", "--folds", "2"]
    assert cli.run([*given, "--tracking-uri", f"sqlite:///{root}/none.db", *more]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
