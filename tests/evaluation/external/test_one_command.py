"""One command judges a checkpoint, an untrained network, imported weights, tables and an encoder of others, and voxels.

One report compares them all.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import evaluation
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from evaluation.tasks.tasks import load_task
from infra import cli
from infra.errors import UserError
from infra.tracking import runs
from pretrain.weights.encoder import Encoder
from tests.cohorts import write_cohort
from tests.pretrain.weights.encoders import write_encoders_of
from tests.pretrain.weights.test_layouts import medicalnet_file
from tests.stores import store_at

pytestmark = pytest.mark.jobs  # two evaluations and a report: 30 CPU seconds

OPTIONS = {"width": 0.125, "norm": "group"}
SMALL = {"folds": 3, "draws": 2, "n_train": (8,), "workers": 1, "repeats": 1, "halvings": 5}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort") / "tiny", participants=45)


@pytest.fixture(scope="module")
def shards(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "tiny"
    build_shards(cohort, out, splits={"pretrain": 0.2, "downstream": 0.8})
    return out


@pytest.fixture(scope="module")
def encoders(shards, tmp_path_factory):
    """A checkpoint, an untrained network, and an import from a file of MedicalNet's layout with random tensors."""
    root, manifest = tmp_path_factory.mktemp("exports"), Manifest.load(shards)
    write_encoders_of(manifest, root / "trained", run_name="trained", step=7)
    write_encoders_of(manifest, root / "untrained", seed=1, run_name="untrained", method="random", step=0)
    torch.save(medicalnet_file(10)[0], root / "imported.pth")
    command = ["import-weights", str(root / "imported.pth"), "--arch", "resnet10-medicalnet", "--grid", str(shards)]
    assert cli.run([*command, "--out", str(root / "imported")]) == 0
    return {name: root / name for name in ("trained", "untrained", "imported")}


@pytest.fixture(scope="module")
def freesurfer(shards, tmp_path_factory):
    """Two tables as aparcstats2table and asegstats2table write them, with an effect of age."""
    folder, scans = tmp_path_factory.mktemp("freesurfer"), Manifest.load(shards).scans
    noise = np.random.default_rng(1).normal(size=(len(scans), 3))
    for name, first, column in (("lh.txt", "lh.aparc.thickness", 0), ("aseg.txt", "Measure:volume", 1)):
        values = 3 - scans["age"] / 60 + 0.1 * noise[:, column]
        table = pd.DataFrame({
            first: "sub-" + scans["participant_id"], f"region{column}": values, "eTIV": 1.5e6 + 1e5 * noise[:, 2]
        })  # fmt: skip
        table.to_csv(folder / name, sep="\t", index=False)
    return [str(folder / "lh.txt"), str(folder / "aseg.txt")]


@pytest.fixture(scope="module")
def judged(cohort, shards, encoders, freesurfer, tmp_path_factory):
    """The store after one command: three encoders, a table, an adapter, voxels."""
    root = tmp_path_factory.mktemp("judged")
    uri = store_at(root / "mlflow.db")
    command = ["evaluate", *map(str, encoders.values()), "--features", *freesurfer, "--name", "FreeSurfer"]
    command += ["--encoder", "tests.evaluation.external.adapter:blurred", "--cohort", str(cohort)]
    command += ["--shards", str(shards), "--tasks", "ad,age", "--protocols", "paper,voxels"]
    command += ["--folds", "3", "--n-train", "8", "--draws", "2", "--repeats", "1", "--halvings", "5", "--workers", "1"]
    assert cli.run([*command, "--experiment", "referee", "--tracking-uri", uri, "--storage", str(root / "work")]) == 0
    return root, uri


NAMES = ["trained", "untrained", "imported", "FreeSurfer", "blurred", "voxels"]


def test_all_candidates_have_the_same_scans_folds_and_draws(judged):
    _, uri = judged
    comparison = evaluation.compare("referee", tracking_uri=uri)
    assert sorted(each.run["tags"]["yaware.run_name"] for each in comparison.evaluations) == sorted(NAMES)
    tables = [each.predictions.set_index(["task", "key"]).sort_index() for each in comparison.evaluations]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table[["label", "fold"]], tables[0][["label", "fold"]])
    curves = [each.curve[["task", "n_train", "draw"]] for each in comparison.evaluations]
    assert len(curves[0])
    assert all(curve.equals(curves[0]) for curve in curves)


def test_one_report_has_paired_differences_among_all(judged, capsys):
    root, uri = judged
    out = root / "report.html"
    assert cli.run(["compare", "--experiment", "referee", "--tracking-uri", uri, "--out", str(out)]) == 0
    differences = pd.read_csv(root / "report_differences.csv")
    named = evaluation.compare("referee", tracking_uri=uri)
    name_of = {each.name: each.run["tags"]["yaware.run_name"] for each in named.evaluations}
    for task in ("ad", "age"):
        rows = differences[differences["task"] == task]
        found = {frozenset((name_of[row.first], name_of[row.second])) for row in rows.itertuples()}
        assert found == {frozenset(pair) for pair in itertools.combinations(NAMES, 2)}
    assert set(differences["test"]) == {"halves"}
    assert differences[["low", "high", "p"]].notna().all(axis=None)
    page = out.read_text()
    assert all(name in page for name in NAMES)
    assert not named.unpaired


def test_the_runs_of_a_table_and_an_adapter_say_where_their_features_come_from(judged):
    _, uri = judged
    by_name = {run["tags"]["yaware.run_name"]: run for run in runs.runs(uri, "referee", "evaluation")}
    table, adapter, alone = by_name["FreeSurfer"], by_name["blurred"], by_name["trained"]
    assert table["params"]["features"] == "lh.txt, aseg.txt"
    assert adapter["params"]["features"] == "tests.evaluation.external.adapter:blurred"
    assert [run["tags"]["yaware.evaluates"] for run in (table, adapter, alone)] == ["table", "adapter", "checkpoint"]
    assert table["tags"]["yaware.leakage.checked"] == adapter["tags"]["yaware.leakage.checked"] == "nothing"
    digests = [run["tags"]["yaware.weights_sha256"] for run in (table, adapter, alone)]
    assert len(set(digests)) == 3
    assert min(map(len, digests)) == 64
    assert "features" not in alone["params"]


def test_a_table_that_knows_the_age_predicts_it_alone_and_beside_an_encoder(shards, encoders, freesurfer, tmp_path):
    given = {"tasks": "age", "tracking_uri": store_at(tmp_path / "mlflow.db"), "storage": tmp_path / "work"}
    results = evaluation.evaluate(
        encoders["trained"], shards, features=freesurfer, name="FreeSurfer", join=True, experiment="join", **given,
        **{**SMALL, "halvings": 0},
    )  # fmt: skip
    errors = results[results["metric"] == "mae"].set_index("checkpoint")["value"]
    assert list(errors.index) == ["trained", "FreeSurfer", "trained + FreeSurfer"]
    assert errors["FreeSurfer"] < 6  # years; noise of 0.1 in a slope of 1/60 is 6 years, of two regions 4
    assert errors["trained + FreeSurfer"] < 0.8 * errors["trained"]
    by_name = {run["tags"]["yaware.run_name"]: run for run in runs.runs(given["tracking_uri"], "join", "evaluation")}
    beside = by_name["trained + FreeSurfer"]
    assert beside["params"]["features_sha256"] == by_name["FreeSurfer"]["params"]["features_sha256"]
    digests = {run["tags"]["yaware.weights_sha256"] for run in by_name.values()}
    assert len(digests) == 3


def test_an_encoders_features_as_a_table_give_its_own_results(shards, encoders, tmp_path):
    """The naive twin: features that `embed` writes go the same way as the checkpoint's own."""
    manifest = Manifest.load(shards)
    table = Encoder.from_pretrained(encoders["trained"]).embed(manifest)
    table.to_parquet(tmp_path / "features.parquet")
    given = {
        "tasks": ["ad", "age", "site"],
        "protocols": ["paper"],
        "layer": "own",
        "storage": tmp_path / "work",
    }
    results = evaluation.evaluate(
        encoders["trained"], shards, features=tmp_path / "features.parquet", name="table", readouts="no",
        tracking_uri=store_at(tmp_path / "mlflow.db"), experiment="twin", **SMALL, **given,
    )  # fmt: skip
    columns = ["protocol", "task", "metric", "value", "low", "high"]
    own, twin = (
        results[results["checkpoint"] == name][columns].reset_index(drop=True) for name in ("trained", "table")
    )
    pd.testing.assert_frame_equal(own, twin, rtol=1e-6)


def test_common_scans_restricts_every_candidate_and_says_so(shards, encoders, tmp_path, capsys):
    manifest = Manifest.load(shards)
    keys = manifest.scans["key"].iloc[load_task("age", manifest, 3).rows].tolist()
    frame = pd.DataFrame({"key": [*keys[4:], "elsewhere"], "x": np.arange(len(keys) - 3) % 7})
    given = {"tasks": "age", "tracking_uri": store_at(tmp_path / "mlflow.db"), "storage": tmp_path / "work"}
    given |= {"experiment": "common", **SMALL}
    with pytest.raises(UserError, match="row [0-9]+: key 'elsewhere' is no scan of the shards"):
        evaluation.evaluate(encoders["trained"], shards, features={"short": frame}, **given)
    lacking = f"4 of the {len(keys)} scans of the tasks"
    with pytest.raises(UserError, match=f"short: the DataFrame has no features of {lacking}"):
        evaluation.evaluate(encoders["trained"], shards, features={"short": frame.iloc[:-1]}, **given)
    results = evaluation.evaluate(encoders["trained"], shards, features={"short": frame}, common_scans=True, **given)
    out = capsys.readouterr().out
    assert "1 rows of the DataFrame are no scans of the shards" in out
    assert f"{lacking} have no features in some table" in out
    assert set(results["checkpoint"]) == {"trained", "short"}
    for each in evaluation.compare("common", tracking_uri=given["tracking_uri"]).evaluations:
        assert set(each.predictions["key"]) == set(keys[4:])
