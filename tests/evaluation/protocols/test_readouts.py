"""Predicted proxies beside the features of linear models: penalties, confounds, the real command, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.features.candidates import ridge_answers
from evaluation.features.tables import FeatureTable, permuted, split_features
from evaluation.protocols.context import Candidate, EvaluationContext
from evaluation.protocols.inputs import add_readouts as add_readouts_to_tasks
from evaluation.protocols.inputs import joint_tables
from evaluation.protocols.nested_cv import PreparedTask
from evaluation.protocols.probes import (
    LINEAR,
    READOUT_PENALTIES,
    Probe,
    fit_predict,
    fit_predict_each,
    linear,
    with_readout_penalties,
)
from evaluation.protocols.protocols import decide_readouts
from evaluation.protocols.settings import EvaluationSettings
from evaluation.protocols.variant import ProtocolVariant
from evaluation.tasks.tasks import load_task
from infra import cli
from infra.errors import UserError
from infra.tracking import runs
from pretrain.readouts.add import add_readouts
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import readouts_folder
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of
from tests.stores import store_at

TRAIN, TEST = np.arange(50), np.arange(50, 70)


def table_with(readouts, *, kind="regression", covariates=None, confounds=None, features=8):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(70, features))
    labels = x[:, 0] + 2.0 * readouts[:, 0] + rng.normal(size=70)
    none = np.empty((70, 0))
    return FeatureTable(
        x, (labels > 0).astype(float) if kind == "binary" else labels, np.arange(70), kind,
        covariates=none if covariates is None else covariates, confounds=none if confounds is None else confounds,
        readouts=readouts,
    )  # fmt: skip


@pytest.fixture
def readouts():
    return np.random.default_rng(5).normal(size=(70, 2)) * [1.0, 30.0] + 50.0


@pytest.mark.parametrize("kind", ["regression", "binary"])
@pytest.mark.parametrize("features", [8, 90])
def test_free_readouts_are_covariates(readouts, kind, features):
    given = table_with(readouts, kind=kind, features=features)
    as_covariates = table_with(readouts, kind=kind, features=features, covariates=readouts)
    as_covariates = FeatureTable(**{**vars(as_covariates), "readouts": None})
    for params in ({"penalty": 10.0}, {"penalty": 10.0, "readout_penalty": 0.0}):
        found = fit_predict(linear, params, given, TRAIN, TEST)
        expected = fit_predict(linear, {"penalty": 10.0}, as_covariates, TRAIN, TEST)
        np.testing.assert_allclose(found.predicted, expected.predicted, rtol=1e-6, atol=1e-8)
    for one, other in zip(
        ridge_answers(split_features(given, TRAIN, TEST), kind, [1.0, 100.0]),
        ridge_answers(split_features(as_covariates, TRAIN, TEST), kind, [1.0, 100.0]),
        strict=True,
    ):
        np.testing.assert_allclose(one, other)


def test_readouts_have_a_penalty_of_their_own(readouts):
    """Ridge regression in closed form with the penalty 10 for features and 300 for readouts."""
    table = table_with(readouts)
    found = fit_predict(linear, {"penalty": 10.0, "readout_penalty": 300.0}, table, TRAIN, TEST).predicted
    x = np.column_stack([table.features, readouts])
    mean, deviation = x[TRAIN].mean(0), x[TRAIN].std(0)
    z, y = (x[TRAIN] - mean) / deviation, table.labels[TRAIN]
    weights = np.linalg.solve(z.T @ z + np.diag([10.0] * 8 + [300.0] * 2), z.T @ (y - y.mean()))
    np.testing.assert_allclose(found, (x[TEST] - mean) / deviation @ weights + y.mean(), rtol=1e-6)


def test_the_grid_has_every_pair_of_penalties():
    grid = with_readout_penalties(LINEAR).grid
    pairs = {(params["penalty"], params["readout_penalty"]) for params in grid}
    assert len(grid) == len(pairs) == len(LINEAR.grid) * len(READOUT_PENALTIES)
    assert 0.0 in READOUT_PENALTIES


def test_confounds_are_regressed_out_of_readouts(readouts):
    """A readout that is a line of the confound has no effect; scans outside the training set are not used for it."""
    confounds = np.random.default_rng(6).normal(size=(70, 1))
    line = np.column_stack([3.0 * confounds[:, 0] - 5.0])
    with_line = table_with(line, confounds=confounds)
    labels = np.random.default_rng(7).normal(size=70)
    with_line = FeatureTable(**{**vars(with_line), "labels": labels})
    without = FeatureTable(**{**vars(with_line), "readouts": None})
    found, expected = (fit_predict(linear, {"penalty": 1.0}, table, TRAIN, TEST) for table in (with_line, without))
    np.testing.assert_allclose(found.predicted, expected.predicted, atol=1e-6)


def test_test_scans_do_not_change_predictions_of_others(readouts):
    table = table_with(readouts)
    changed = FeatureTable(**{**vars(table), "readouts": np.where(np.arange(70)[:, None] == 69, 1e3, readouts)})
    probe = Probe(linear, [{"penalty": 1.0}])
    (one,), (other,) = (fit_predict_each(probe, each, TRAIN, TEST) for each in (table, changed))
    np.testing.assert_array_equal(one.predicted[:-1], other.predicted[:-1])
    assert one.predicted[-1] != other.predicted[-1]


def test_permuted_features_take_their_readouts_along(readouts):
    table, rows = table_with(readouts), np.random.default_rng(8).permutation(70)
    found = permuted(table, rows)
    np.testing.assert_array_equal(found.readouts, readouts[rows])
    np.testing.assert_array_equal(found.features, table.features[rows])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards with 24 people to pretrain on, and an encoder with readouts that were fitted to them."""
    root = tmp_path_factory.mktemp("readouts")
    build_shards(
        write_cohort(root / "tiny", participants=90), root / "shards", splits={"pretrain": 0.4, "downstream": 0.6}
    )
    manifest = Manifest.load(root / "shards")
    write_encoders_of(manifest, *(root / name for name in ("encoder", "without", "other")))
    add_readouts(root / "encoder", manifest, columns=["age", "sex"], progress=False)
    add_readouts(root / "other", manifest, columns=["age"], split=["downstream"], progress=False)
    return root


def evaluate(root, name, *more, encoder="encoder"):
    """Run ``yaware evaluate`` on encoders, separated by +, with a store of its own.

    Return its status, the store and its finished runs.
    """
    uri = store_at(root / f"{name}.db")
    small = ["--folds", "2", "--draws", "2", "--n-train", "8", "--repeats", "1", "--halvings", "0", "--workers", "1"]
    encoders = [str(root / one) for one in encoder.split("+")]
    given = ["evaluate", *encoders, "--shards", str(root / "shards"), "--experiment", name, "--tasks", "ad"]
    status = cli.run([*given, *small, "--storage", str(root / "storage"), "--tracking-uri", uri, *more])
    return status, uri, runs.runs(uri, name, "evaluation") if status == 0 else []


@pytest.mark.parametrize(
    ("more", "label"),
    [
        (["--readouts", "free"], "linear, free readouts"),
        (["--readouts", "penalised"], "linear, penalised readouts"),
        (["--readouts", "penalised", "--layer", "auto"], "linear, auto, penalised readouts"),
    ],
)
def test_the_command_knows_readouts_in_tags_params_and_choices(world, tmp_path, more, label):
    name = "-".join(more[1::2])
    status, uri, (row,) = evaluate(world, name, "--protocols", "linear", *more)
    assert status == 0
    variant = ProtocolVariant.from_tags(row["tags"])
    assert (variant.label, variant.readouts) == (label, more[1])
    assert row["params"]["readouts"] == more[1]
    assert len(row["params"]["readouts_sha256"]) == 64
    chosen = pd.read_csv(runs.download(uri, row["run_id"], "evaluation", tmp_path) / "chosen.csv")
    assert ("readout_penalty" in chosen) == (more[1] == "penalised")


def test_without_readouts_nothing_says_so(world, capsys):
    for name, more, encoder in (("plain", ["--readouts", "no"], "encoder"), ("none", [], "without")):
        _, _, (row,) = evaluate(world, name, "--protocols", "linear", *more, encoder=encoder)
        assert row["tags"]["yaware.readouts"] == ""
        assert not {"readouts", "readouts_sha256"} & set(row["params"])
    assert "readouts are not given" not in capsys.readouterr().out


def test_by_default_readouts_are_given_if_every_checkpoint_has_them(world, capsys):
    _, _, (row,) = evaluate(world, "default", "--protocols", "linear")
    assert (row["tags"]["yaware.readouts"], row["params"]["readouts"]) == ("default", "default")
    assert ProtocolVariant.from_tags(row["tags"]).label == "linear, readouts"
    _, _, rows = evaluate(world, "both", "--protocols", "linear", encoder="encoder+without")
    assert {row["tags"]["yaware.readouts"] for row in rows} == {""}
    printed = capsys.readouterr().out
    assert "evaluate: readouts are not given to the models: " in printed
    assert "it has none; `yaware readouts` fits them" in printed


def test_by_default_checkpoints_with_readouts_of_other_columns_get_none(world, tmp_path, capsys):
    manifest, encoders = Manifest.load(world / "shards"), [Encoder.from_pretrained(world / "encoder") for _ in range(3)]
    columns = dict(encoders[1].need_readouts().readouts)
    columns["tiv"] = replace(columns["age"], name="tiv")
    encoders[1].readouts = replace(encoders[1].need_readouts(), readouts=columns)
    task = load_task("ad", manifest, 2)
    context = EvaluationContext(
        manifest=manifest, tasks=[task], rows=task.rows, settings=EvaluationSettings(("ad",), readouts="auto"),
        cache=tmp_path, storage=tmp_path, uri="", experiment="",
    )  # fmt: skip
    first, more, same = (
        Candidate(name, "y-aware", encoder=encoder) for name, encoder in zip("abc", encoders, strict=True)
    )
    assert decide_readouts(context, [first, same]).settings.readouts != "no"
    assert capsys.readouterr().out == ""
    assert decide_readouts(context, [first, more]).settings.readouts == "no"
    assert (
        "readouts are not given to the models: b: it predicts age, sex, tiv, and a age, sex" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("readouts", "given"), [("auto", [True, False]), ("free", [True, True])])
def test_by_default_multiclass_tasks_get_no_readouts(world, tmp_path, readouts, given):
    manifest, encoder = Manifest.load(world / "shards"), Encoder.from_pretrained(world / "encoder")
    tasks = [load_task(name, manifest, 2) for name in ("ad", "site")]
    context = EvaluationContext(
        manifest=manifest, tasks=tasks, rows=np.unique(np.concatenate([task.rows for task in tasks])),
        settings=EvaluationSettings(("ad", "site"), readouts=readouts), cache=tmp_path, storage=tmp_path, uri="", experiment="",
    )  # fmt: skip
    candidate = Candidate("first", "y-aware", weights="a" * 64, encoder=encoder)
    context = decide_readouts(context, [candidate])
    tables = joint_tables(context, candidate)
    prepared = {name: PreparedTask(table, [], [], 0) for name, table in tables.items()}
    found = add_readouts_to_tasks(context, candidate, prepared)
    assert [found[name].table.readouts is not None for name in ("ad", "site")] == given


def test_by_default_readouts_of_test_participants_are_not_given(world, capsys):
    _, _, (row,) = evaluate(world, "unused", "--protocols", "linear", encoder="other")
    assert row["tags"]["yaware.readouts"] == ""
    assert "readouts are not given to the models: " in (printed := capsys.readouterr().out)
    assert "its readouts were fitted on participants of the test scans" in printed


def test_predicted_proxies_reach_the_model(world, tmp_path):
    """Both evaluations differ only in the readouts, and so do their predictions."""
    predicted = []
    for name, more in (("with", ["--readouts", "free"]), ("no", ["--readouts", "no"])):
        _, uri, (row,) = evaluate(world, name, "--protocols", "linear", *more)
        folder = runs.download(uri, row["run_id"], "evaluation", tmp_path / name)
        predicted.append(pd.read_parquet(folder / "predictions.parquet").set_index("key")["answer"].sort_index())
    assert predicted[0].index.equals(predicted[1].index)
    assert not np.allclose(predicted[0], predicted[1])


@pytest.mark.parametrize(
    ("more", "encoder", "message"),
    [
        (["--readouts", "maybe"], "encoder", "readouts='maybe' is not known; allowed: auto, no, free, penalised"),
        (
            ["--readouts", "free", "--protocols", "knn,voxels"],
            "encoder",
            "readouts=free is not used by knn, voxels; only by paper",
        ),
        (
            ["--readouts", "free"],
            "without",
            "has no readouts (none were fitted); fit them on the scans of its pretraining",
        ),
        (["--readouts", "free"], "other", "its readouts were fitted on participants of the test scans"),
    ],
)
def test_refusals(world, capsys, more, encoder, message):
    status, _, _ = evaluate(world, "refused", *more, encoder=encoder)
    assert status == 2
    assert message in capsys.readouterr().err


def test_readouts_of_other_features_are_one_line(world):
    readouts = Encoder.from_pretrained(world / "encoder").readouts
    with pytest.raises(UserError, match=r"readout age was fitted to 64 features, this encoder gives 5; remove"):
        readouts.predict(np.zeros((2, 5)))
    assert readouts_folder(world / "encoder").is_dir()
