"""From checkpoints to the report by the real commands; the report is made from MLflow's store only."""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
from contextlib import redirect_stdout
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from data_pipeline.loading.loader import volumes
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.features import embedding
from evaluation.features.embedding import embedding_table
from evaluation.protocols.saliency import boxes_of, occlusion
from evaluation.statistics.metrics import interval_text
from evaluation.tasks.tasks import load_task
from infra import cli
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of
from infra.tracking.tracker import Tracker
from pretrain.encoders import build_encoder
from pretrain.weights.write import write_encoder
from tests.cohorts import write_cohort
from tests.stores import store_at

OPTIONS = {"width": 0.25, "norm": "group"}
TASKS = ["--tasks", "ad,age,site,sex", "--n-train", "8,16,99", "--draws", "3", "--repeats", "2", "--halvings", "5"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    cohort = write_cohort(tmp_path_factory.mktemp("cohort") / "tiny", participants=90)
    out = tmp_path_factory.mktemp("shards") / "tiny"
    build_shards(cohort, out, splits={"pretrain": 0.3, "monitor": 0.1, "downstream": 0.6})
    return out


def checkpoint(folder, shards, uri, name, seed, split="pretrain"):
    manifest = Manifest.load(shards)
    tracker = Tracker.open(uri, "test", name, tags={"yaware.kind": "pretraining"})
    tracker.log_metrics(
        [(m, 1.0 + 1 / (s + 1), s) for s in range(30) for m in ("loss", "lr", "grad_norm", "scans_per_second")]
    )
    torch.manual_seed(seed)
    config = {
        "encoder": {"name": "resnet18", "options": OPTIONS}, "feature_size": 128, "step": 30, "run_id": tracker.run_id,
        "run_name": name, "method": "y-aware", "manifest_digest": manifest.digest, "split": [split], "version": "0.1.0",
        "simulated": False, "experiment": "test",
    }  # fmt: skip
    preprocessing = {"grid": manifest.grid, "normalisation": "zscore", "modality": "vbm", "scaling": "none"}
    weights = write_encoder(folder / "encoder", build_encoder("resnet18", OPTIONS).state_dict(), config, preprocessing)
    model_id = tracker.log_checkpoint(name, 30, folder, weights)
    (folder / "encoder" / "mlflow.json").write_text(f'{{"model_id": "{model_id}"}}')
    tracker.end()
    return model_id


@pytest.fixture(scope="module")
def evaluated(shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    uri = store_at(root / "mlflow.db")
    models = [checkpoint(root / name, shards, uri, name, seed) for seed, name in enumerate(("first", "second"))]
    given = [str(root / "first"), str(root / "second"), "--shards", str(shards), "--experiment", "test"]
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.run(["evaluate", *given, *TASKS, "--tracking-uri", uri]) == 0
    (root / "printed.txt").write_text(printed.getvalue())
    asked = [str(root / "first"), "--shards", str(shards), "--experiment", "test", "--tracking-uri", uri]
    assert cli.run(["saliency", *asked, "--task", "ad", "--scans", "4", "--cubes", "3"]) == 0
    for name in ("first", "second"):
        shutil.rmtree(root / name)  # from here on they exist only in MLflow
    return root, uri, models


def test_evaluations_are_linked_to_checkpoint_and_pretraining(evaluated):
    _, uri, models = evaluated
    rows = runs.runs(uri, "test", "evaluation")
    trained = {row["name"]: row["run_id"] for row in runs.runs(uri, "test", "pretraining")}
    assert {row["tags"]["yaware.model_id"] for row in rows} == set(models)
    for row in rows:
        assert row["status"] == "FINISHED"
        assert row["tags"]["mlflow.parentRunId"] == trained[row["tags"]["yaware.run_name"]]
        metrics = row["metrics"]
        assert metrics["ad.auc.low"] <= metrics["ad.auc"] <= metrics["ad.auc.high"]
        assert metrics["ad.auc.fixed.low"] <= metrics["ad.auc.fixed"] <= metrics["ad.auc.fixed.high"]
        assert {"age.mae", "site.bacc", "sex.auc", "ad.auc.n8", "ad.auc.n16"} <= set(metrics)
        assert "ad.auc.n99" not in metrics
        (model,) = runs.checkpoints(uri, row["tags"]["mlflow.parentRunId"])
        assert {
            "name": "ad.auc",
            "value": metrics["ad.auc"],
            "step": 30,
            "dataset": "tiny",
            "run_id": row["run_id"],
        } in model["metrics"]


def test_mlflow_sorts_checkpoints_by_a_metric(evaluated):
    """This is the query of MLflow's own table of models: by a metric on a data set."""
    _, uri, models = evaluated
    client = client_of(uri)
    order = {"field_name": "metrics.ad.auc", "ascending": False, "dataset_name": "tiny"}
    found = client.search_logged_models([client.get_experiment_by_name("test").experiment_id], order_by=[order])
    logged = {row["tags"]["yaware.model_id"]: row["metrics"]["ad.auc"] for row in runs.runs(uri, "test", "evaluation")}
    assert [model.model_id for model in found] == sorted(models, key=lambda model: -logged[model])


def test_compare_reads_only_the_store_and_writes_the_report(evaluated, capsys):
    root, uri, _ = evaluated
    out = root / "out" / "report.html"
    assert cli.run(["compare", "--experiment", "test", "--tracking-uri", uri, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ad AUC" in printed
    assert "mlflow ui --backend-store-uri" in printed
    assert re.search(r"ad AUC: (first - second|second - first) = [+-]0\.\d+ \[", printed)
    page = out.read_text()
    assert not re.search(r"(src|href)=['\"]?https?:", page)
    assert "Simulated data" not in page
    pictures = {
        "auc": ("first", "second", "AUC", "MAE (years)"),
        "learning_curve": ("first", "second", "number of training scans"),
        "calibration": ("first", "second", "predicted probability"),
        "training_curves": ("first", "gradient norm"),
    }
    for name, texts in pictures.items():
        svg = embedded(page, name, "svg+xml").decode()
        for text in texts:
            assert f"<!-- {text} -->" in svg, (name, text)  # matplotlib writes each text of a drawing as a comment too
    for name in ("embedding_age", "saliency"):
        assert embedded(page, name, "png") == (root / "out" / f"report_{name}.png").read_bytes()
    for name in (*pictures, "embedding_age", "saliency"):
        pixels = imread(root / "out" / f"report_{name}.png")
        assert (pixels[..., :3] < 0.9).any(axis=2).mean() > 0.01  # not an empty page
    table = pd.read_csv(root / "out" / "report_metrics.csv")
    logged = {row["tags"]["yaware.run_name"]: row["metrics"] for row in runs.runs(uri, "test", "evaluation")}
    evaluated_as = (root / "printed.txt").read_text()
    for row in table.itertuples():
        metrics, key = logged[row.checkpoint], f"{row.task}.{row.metric}"
        for column, end in (("value", ""), ("low", ".low"), ("high", ".high")):
            assert getattr(row, column) == metrics[key + end]
            assert getattr(row, f"fixed_{column}") == metrics[f"{key}.fixed{end}"]
        text = interval_text(row.metric, row.value, row.low, row.high)
        assert f"<td class='n'>{text}</td>" in page or f'<td class="n">{text}</td>' in page
        if key in ("ad.auc", "age.mae", "site.bacc", "sex.auc"):
            (line,) = re.findall(rf"^evaluate: {row.checkpoint} step 30, .*", evaluated_as, re.M)
            assert f"{key} {text}" in line
            assert text in re.sub(r"\s+", " ", printed)
    assert (table["value"] != table["fixed_value"]).mean() > 0.5
    assert set(table["covers"]) == {"people and training sets"}
    differences = pd.read_csv(root / "out" / "report_differences.csv")
    assert set(differences["test"]) == {"halves"}
    assert differences[["low", "high", "p", "fixed_low", "fixed_high", "fixed_p"]].notna().all(axis=None)


def embedded(page, section, kind):
    """Return the bytes of the only picture in a section of the report."""
    (part,) = re.findall(rf'<section><h2 id="{section}">.*?</section>', page, re.S)
    (content,) = re.findall(rf'src="data:image/{re.escape(kind)};base64,([^"]+)"', part)
    return base64.b64decode(content)


class Region(torch.nn.Module):
    """An encoder whose first feature is the mean of the middle of the volume and whose other features are constant."""

    def forward(self, volumes_B1DHW):
        mean = volumes_B1DHW[:, 0, 6:12, 6:12, 6:12].mean((1, 2, 3))
        return torch.stack([mean, torch.ones_like(mean), torch.zeros_like(mean)], dim=1)


def test_occlusion_finds_the_only_voxels_that_the_encoder_uses(shards):
    manifest = Manifest.load(shards)
    task = load_task("ad", manifest)
    encoder = Region()
    features = torch.cat([encoder(batch) for _, batch in volumes(manifest, task.rows, 16)]).numpy()
    train, test = np.arange(len(task.rows))[6:], np.arange(6)
    params = {"penalty": 1.0}
    maps = occlusion(encoder, manifest, task, features=features, train=train, test=test, params=params, cubes=3)
    change, side = maps["map"], int(maps["side"])
    middle = (slice(6, 12),) * 3
    assert side == 6  # the region is exactly one cube
    assert change[middle].min() > 0
    elsewhere = change.copy()
    elsewhere[middle] = 0
    assert not elsewhere.any()
    assert maps["background"].shape == change.shape == tuple(manifest.grid["shape"])


def test_cubes_tile_the_brain_without_overlap_and_leave_out_air():
    volume = np.zeros((20, 24, 20))
    volume[5:15, 6:18, 5:15] = 1.0
    boxes, side = boxes_of(volume, 6)
    covered = np.zeros(volume.shape, int)
    for box in boxes:
        covered[box] += 1
    assert side == 4
    assert covered.max() == 1
    assert covered[volume > 0].all()
    assert not covered[:4].any()


def test_saliency_needs_an_evaluation(shards, tmp_path, capsys):
    uri = store_at(tmp_path / "mlflow.db")
    checkpoint(tmp_path / "ok", shards, uri, "ok", 0)
    base = [str(tmp_path / "ok"), "--shards", str(shards), "--tracking-uri", uri, "--experiment", "test"]
    for more, text in (
        (["--task", "ad"], r"has no evaluation of task ad .* experiment 'test' \(.*\); run yaware evaluate"),
        (["--task", "site"], "task site is multiclass and has no single score"),
        (["--task", "ad", "--cubes", "1"], "--cubes=1 is too small; give at least 2"),
    ):
        assert cli.run(["saliency", *base, *more]) == 2
        assert re.search(text, capsys.readouterr().err)


def distances(points):
    """Return all pairwise Euclidean distances."""
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_umap_gets_the_components_and_its_coordinates_are_stored_unchanged(shards, monkeypatch):
    """umap-learn is optional, so a module of its name and interface takes its place.

    With fewer features than components the map loses nothing: UMAP must see the distances of the standardised features.
    """
    manifest, rows = Manifest.load(shards), np.arange(40)
    features = np.random.default_rng(0).normal(size=(40, 12)) * np.arange(1, 13)
    coordinates = np.random.default_rng(1).normal(size=(40, 2))
    inputs = []

    class UMAP:
        """The part of umap.UMAP's interface that is used."""

        def __init__(self, *, random_state):
            self.random_state = random_state

        def fit_transform(self, points):
            inputs.append((self.random_state, points))
            return coordinates

    assert "umap_x" not in embedding_table(manifest, rows, features)
    monkeypatch.setattr(embedding, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "umap", ModuleType("umap"))
    monkeypatch.setattr(sys.modules["umap"], "UMAP", UMAP, raising=False)
    assert "umap_x" not in embedding_table(manifest, rows[:15], features[:15])  # too few scans
    table = embedding_table(manifest, rows, features)
    assert np.array_equal(table[["umap_x", "umap_y"]].to_numpy(), coordinates)
    ((seed, points),) = inputs
    assert seed == 0
    healthy = features[(manifest.scans["diagnosis"].iloc[rows] == "control").to_numpy()]
    assert 2 < len(healthy) < 40
    np.testing.assert_allclose(distances(points), distances(features / healthy.std(0)), rtol=1e-5)
    assert np.array_equal(points[:, :2], table[["x", "y"]].to_numpy())


def test_umap_itself_makes_a_map(shards):
    pytest.importorskip("umap", reason="umap-learn is optional")
    table = embedding_table(Manifest.load(shards), np.arange(40), np.random.default_rng(0).normal(size=(40, 12)))
    assert np.isfinite(table[["umap_x", "umap_y"]]).all(axis=None)


def test_compare_without_evaluations_names_the_command_to_run(evaluated, capsys):
    uri = evaluated[1]
    assert cli.run(["compare", "--experiment", "tset", "--tracking-uri", uri]) == 2
    assert "experiment 'tset' is not in" in capsys.readouterr().err
    Tracker.open(uri, "empty", "x", tags={"yaware.kind": "pretraining"}).end()
    assert cli.run(["compare", "--experiment", "empty", "--tracking-uri", uri]) == 2
    assert "has no evaluation, but pretrainings (1); run `yaware evaluate` first" in capsys.readouterr().err


def test_participants_seen_in_pretraining_are_refused(shards, tmp_path, capsys):
    uri = store_at(tmp_path / "mlflow.db")
    checkpoint(tmp_path / "leaky", shards, uri, "leaky", 0, split="downstream")
    given = [str(tmp_path / "leaky"), "--shards", str(shards), "--tasks", "ad", "--tracking-uri", uri]
    assert cli.run(["evaluate", *given]) == 2
    printed = capsys.readouterr().err
    assert re.search(r"leaky: pretrained on participants of the test scans \(tiny/\d+, .* and \d+ more\)", printed)


def test_wrong_options_are_refused_in_one_line(shards, tmp_path, capsys):
    uri = store_at(tmp_path / "mlflow.db")
    checkpoint(tmp_path / "ok", shards, uri, "ok", 0)
    base = ["--shards", str(shards), "--tracking-uri", uri]
    for arguments, text in (
        ([str(tmp_path / "ok"), *base, "--tasks", "add"], r"task 'add' is not known \(did you mean 'ad'\?\)"),
        ([str(tmp_path / "ok"), *base, "--tasks", "scz"], r"task scz: too few participants for 5 folds .*SCZ 0"),
        ([str(tmp_path / "none"), *base, "--tasks", "ad"], "no encoder in"),
        ([str(tmp_path / "ok"), *base, "--tasks", "ad", "--folds", "1"], "folds=1 is too small; it must be at least 2"),
        ([str(tmp_path / "ok"), *base[:2], "--tracking-uri", "ftp://x", "--tasks", "ad"], "is not an MLflow store"),
    ):
        assert cli.run(["evaluate", *arguments]) == 2
        printed = capsys.readouterr().err
        assert re.search(text, printed), printed


def test_a_task_file_of_the_user_is_loaded(shards, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(
        "title: site one\nkind: binary\nlabel: site\npositive: [site1]\nnegative: [site0, site2]\nhealthy: true\n"
    )
    task = load_task(str(path), Manifest.load(shards))
    assert (task.name, task.kind, set(task.labels)) == ("old", "binary", {0, 1})
    path.write_text("title: x\nkind: binary\nlabel: diagnosi\npositive: [a]\nnegative: [b]\n")
    with pytest.raises(
        UserError, match=r"label: 'diagnosi' is not a column of scans.parquet \(did you mean 'diagnosis'\?\)"
    ):
        load_task(str(path), Manifest.load(shards))
