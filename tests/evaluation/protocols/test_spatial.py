"""Spatial features by the real command: chosen on inner folds, or named; their tags, tables, caches and refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.features.candidates import spatial_block
from evaluation.features.chosen import choices_text
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.features import cache_name, features_of, features_of_each
from evaluation.protocols.inputs import joint_tables
from evaluation.protocols.settings import EvaluationSettings
from evaluation.protocols.variant import JOINT, ProtocolVariant
from evaluation.tasks.tasks import load_task
from infra import cli
from infra.tracking import runs
from pretrain.weights.encoder import Encoder
from pretrain.weights.layers import intermediate_features
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of
from tests.stores import store_at

SMALL = ["--folds", "2", "--draws", "2", "--n-train", "8", "--repeats", "1", "--halvings", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("spatial")
    shards = root / "shards"
    build_shards(write_cohort(root / "tiny", participants=54), shards, splits={"pretrain": 0.2, "downstream": 0.8})
    manifest = Manifest.load(shards)
    write_encoders_of(manifest, root / "encoder")
    return root, shards


def evaluate(world, name, *more):
    """Run ``yaware evaluate`` with a store of its own; return its status, the store and its finished runs."""
    root, shards = world
    uri = store_at(root / f"{name}.db")
    given = ["evaluate", str(root / "encoder"), "--shards", str(shards), "--experiment", name, "--workers", "1"]
    status = cli.run([*given, *SMALL, "--storage", str(root / "storage"), "--tracking-uri", uri, *more])
    return status, uri, runs.runs(uri, name, "evaluation") if status == 0 else []


def test_features_are_chosen_in_each_fold_and_reported(world, tmp_path, capsys):
    more = ["--tasks", "ad,age", "--protocols", "paper", "--layer", "auto"]
    status, uri, (row,) = evaluate(world, "auto", *more)
    assert status == 0
    variant = ProtocolVariant.from_tags(row["tags"])
    assert (variant.label, variant.layer, variant.pooling) == ("paper, auto", "auto", ())
    printed = capsys.readouterr().out
    assert "evaluate: task ad: chosen features (layer, pooling, scale): " in printed
    folder = runs.download(uri, row["run_id"], "evaluation", tmp_path)
    chosen, trials = pd.read_csv(folder / "chosen.csv"), pd.read_csv(folder / "trials.csv")
    assert chosen.groupby("task").size().to_dict() == {"ad": 2, "age": 2}
    assert {"layer", "pooling", "scale", "penalty"} <= set(chosen)
    assert set(chosen["scale"]) <= {"each", "all"}
    assert trials["point"].str.contains('"layer": "layer1", "pooling": "grid3", "scale": "all"').any()
    assert (
        cli.run(["compare", "--experiment", "auto", "--tracking-uri", uri, "--out", str(tmp_path / "report.html")]) == 0
    )
    text = choices_text(chosen[chosen["task"] == "ad"].to_dict("records"))
    assert "of 2 folds)" in text
    assert f"chosen features (layer, pooling, scale), first, ad: {text}" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "report.html").read_text()
    assert text in page
    assert "Chosen features" in page
    assert np.isfinite([row["metrics"]["ad.auc"], row["metrics"]["age.mae"], row["metrics"]["ad.auc.n8"]]).all()


@pytest.mark.parametrize(
    ("more", "label"),
    [
        (["--layer", "layer1", "--pooling", "grid2", "--scale", "all"], "linear, layer1 grid2, one scale"),
        (["--pooling", "none"], "linear, end none"),
        (["--layer", "own"], "linear, own features"),
        (["--scale", "all"], "linear, own features, one scale"),
        (["--layer", "layer1", "--pooling", "mean,none"], "linear, layer1 mean+none"),
    ],
)
def test_named_features_have_their_own_variant(world, more, label):
    name = "named-" + "".join(more).replace(",", "")
    status, _, (row,) = evaluate(world, name, "--tasks", "ad", "--protocols", "linear", *more)
    assert status == 0
    variant = ProtocolVariant.from_tags(row["tags"])
    assert variant.label == label
    assert ProtocolVariant.from_tags(variant.to_tags()) == variant
    assert variant.fitted != ProtocolVariant(protocol="linear", model="linear", layer=JOINT).fitted
    assert row["params"]["scale"] == ("all" if "one scale" in label else "each")


def test_without_a_layer_linear_models_get_own_and_spatial_features(world):
    status, _, rows = evaluate(world, "default", "--tasks", "ad", "--protocols", "linear,knn")
    assert status == 0
    variants = {row["params"]["protocol"]: ProtocolVariant.from_tags(row["tags"]) for row in rows}
    assert [variants[name].layer for name in ("linear", "knn")] == [JOINT, ""]
    assert [variants[name].label for name in ("linear", "knn")] == ["linear", "knn"]
    params = {row["params"]["protocol"]: row["params"] for row in rows}
    assert params["linear"]["layer"] == JOINT
    assert params["linear"]["spatial"] == "layer1 none"
    assert "spatial" not in params["knn"]
    assert not {"pooling", "scale"} & params["linear"].keys()
    more = ["--tasks", "ad", "--protocols", "linear", "--layer", "own"]
    _, _, (own,) = evaluate(world, "own", *more)
    (joint,) = [row for row in rows if row["params"]["protocol"] == "linear"]
    assert own["metrics"]["ad.auc"] != joint["metrics"]["ad.auc"]


def test_the_joint_table_holds_the_features_of_both_blocks(world, tmp_path):
    root, shards = world
    manifest, encoder = Manifest.load(shards), Encoder.from_pretrained(root / "encoder")
    tasks = [load_task(name, manifest, 2) for name in ("ad", "age", "site")]
    rows = np.unique(np.concatenate([task.rows for task in tasks]))
    context = EvaluationContext(
        manifest=manifest, tasks=tasks, rows=rows, settings=EvaluationSettings(("ad", "age")), cache=tmp_path,
        storage=tmp_path, uri="", experiment="",
    )  # fmt: skip
    tables = joint_tables(context, Candidate("first", "y-aware", weights="a" * 64, encoder=encoder))
    spatial = spatial_block(encoder.network, manifest.grid["shape"])
    assert spatial == ("layer1", ("none",))  # 4 x 4 x 3 positions of 14 x 16 x 12 voxels
    own, places = (features_of(encoder, manifest, rows, tmp_path / f"{n}.npz", "test", *block)
                   for n, block in enumerate(((None, ("mean",)), spatial)))  # fmt: skip
    for task in tasks[:2]:
        table, of_task = tables[task.name], np.searchsorted(rows, task.rows)
        first = table.blocks[0].columns
        assert [(block.scale, block.features) for block in table.blocks] == [
            ("each", own.shape[1]),
            ("all", places.shape[1]),
        ]
        np.testing.assert_allclose(table.features[:, :first], own[of_task], rtol=1e-6)
        centred = places[of_task].astype(float) - places[of_task].mean(0)
        found = table.features[:, first:] - table.features[:, first:].mean(0)
        np.testing.assert_allclose(found @ found.T, centred @ centred.T, rtol=1e-3, atol=1e-5)
        assert table.count == own.shape[1] + places.shape[1]
    table = tables["site"]
    assert table.blocks == ()
    np.testing.assert_allclose(table.features, own[np.searchsorted(rows, tasks[2].rows)], rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            ["--layer", "auto", "--pooling", "grid3"],
            "layer=auto chooses pooling and scale too; leave out pooling and scale",
        ),
        (
            ["--layer", "auto", "--protocols", "paper,knn"],
            "layer=auto is for the protocols paper and linear, and not for knn",
        ),
        (["--scale", "one"], "scale='one' is not known; allowed: each, all"),
        (["--scale", "all", "--protocols", "knn"], "scale=all is not used by knn; only by paper and linear"),
        (
            ["--layer", "layer4", "--pooling", "grid2"],
            "pooling grid2 needs a map of 2 or more positions along each side",
        ),
        (["--pooling", "grid"], "pooling='grid' is not known (did you mean 'grid"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(world, capsys, more, text):
    status, _, _ = evaluate(world, "refused", "--tasks", "ad", *more)
    assert status == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_blocks_are_computed_in_one_pass_and_cached_each(world, tmp_path):
    manifest, encoder = Manifest.load(world[1]), Encoder.from_pretrained(world[0] / "encoder")
    blocks = [(None, ("mean",)), ("layer1", ("none",)), ("layer2", ("mean", "std"))]
    caches = {block: tmp_path / cache_name("a" * 64, manifest.digest, *block) for block in blocks}
    assert len(set(caches.values())) == 3
    passes = []
    encoder.network.register_forward_hook(lambda *_: passes.append(1))
    rows = np.array([7, 3, 20, 5])
    features = features_of_each(encoder, manifest, rows, caches, "test")
    assert len(passes) == 1
    volumes = torch.from_numpy(np.stack([manifest.read_volume(int(row)).astype(np.float32) for row in rows]))[:, None]
    volumes = (volumes - volumes.mean((2, 3, 4), keepdim=True)) / volumes.std((2, 3, 4), keepdim=True, correction=0)
    with torch.no_grad():
        for block, found in features.items():
            expected = intermediate_features(encoder.network, *block)(volumes).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    before = len(passes)
    again = features_of_each(encoder, manifest, rows[::-1], caches, "test")
    alone = features_of(encoder, manifest, rows, caches[blocks[1]], "test", layer="layer1", pooling=("none",))
    assert len(passes) == before  # all from the caches
    np.testing.assert_array_equal(alone, features[blocks[1]])
    np.testing.assert_array_equal(again[blocks[2]][::-1], features[blocks[2]])


def test_the_cache_of_the_own_features_keeps_its_name():
    assert cache_name("w" * 64, "d" * 64, None, ("mean",)) == cache_name("w" * 64, "d" * 64, None, ())
    assert cache_name("w" * 64, "d" * 64, None, ("mean",)) == f"{'w' * 16}-{'d' * 16}.npz"
    assert cache_name("w" * 64, "d" * 64, "layer2", ("mean",)) == f"{'w' * 16}-{'d' * 16}-layer2-mean.npz"
    assert EvaluationSettings(("ad",)).scale == "each"
