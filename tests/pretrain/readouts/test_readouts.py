"""``yaware readouts``, ``embed --readouts`` and their Python calls: files, columns, missing values, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

import yaware
from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from pretrain.readouts import add
from pretrain.readouts.add import add_readouts
from pretrain.weights.readouts import read_readouts
from tests.pretrain.weights.encoders import write_small_encoder


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory, healthy):
    folder = tmp_path_factory.mktemp("fitted") / "encoder"
    write_small_encoder(folder, healthy.grid, modality="vbm")
    add_readouts(folder, healthy, columns=["age", "sex", "handed", "site", "scanner"], progress=False)
    return folder


@pytest.fixture
def fitted(tmp_path, fitted_once):
    """An encoder with readouts in a folder of its own."""
    shutil.copytree(fitted_once, tmp_path / "fitted")
    return yaware.Encoder.from_pretrained(tmp_path / "fitted")


def features_of(encoder, healthy, **options):
    return encoder.embed(healthy, progress=False, **options)


def test_the_command_writes_readouts_that_embed_uses(tmp_path, encoder, healthy, capsys):
    command = ["readouts", str(encoder), "--shards", str(healthy.url), "--columns", "age", "sex"]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    assert "readouts: readout of age: mean absolute error" in printed
    assert "48 people, 96 scans, 4 scans without a value left out" in printed
    assert cli.run(command) == 2
    assert "exists already; replace=True (--replace) fits the readouts again" in capsys.readouterr().err
    assert cli.run([*command, "--replace"]) == 0
    out = tmp_path / "table.tsv"
    assert cli.run(["embed", str(encoder), "--shards", str(healthy.url), "--gap", "--out", str(out)]) == 0
    table = pd.read_csv(out, sep="\t", index_col="key")
    assert table.columns[-5:].tolist() == [
        "predicted_age", "predicted_age_low", "predicted_age_high", "predicted_sex", "gap_age",
    ]  # fmt: skip
    ages = healthy.scans.set_index("key")["age"].loc[table.index]
    assert (table["predicted_age_low"] < table["predicted_age"]).all()
    assert (table["predicted_age"] < table["predicted_age_high"]).all()
    line = yaware.Encoder.from_pretrained(encoder).readouts.readouts["age"].summary
    expected = table["predicted_age"] - (line["slope"] * ages + line["offset"])
    np.testing.assert_allclose(table["gap_age"], expected, atol=1e-3)
    assert ages.isna().sum() == 4
    assert "128 features, predicted_age, predicted_age_low" in capsys.readouterr().out
    assert sorted(path.name for path in encoder.iterdir()) == [
        "README.md", "checksums.json", "config.json", "model.safetensors", "preprocessing.json", "readouts",
    ]  # fmt: skip


def test_a_readout_is_scikit_learns_ridge_on_the_features(fitted, healthy):
    readout = fitted.readouts.readouts["age"]
    ages = healthy.scans["age"].to_numpy()
    features = features_of(fitted, healthy).to_numpy(np.float64)
    known = np.isfinite(ages)
    x = features[known]
    deviation = x.std(0) if readout.summary["scale"] == "each" else np.sqrt(x.var(0).mean())
    deviation = np.where(deviation < 1e-8, 1.0, deviation)
    model = Ridge(alpha=readout.summary["penalty"]).fit((x - x.mean(0)) / deviation, ages[known])
    expected = model.predict((features - x.mean(0)) / deviation)
    np.testing.assert_allclose(readout.predict(features), expected, atol=1e-6 * ages[known].std())


def test_columns_that_cannot_be_predicted_are_named_and_missing_values_are_counted(fitted):
    assert list(fitted.readouts.readouts) == ["age", "sex", "handed"]
    assert fitted.readouts.left_out == {
        "site": "text with 3 values; numbers and texts with two values can be predicted",
        "scanner": "text with 1 values; numbers and texts with two values can be predicted",
    }
    summaries = {name: readout.summary for name, readout in fitted.readouts.readouts.items()}
    assert {name: (found["people"], found["scans"], found["missing"]) for name, found in summaries.items()} == {
        "age": (48, 96, 4), "sex": (50, 100, 0), "handed": (25, 50, 50),
    }  # fmt: skip
    assert fitted.readouts.readouts["sex"].classes == ("F", "M")
    errors = fitted.readouts.errors()
    assert set(errors["by"]) == {"all", "age", "site"}
    of_age = errors[errors["readout"] == "age"]
    assert of_age[of_age["by"] == "site"]["group"].tolist() == ["site0", "site1", "site2"]
    assert of_age[of_age["by"] == "site"]["scans"].sum() == 96
    assert of_age["people"].min() >= 5


def test_people_are_never_in_two_folds_and_residuals_are_those_of_held_out_people(fitted, healthy):
    """Each residual is the error of a fit to the other folds, and both scans of a person belong to one fold."""
    readout, features = fitted.readouts.readouts["sex"], features_of(fitted, healthy).to_numpy(np.float64)
    true = (healthy.scans["sex"] == "M").to_numpy(float)
    errors = np.abs(features @ readout.fold_coefficients.T + readout.fold_intercepts - true[:, None])
    people = healthy.subjects()
    fold_of_person = {}
    for fold in range(5):
        held_out = readout.residuals[readout.residual_folds == fold]
        assert len(held_out) == 20
        for residual in held_out:
            (row,) = np.flatnonzero(np.abs(errors[:, fold] - residual) < 1e-6)
            fold_of_person.setdefault(people[row], set()).add(fold)
    assert len(fold_of_person) == 50
    assert all(len(folds) == 1 for folds in fold_of_person.values())
    assert set(readout.residual_weights) == {0.5}


def test_embed_adds_columns_without_changing_the_features(tmp_path, fitted, healthy):
    plain, added = features_of(fitted, healthy), features_of(fitted, healthy, readouts=True)
    pd.testing.assert_frame_equal(added[plain.columns], plain)
    columns = added.columns[len(plain.columns) :].tolist()
    assert columns == [
        "predicted_age", "predicted_age_low", "predicted_age_high", "predicted_sex", "predicted_handed",
    ]  # fmt: skip
    expected = fitted.readouts.table(plain.to_numpy())
    np.testing.assert_allclose(added[columns].to_numpy(), expected.to_numpy(), rtol=1e-5)
    # Features of another block beside the readouts, which read the encoder's end.
    block = features_of(fitted, healthy, layer="layer1", readouts=True)
    np.testing.assert_allclose(block[columns].to_numpy(), added[columns].to_numpy(), rtol=1e-5)
    assert block.shape[1] == 16 + len(columns)


def test_readouts_of_a_block_read_that_block(encoder, healthy):
    add_readouts(encoder, healthy, columns=["age"], layer="layer2", pooling=["mean", "std"], progress=False)
    loaded = yaware.Encoder.from_pretrained(encoder)
    table = features_of(loaded, healthy, readouts=True)
    block = features_of(loaded, healthy, layer="layer2", pooling=["mean", "std"])
    expected = loaded.readouts.readouts["age"].predict(block.to_numpy())
    np.testing.assert_allclose(table["predicted_age"], expected, rtol=1e-5)


def test_exports_take_the_readouts_along_and_older_ones_have_none(tmp_path, encoder, healthy):
    assert yaware.Encoder.from_pretrained(yaware.export(encoder, tmp_path / "old")).readouts is None
    with pytest.raises(UserError, match="has no readouts .none were fitted.; fit them"):
        yaware.embed(tmp_path / "old", healthy, readouts=True, progress=False)
    checkpoint = tmp_path / "step-00000005"
    shutil.copytree(encoder, checkpoint / "encoder")
    (checkpoint / "state.json").write_text("{}")
    add_readouts(checkpoint, healthy, columns=["age"], progress=False)
    assert (checkpoint / "readouts" / "readouts.json").is_file()
    assert not (checkpoint / "encoder" / "readouts").exists()
    exported = yaware.Encoder.from_pretrained(yaware.export(checkpoint, tmp_path / "new"))
    again = yaware.Encoder.from_pretrained(yaware.export(tmp_path / "new", tmp_path / "again"))
    for one in (exported, again):
        assert one.readouts.readouts["age"].summary["people"] == 48


@pytest.mark.parametrize("column", [["nonsense"], ["scanner"]])
def test_a_column_without_a_readout_is_one_line(encoder, healthy, column):
    with pytest.raises(UserError, match=r"nonsense.*its columns|no readout of scanner: text with 1 values"):
        add_readouts(encoder, healthy, columns=column, progress=False)
    assert not (encoder / "readouts").exists()


def test_a_killed_fit_is_continued_and_gives_the_same_readouts(tmp_path, encoder, healthy, monkeypatch):
    options = {"columns": ["age", "sex"], "progress": False, "batch_size": 16, "workers": 0}
    expected = add_readouts(encoder, healthy, **options)
    calls, fit = [], add.fit_readouts

    def killed_after_three_batches(*arguments, **keywords):
        def beat():
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        return fit(*arguments, **keywords, beat=beat)

    monkeypatch.setattr(add, "fit_readouts", killed_after_three_batches)
    with pytest.raises(KeyboardInterrupt):
        add_readouts(encoder, healthy, replace=True, **options)
    (store,) = (encoder / ".readouts-unfinished").glob("*.f32")
    assert store.stat().st_size == 3 * 16 * 128 * 4
    with store.open("ab") as stream:  # a batch that was being written
        stream.write(b"\0" * 100)
    monkeypatch.setattr(add, "fit_readouts", fit)
    reads = []
    monkeypatch.setattr("pretrain.weights.scan_source.zscore", lambda voxels: reads.append(1) or zscore(voxels))
    found = add_readouts(encoder, healthy, replace=True, **options)
    assert len(reads) == 100 - 48
    for name, readout in expected.readouts.items():
        np.testing.assert_array_equal(found.readouts[name].coefficients, readout.coefficients)
        np.testing.assert_array_equal(found.readouts[name].residuals, readout.residuals)
    assert not (encoder / ".readouts-unfinished").exists()


def zscore(voxels):
    from data_pipeline.volume.intensity import zscore as original

    return original(voxels)


def test_unreadable_scans_are_left_out_and_counted(tmp_path, encoder, healthy):
    shutil.copytree(healthy.url, tmp_path / "shards")
    scan = healthy.scans.iloc[0]
    tar = sorted((tmp_path / "shards").rglob("*.tar"))[int(scan["shard"])]
    content = bytearray(tar.read_bytes())
    content[int(scan["offset"]) : int(scan["offset"]) + 40] = b"\xff" * 40
    tar.write_bytes(content)
    found = add_readouts(encoder, Manifest.load(tmp_path / "shards"), columns=["sex"], progress=False, batch_size=4)
    assert found.readouts["sex"].summary["unreadable"] == 1
    assert found.readouts["sex"].summary["scans"] == 99
    assert sorted(set(found.readouts["sex"].residual_weights)) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(weights="0" * 64), "fitted to other weights"),
        (
            lambda content: content["readouts"][0].update(intercept="3"),
            r"readouts.0.intercept='3': Input should be a valid number",
        ),
        (lambda content: content["readouts"][0]["summary"].pop("slope"), "allowed: two classes, or none with a slope"),
        (lambda content: content["readouts"].append(content["readouts"][0]), "allowed: one readout of each name"),
        (lambda content: content.update(readouts="all"), "readouts='all': Input should be a valid list"),
    ],
)
def test_impossible_files_are_one_line(fitted, change, message):
    folder = fitted.folder / "readouts"
    content = json.loads((folder / "readouts.json").read_text())
    change(content)
    (folder / "readouts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="differs from checksums.json; remove that folder"):
        yaware.Encoder.from_pretrained(fitted.folder)
    renew_checksums(folder)
    with pytest.raises(UserError, match=message) as caught:
        yaware.Encoder.from_pretrained(fitted.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "coefficients",
            lambda values: values[:-1],
            r"coefficients has type float64 and shape \(127,\), expected float64 and \(128,\)",
        ),
        ("residuals", lambda values: values * np.nan, "residuals holds values that are not finite"),
        ("residual_folds", lambda values: values + 1, "residual_folds holds a fold that does not exist"),
        ("residual_weights", lambda values: -values, "residual_weights holds a weight that is not positive"),
        ("fold_coefficients", lambda values: values.astype(np.float32), "fold_coefficients has type float32"),
    ],
)
def test_impossible_numbers_are_one_line(fitted, name, change, message):
    from safetensors.numpy import load_file, save_file

    folder = fitted.folder / "readouts"
    tensors = load_file(folder / "readouts.safetensors")
    tensors[f"0.{name}"] = np.ascontiguousarray(change(tensors[f"0.{name}"]))
    save_file(tensors, folder / "readouts.safetensors")
    renew_checksums(folder)
    with pytest.raises(UserError, match=message):
        read_readouts(fitted.folder, fitted.readouts.weights)


def renew_checksums(folder):
    from infra.files import sha256_of

    names = ("readouts.safetensors", "readouts.json")
    (folder / "checksums.json").write_text(json.dumps({name: sha256_of(folder / name) for name in names}))
