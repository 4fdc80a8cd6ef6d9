"""From shards of travelling heads to the page by the real command: encoders, tables, predicted ages and voxels."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import yaware
from data_pipeline.shards.build import build_shards
from data_pipeline.simulation.cohort import simulate_cohort
from data_pipeline.storage.manifest import Manifest
from evaluation.retest.candidates import block_of
from evaluation.retest.design import Block, Design, design_of
from evaluation.retest.measure import Measured, ageing, components_of, measure, standardised
from infra import cli
from infra.errors import UserError
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of
from tests.pretrain.weights.encoders import write_encoders_of
from tests.stores import store_at

OTHERS = 'split == "downstream"'


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    cohort = simulate_cohort(
        root / "cohort", participants=12, travelling=12, scanners=3, repeats=2, spacing=12.0, workers=1, shares={}
    )
    build_shards(cohort, root / "shards", splits={"pretrain": 0.3, "downstream": 0.7})
    truth = pd.read_csv(cohort / "truth.tsv", sep="\t")
    return root / "shards", truth


@pytest.fixture(scope="module")
def tables(shards, tmp_path_factory):
    """The true grey matter with another feature, and predicted ages with an error of 2 years."""
    folder, (root, truth) = tmp_path_factory.mktemp("tables"), shards
    scans = Manifest.load(root).scans
    noise = np.random.default_rng(0).normal(size=(len(scans), 2))
    names = {"participant_id": truth["participant_id"], "session_id": truth["session_id"]}
    pd.DataFrame({**names, "grey_matter_ml": truth["grey_matter_ml"]}).to_csv(folder / "truth.csv", index=False)
    pd.DataFrame({"key": scans["key"], "predicted_age": scans["age"] + 2 * noise[:, 0]}).to_csv(
        folder / "ages.csv", index=False
    )
    return folder


@pytest.mark.jobs  # 10 CPU seconds
def test_the_command_measures_all_kinds_writes_the_page_and_logs_a_run_each(shards, tables, tmp_path, capsys):
    root, uri = shards[0], store_at(tmp_path / "mlflow.db")
    write_encoders_of(Manifest.load(root), tmp_path / "encoder", run_name="trained", step=7)
    command = ["reliability", str(tmp_path / "encoder"), "--shards", str(root), "--query", OTHERS, "--voxels", "--features",
               str(tables / "truth.csv"), "--features", str(tables / "ages.csv"), "--tracking-uri", uri,
               "--cache", str(tmp_path), "--out", str(tmp_path / "r.html")]  # fmt: skip
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    assert "people who were scanned more than once" in printed
    summary = pd.read_csv(tmp_path / "r_summary.csv").set_index("checkpoint")
    assert list(summary.index) == ["trained", "truth", "ages", "voxels"]
    assert summary.loc["truth", "scanners.icc21"] == pytest.approx(1.0)  # one brain for all scans of a person
    assert summary.loc["truth", "identification"] == 1.0
    assert 0.5 < summary.loc["voxels", "identification"] <= 1.0
    assert summary["identification.chance"].dropna().to_numpy() == pytest.approx(1 / summary["people"].iloc[0])
    assert np.isnan(summary.loc["ages", "identification"])  # predictions only
    assert summary.loc["ages", "scanners.sd.age"] == pytest.approx(2.0, rel=0.35)
    assert summary.loc["ages", "scanners.icc21.age"] > 0.9
    icc = pd.read_csv(tmp_path / "r_icc.csv")
    known = icc[icc["icc21_low"].notna()]  # a feature that varies in one person only has no interval
    assert len(known) > len(icc) / 2
    assert (known["icc21_low"] <= known["icc21"] + 1e-9).all()
    assert set(icc["kind"]) == {"feature", "component", "prediction"}
    page = (tmp_path / "r.html").read_text()
    assert "Simulated data" in page
    assert "Retest error" in page
    assert (tmp_path / "r.png").stat().st_size > 5000
    assert "\\toprule" in (tmp_path / "r.tex").read_text()
    logged = runs.runs(uri, "yaware", "reliability")
    assert {run["name"] for run in logged} == {f"reliability of {n} step {s}" for n, s in
                                               (("trained", 7), ("truth", 0), ("ages", 0), ("voxels", 0))}  # fmt: skip
    by_name = {run["tags"]["yaware.run_name"]: run for run in logged}
    assert by_name["truth"]["metrics"]["scanners.icc21"] == pytest.approx(1.0)
    assert by_name["trained"]["status"] == "FINISHED"
    artifact = runs.download(uri, by_name["trained"]["run_id"], "reliability", tmp_path / "copy")
    assert (pd.read_csv(artifact / "icc.csv")["kind"] == "feature").any()


def test_an_encoder_is_not_measured_on_people_of_its_training(shards, tmp_path):
    root = shards[0]
    write_encoders_of(Manifest.load(root), tmp_path / "encoder", run_name="trained", step=7)
    with pytest.raises(UserError, match="pretrained on participants of the test scans"):
        yaware.reliability(tmp_path / "encoder", root, cache=tmp_path, tracking_uri=store_at(tmp_path / "m.db"))


@pytest.mark.parametrize("by", ["table", "encoder", "voxels"])
def test_features_of_others_are_not_measured_on_people_in_the_file_of_digests(shards, tables, tmp_path, capsys, by):
    root, manifest = str(shards[0]), Manifest.load(shards[0])
    digests = tmp_path / "digests.json"
    assert cli.run(["digests", root, "--split", "pretrain", "--out", str(digests)]) == 0
    content = json.loads(digests.read_text())
    if by == "voxels":  # under other names
        content["sources"][0]["participants"] = ["0" * 64]
        digests.write_text(json.dumps(content))
    source = ["--features", str(tables / "ages.csv")]
    if by == "encoder":
        source = [
            "--encoder",
            "tests.evaluation.external.adapter:blurred",
            "--cohort",
            str(shards[0].parent / "cohort"),
        ]
    command = ["reliability", "--shards", root, *source, "--seen", str(digests), "--cache", str(tmp_path),
               "--tracking-uri", store_at(tmp_path / "m.db"), "--out", str(tmp_path / "r.html")]  # fmt: skip
    assert cli.run(command) == 2
    error = capsys.readouterr().err
    person = sorted(manifest.scans["participant_id"][manifest.rows(split=["pretrain"])])[0]
    assert re.search(
        "pretrained(, under another name,)? on (participants of the test scans|voxels of the test part)", error
    )
    assert person in error
    assert not (tmp_path / "r.html").exists()
    assert client_of(store_at(tmp_path / "m.db")).get_experiment_by_name("yaware") is None


def test_features_of_others_are_measured_on_people_who_are_not_in_the_file_of_digests(shards, tables, tmp_path, capsys):
    root, uri, digests = str(shards[0]), store_at(tmp_path / "m.db"), tmp_path / "digests.json"
    assert cli.run(["digests", root, "--split", "pretrain", "--out", str(digests)]) == 0
    given = {"query": OTHERS, "cache": tmp_path, "tracking_uri": uri, "features": {"ages": tables / "ages.csv"}}
    found = yaware.reliability(None, root, seen=digests, **given)
    assert "not known whether trained" not in capsys.readouterr().out
    assert not [line for line in found.about if "not known" in line]
    (run,) = runs.runs(uri, "yaware", "reliability")
    assert run["tags"]["yaware.leakage.checked"] == "participants, voxels"
    unknown = yaware.reliability(None, root, **given)
    assert "reliability: not known whether trained on these people: ages; " in capsys.readouterr().out
    assert [line for line in unknown.about if "not known" in line]
    assert runs.runs(uri, "yaware", "reliability")[0]["tags"]["yaware.leakage.checked"] == "nothing"
    pd.testing.assert_frame_equal(found.icc, unknown.icc)


def test_tables_without_rows_are_no_files(tmp_path):
    summary = pd.DataFrame([{"checkpoint": "a", "step": 0, "repeats.icc21": 0.5}])
    icc = pd.DataFrame([{"checkpoint": "a", "step": 0, "compared": "repeats", "kind": "feature", "name": "f", "icc21": 0.5,
                         "icc31": 0.5}])  # fmt: skip
    nothing = pd.DataFrame({"checkpoint": [], "step": [], "compared": [], "kind": [], "name": []})
    tables = {"summary": summary, "icc": icc, "retest": nothing, "shares": nothing}
    (tmp_path / "r_retest.csv").write_text("of an earlier page")
    written = yaware.Reliability(**tables, simulated=False, about=[]).report(tmp_path / "r.html")
    assert {path.name for path in written} == {"r.html", "r_summary.csv", "r_icc.csv", "r.tex", "r.png"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}


def test_digests_are_about_features_of_others(shards, tmp_path):
    with pytest.raises(UserError, match="is about encoders of others; give features or an encoder with it"):
        yaware.reliability(None, shards[0], voxels=True, seen=tmp_path / "digests.json", cache=tmp_path)


def test_wrong_arguments_are_one_line_and_write_nothing(shards, tables, tmp_path, capsys):
    root = str(shards[0])
    assert cli.run(["reliability", "--shards", root]) == 2
    assert "there is nothing to measure" in capsys.readouterr().err
    half = pd.read_csv(tables / "ages.csv").iloc[::2]
    half.to_csv(tmp_path / "half.csv", index=False)
    command = ["reliability", "--shards", root, "--cache", str(tmp_path), "--out", str(tmp_path / "r.html")]
    assert cli.run([*command, "--features", str(tmp_path / "half.csv")]) == 2
    assert (
        "half.csv has no features of 36 of the 72 scans of people who were scanned more than once"
        in capsys.readouterr().err
    )
    assert cli.run([*command, "--voxels", "--features", str(tables / "ages.csv"), "--name", "a", "--name", "b"]) == 2
    assert "--name is given 2 times and --features 1 times" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    assert cli.run(["reliability", "--shards", str(tmp_path / "nothing"), "--out", str(tmp_path / "r.pdf")]) == 2
    assert "r.pdf is a page of HTML; give a name that ends in .html" in capsys.readouterr().err  # before any work


def test_two_encoders_of_one_name_and_step_are_refused(shards, tmp_path):
    for folder in ("one", "two"):
        write_encoders_of(Manifest.load(shards[0]), tmp_path / folder, run_name="trained", step=7)
    paths = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(UserError, match="two candidates are 'trained' of step 7, and the tables would mix them"):
        yaware.reliability(paths, shards[0], query=OTHERS, cache=tmp_path, tracking_uri=store_at(tmp_path / "m.db"))


@pytest.mark.parametrize(
    ("encoder", "block", "pooling", "logged"),
    [
        (object(), None, ("mean",), ("", "")),
        (object(), None, ("max",), ("end", "max")),
        (object(), "layer3", ("mean", "std"), ("layer3", "mean,std")),
        (None, "layer3", ("mean",), ("", "")),
    ],
)
def test_the_measured_block_is_named_as_evaluations_name_it(encoder, block, pooling, logged):
    settings = SimpleNamespace(block=block, pooling=pooling)
    assert block_of(SimpleNamespace(encoder=encoder), SimpleNamespace(settings=settings)) == logged


def test_age_errors_leave_out_true_ageing_and_a_constant_feature_has_no_correlation(shards):
    design = design_of(Manifest.load(shards[0]))
    ageing = design.ages + np.arange(len(design.rows)) % 5
    older = type(design)(**{**vars(design), "ages": ageing})
    features = np.random.default_rng(0).normal(size=(len(design.rows), 3))
    features[:, 1] = 4.0
    found = measure(Measured(features, ["a", "b", "c"], {"age": ageing + 1.0, "sex": ageing}), older)
    retest = found.retest.set_index(["compared", "name"])
    assert retest.loc[("scanners", "age"), "sd"] == pytest.approx(0.0, abs=1e-6)
    assert retest.loc[("scanners", "sex"), "sd"] > 1.0
    assert list(retest["unit"].unique()) == ["years", ""]
    rows = found.icc[found.icc["kind"] == "feature"].set_index("name")
    assert rows.loc["b", "icc21"].isna().all()
    assert rows.loc["a", "icc21"].notna().all()


def pairs_of_scans(scanners, ages):
    """Eight people with two scans each, compared as repeats."""
    return Design(
        rows=np.arange(16), people=np.arange(16) // 2, scanners=scanners, sessions=np.arange(16), ages=ages,
        scanner_names=["a", "b"], blocks={"repeats": [Block(np.arange(8), np.arange(16).reshape(8, 2))]}, notes=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "people", "line"),
    [
        (0, 8, "predicted ages: true ageing between scans is subtracted"),
        (1, 7, "predicted ages: true ageing between scans is subtracted; 1 of 8 people, who have a scan without an age, are "
               "left out"),
        (4, 8, "predicted ages: true ageing between scans is not subtracted, because 4 of 8 people have a scan without an age"),
    ],
)  # fmt: skip
def test_people_without_an_age_are_left_out_of_the_age_error(missing, people, line):
    ages = np.arange(16.0) * 3
    errors = np.random.default_rng(0).normal(size=16)
    predicted = ages + errors
    ages[1 : 2 * missing : 2] = np.nan  # the second scans of the first people
    design = pairs_of_scans(np.zeros(16, dtype=np.int64), ages)
    found = measure(Measured(np.empty((16, 0)), [], {"age": predicted}), design).retest
    expected = (errors if people == 7 or not missing else predicted).reshape(8, 2)[8 - people :]
    assert found["sd"].item() == pytest.approx(np.sqrt(expected.var(1, ddof=1).mean()))
    assert ageing(design) == line


def test_people_are_identified_among_all_scans_if_one_person_alone_has_two_scanners():
    scanners = np.zeros(16, dtype=np.int64)
    scanners[1] = 1
    design = pairs_of_scans(scanners, np.full(16, 40.0))
    found = measure(Measured(np.eye(8)[design.people], [f"f{n}" for n in range(8)], {}), design).summary
    assert (found["identification"], found["identification.scans"]) == (1.0, 16)
    assert found["identification.chance"] == pytest.approx(1 / 15)


def test_components_are_the_scans_on_the_axes_of_largest_variance():
    values = standardised(np.random.default_rng(1).normal(size=(30, 5)) @ np.diag([5.0, 4, 3, 2, 1]) + 7)
    found = components_of(values, 5)
    np.testing.assert_allclose(found @ found.T, values @ values.T, atol=1e-9)
    assert (np.diff(found.var(0)) <= 1e-9).all()
    assert components_of(np.zeros((4, 3))).shape == (4, 0)
