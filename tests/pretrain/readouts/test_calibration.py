"""Readouts that are calibrated on people whom the encoder has not seen: fits against scikit-learn, who is used, who is not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sklearn.linear_model import Ridge

import yaware
from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from infra.files import sha256_of
from pretrain.readouts import add
from pretrain.readouts.add import add_readouts
from pretrain.readouts.fit import OwnFeatures, Ranks, fit_group
from pretrain.readouts.solve import FOLDS, GRID
from pretrain.readouts.targets import Target, TargetGroup, deal_folds
from pretrain.weights.readouts import read_readouts
from pretrain.weights.seen_scans import source_of
from tests.pretrain.weights.encoders import write_encoders_of, write_small_encoder

WIDE = {"layer": None, "pooling": ["mean"]}  # 64 features, more than scans: Samples
NARROW = {"layer": "layer1", "pooling": ["mean"]}  # 8 features: Moments


@pytest.fixture
def manifest(two_splits):
    """The manifest of 24 people of pretrain, 55 of monitor and 3 of other, whose table a test may change."""
    return Manifest.load(two_splits)


@pytest.fixture
def encoder(tmp_path, manifest):
    """An exported encoder that was trained on the split pretrain."""
    write_encoders_of(manifest, tmp_path / "encoder")
    return tmp_path / "encoder"


def fitted(encoder, manifest, **options):
    return add_readouts(encoder, manifest, replace=True, progress=False, **{"columns": ["age"], **options})


def by_sklearn(x, y, scale, penalty):
    """Return coefficients and intercept of scikit-learn's Ridge on scaled features, for features as they are."""
    mean, deviation = x.mean(0), x.std(0)
    if scale == "all":
        deviation = np.full_like(deviation, np.sqrt(np.square(deviation).mean()))
    deviation = np.where(deviation < 1e-8, 1.0, deviation)
    model = Ridge(alpha=penalty, solver="svd").fit((x - mean) / deviation, y)
    return model.coef_ / deviation, model.intercept_ - mean @ (model.coef_ / deviation)


def naive(x, y, folds, fit):
    """Fit every entry of the grid to the scans ``fit``; choose by the errors of the others, which have folds.

    Returns the entry, coefficients and intercept, and for each fold those that the other folds choose.
    """
    fits = [by_sklearn(x[fit], y[fit], *entry) for entry in GRID]
    squares = [[np.square(x[folds == k] @ w + b - y[folds == k]).sum() for w, b in fits] for k in range(FOLDS)]
    best = int(np.argmin(np.sum(squares, 0)))
    of_folds = [int(np.argmin(np.sum([squares[j] for j in range(FOLDS) if j != k], 0))) for k in range(FOLDS)]
    return best, fits[best], [fits[entry] for entry in of_folds]


def calibrated_data(scans, features):
    """Features and targets of scans to fit to and of 70 scans of 40 people to calibrate on; some unreadable, some unknown."""
    rng = np.random.default_rng(scans)
    count = scans + 70
    x = (rng.normal(size=(count, features)) * 10.0 ** rng.uniform(-1, 1, features) + 5.0).astype(np.float32)
    z = (x - x.mean(0)) / x.std(0)
    y = np.stack([z[:, :4].sum(1), z[:, 0] + 8 * rng.normal(size=count)], axis=1) + 0.2 * rng.normal(size=(count, 2))
    of_calibration = np.arange(count) >= scans
    people = np.where(of_calibration, scans + rng.integers(40, size=count), np.arange(count))
    readable, known = np.ones(count, bool), np.ones(count, bool)
    readable[[2, scans + 5]], known[[7, scans + 9]] = False, False
    x[~readable] = np.nan
    y[~known] = np.nan
    folds = deal_folds(people, known & of_calibration, seed=0)
    group = TargetGroup([Target(f"t{n}", values) for n, values in enumerate(y.T)], known, folds, of_calibration)
    return x, readable, group


@pytest.mark.parametrize(("scans", "features"), [(90, 20), (40, 130)])
def test_fits_and_choices_are_those_of_scikit_learn(scans, features):
    x, readable, group = calibrated_data(scans, features)
    found = fit_group(OwnFeatures(x, readable, Ranks()), group)
    usable = group.has_value & readable
    fit = usable & ~group.calibration
    folds = np.where(usable, group.folds, -1)
    assert set(folds[fit]) == {-1}
    assert found.entries[0] != found.entries[1]
    for target in range(2):
        y = group.targets[target].values
        entry, (w, b), of_folds = naive(x.astype(np.float64), y, folds, fit)
        assert found.entries[target] == entry
        np.testing.assert_allclose(found.coefficients[:, target], w, atol=1e-6 * np.abs(w).max())
        assert found.intercepts[target] == pytest.approx(b, abs=1e-6)
        for fold, (fold_w, fold_b) in enumerate(of_folds):
            np.testing.assert_allclose(
                found.fold_coefficients[fold, :, target], fold_w, atol=1e-6 * np.abs(fold_w).max()
            )
            assert found.fold_intercepts[fold, target] == pytest.approx(fold_b, abs=1e-6)


@pytest.mark.parametrize("block", [WIDE, NARROW])
def test_auto_measures_errors_on_the_monitor_split(encoder, manifest, block):
    """Coefficients, residuals, line and errors against scikit-learn on the features of the scans."""
    readout = fitted(encoder, manifest, **block).readouts["age"]
    loaded = yaware.Encoder.from_pretrained(encoder)
    x = loaded.embed(manifest, progress=False, **block).to_numpy(np.float64)
    ages, subjects = manifest.scans["age"].to_numpy(), manifest.subjects()
    fit, monitor = manifest.rows(split="pretrain"), manifest.rows(split="monitor")
    known = np.isfinite(ages[monitor])
    folds = np.full(len(ages), -1)
    folds[monitor] = deal_folds(subjects[monitor], known, seed=0)
    is_fit = np.isin(np.arange(len(ages)), fit)
    entry, (w, b), of_folds = naive(x, ages, folds, is_fit)
    assert (readout.summary["scale"], readout.summary["penalty"]) == GRID[entry]
    np.testing.assert_allclose(readout.predict(x), x @ w + b, atol=1e-5)
    used = folds >= 0
    predicted = np.array([x[row] @ of_folds[folds[row]][0] + of_folds[folds[row]][1] for row in np.flatnonzero(used)])
    for fold in range(FOLDS):
        expected = np.sort(np.abs(predicted - ages[used])[folds[used] == fold])
        np.testing.assert_allclose(readout.residuals[readout.residual_folds == fold], expected, atol=1e-5)
    slope, offset = np.polyfit(ages[used], predicted, 1)
    assert readout.summary["slope"] == pytest.approx(slope, abs=1e-6)
    assert readout.summary["offset"] == pytest.approx(offset, abs=1e-4)
    assert readout.summary["mae"] == pytest.approx(np.abs(predicted - ages[used]).mean(), abs=1e-5)
    assert (readout.summary["people"], readout.summary["scans"], readout.summary["missing"]) == (24, 24, 0)
    assert readout.errors[0] | {"mae": 0, "bias": 0} == {
        "by": "all", "group": "all", "people": 54, "scans": 54, "mae": 0, "bias": 0,
    }  # fmt: skip


def test_the_file_and_the_command_say_who_was_calibrated_on(encoder, two_splits, manifest, capsys):
    assert cli.run(["readouts", str(encoder), "--shards", str(two_splits), "--columns", "age"]) == 0
    said = "on 54 people of the split monitor whom the encoder has not seen (fitted to 24 people, 24 scans; penalty "
    assert said in capsys.readouterr().out
    (entry,) = json.loads((encoder / "readouts" / "readouts.json").read_text())["readouts"]
    assert entry["summary"]["calibrated_on"] == {
        "split": "monitor", "people": 54, "scans": 54, "excluded": 0, "seen": False, "reason": "",
    }  # fmt: skip
    sources = yaware.Encoder.from_pretrained(encoder).readouts.fitted_on
    assert [source.role for source in sources] == ["readouts", "calibration"]
    assert sources[1] == source_of(manifest, manifest.rows(split="monitor"), "calibration")


def test_files_of_before_are_read_as_out_of_fold(encoder, manifest):
    fitted(encoder, manifest)
    path = encoder / "readouts" / "readouts.json"
    content = json.loads(path.read_text())
    del content["readouts"][0]["summary"]["calibrated_on"]
    path.write_text(json.dumps(content))
    names = ("readouts.safetensors", "readouts.json")
    (path.parent / "checksums.json").write_text(json.dumps({name: sha256_of(path.parent / name) for name in names}))
    found = read_readouts(encoder, content["weights"])
    assert " out of fold (fitted to 24 people" in found.lines()[0]


OWN = "out of fold, of the encoder's own training people (fitted to"
TOO_FEW = "people with a value to calibrate on, fewer than 50"


@pytest.mark.parametrize(
    ("options", "said", "reason"),
    [
        ({"calibration": "none"}, f"{OWN} 24 people, 24 scans; penalty ", "calibration is none"),
        ({"split": ["pretrain", "monitor"]}, f"{OWN} 78 people", f"the split monitor has 0 {TOO_FEW}"),
        ({"query": "key > 'cohort_sub-01'"}, f"{OWN} 21 people", f"the split monitor has 48 {TOO_FEW}"),
        ({"split": ["monitor"]}, "out of fold, of people whom the encoder has not seen (fitted to 54 people", ""),
        (
            {"calibration": "monitor"},
            "on 54 people of the split monitor whom the encoder has not seen (fitted to 24 ",
            "",
        ),
    ],
)
def test_who_is_used_depends_on_the_setting(encoder, manifest, options, said, reason):
    (line,) = fitted(encoder, manifest, **options).lines()
    assert said in line
    assert line.partition("; the interval may be too narrow: ")[2] == reason


def test_out_of_fold_is_the_same_with_and_without_people_to_calibrate_on(encoder, manifest):
    """Too few calibration people leave no trace in the fit."""
    expected = fitted(encoder, manifest, calibration="none")
    manifest.scans.loc[manifest.rows(split="monitor")[31:], "split"] = "other"
    found = fitted(encoder, manifest)
    np.testing.assert_array_equal(found.readouts["age"].coefficients, expected.readouts["age"].coefficients)
    np.testing.assert_array_equal(found.readouts["age"].residuals, expected.readouts["age"].residuals)
    assert [source.role for source in found.fitted_on] == ["readouts"]


def test_an_untrained_encoder_and_one_without_a_record_are_measured_out_of_fold(encoder, manifest):
    config = encoder / "config.json"
    content = json.loads(config.read_text())
    trained = "out of fold, of people whom the encoder has not seen"
    for change, record, said in (
        ({"method": "random"}, True, trained), ({"manifest_digest": "1" * 64}, False, "no record says whom the encoder was"),
        ({}, False, "on 54 people of the split monitor whom the encoder has not seen"),
    ):  # fmt: skip
        config.write_text(json.dumps({**content, **change}))
        names = [path.name for path in encoder.iterdir() if path.is_file() and path.name != "checksums.json"]
        if not record and "seen_scans.json" in names:
            (encoder / "seen_scans.json").unlink()
            names.remove("seen_scans.json")
        (encoder / "checksums.json").write_text(json.dumps({name: sha256_of(encoder / name) for name in names}))
        (line,) = fitted(encoder, manifest, split=["pretrain"]).lines()
        assert said in line


def test_people_with_scans_elsewhere_are_never_calibrated_on(manifest, tmp_path):
    """By name in the training split, by voxels under another name, and, unless the split is named, by name in any split."""
    scans, pretrain, folder = manifest.scans, manifest.rows(split="pretrain"), tmp_path / "encoder"
    monitor = [row for row in manifest.rows(split="monitor") if np.isfinite(scans["age"][row])]
    scans.loc[monitor[6], "participant_id"] = scans["participant_id"][pretrain[0]]
    scans.loc[monitor[7], "voxels_sha256"] = scans["voxels_sha256"][pretrain[1]]
    scans.loc[manifest.rows(split="other")[0], "participant_id"] = scans["participant_id"][monitor[9]]
    write_encoders_of(manifest, folder)
    for calibration, left_out in (("auto", [6, 7, 9]), ("monitor", [6, 7])):
        readouts = fitted(folder, manifest, calibration=calibration)
        count = len(left_out)
        assert (
            f"on {54 - count} people of the split monitor whom the encoder has not seen, {count} others left out ("
            in (readouts.lines()[0])
        )
        used = [row for row in manifest.rows(split="monitor") if row not in [monitor[number] for number in left_out]]
        assert readouts.fitted_on[1] == source_of(manifest, np.array(used), "calibration")


def test_people_of_the_fit_are_not_calibrated_on_if_nothing_is_known_of_the_encoder(manifest, tmp_path):
    scans, monitor = manifest.scans, manifest.rows(split="monitor")
    scans.loc[manifest.rows(split="pretrain")[0], "participant_id"] = scans["participant_id"][monitor[0]]
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    readouts = fitted(tmp_path / "encoder", manifest, columns=["sex"], calibration="monitor")
    assert " on 54 people of the split monitor, 1 others left out (fitted to 24 people" in readouts.lines()[0]


def test_the_splits_of_tests_are_used_only_if_they_are_named(encoder, manifest):
    manifest.scans.loc[manifest.rows(split="monitor"), "split"] = "downstream"
    (line,) = fitted(encoder, manifest).lines()
    assert line.endswith("the interval may be too narrow: the shards have no split monitor")
    assert "on 54 people of the split downstream" in fitted(encoder, manifest, calibration="downstream").lines()[0]
    # Nor if the monitor watched them.
    moved = encoder.parent / "run" / "checkpoints" / "step-00000005" / "encoder"
    shutil.copytree(encoder, moved)
    recipe = moved.parents[2] / "recipe.yaml"
    recipe.write_text("monitor: {split: downstream}\n")
    shutil.rmtree(moved / "readouts")
    (line,) = fitted(moved, manifest).lines()
    assert line.endswith("the monitor's split is downstream, which is for tests")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("monitr", "=monitr is not a split of .*did you mean 'monitor'.*allowed: auto, none, monitor, other, pretrain"),
        ("other", "=other: 3 people of this split are neither fitted to nor trained on, fewer than 20; name a split"),
        ("pretrain", "=pretrain: 0 people of this split are neither fitted to nor trained on"),
    ],
)
def test_a_named_split_that_cannot_be_used_is_one_line(encoder, manifest, calibration, message):
    with pytest.raises(UserError, match=f"calibration{message}"):
        fitted(encoder, manifest, calibration=calibration)
    assert not (encoder / "readouts").exists()


def test_each_column_is_calibrated_if_enough_people_are_known(encoder, manifest):
    """``rare`` is known for 30 people of monitor: out of fold, or, if the split is named, calibrated on these."""
    columns = ["age", "rare", "handed", "sex"]
    readouts = fitted(encoder, manifest, columns=columns)
    assert list(readouts.readouts) == columns
    found = {name: readout.summary["calibrated_on"] for name, readout in readouts.readouts.items()}
    assert {name: (entry["split"], entry["people"]) for name, entry in found.items()} == {
        "age": ("monitor", 54), "rare": (None, 24), "handed": ("monitor", 53), "sex": ("monitor", 55),
    }  # fmt: skip
    assert found["rare"]["reason"] == "the split monitor has 30 people with a value to calibrate on, fewer than 50"
    assert readouts.readouts["handed"].classes == ("left", "right")
    alone = fitted(encoder, manifest, columns=["rare"])
    np.testing.assert_allclose(readouts.readouts["rare"].coefficients, alone.readouts["rare"].coefficients, rtol=1e-4)
    assert alone.readouts["rare"].summary["missing"] == 0
    named = fitted(encoder, manifest, columns=columns, calibration="monitor").readouts["rare"]
    assert named.summary["calibrated_on"]["people"] == 30
    known = [row for row in manifest.rows(split="monitor") if np.isfinite(manifest.scans["rare"][row])]
    manifest.scans.loc[known[15:], "rare"] = np.nan
    left_out = fitted(encoder, manifest, columns=columns, calibration="monitor").left_out
    assert left_out == {"rare": "the split monitor has 15 people with a value to calibrate on, fewer than 20"}


def test_a_killed_fit_is_continued_with_the_same_people(encoder, manifest, monkeypatch):
    options = {"batch_size": 8, "workers": 0}
    expected = fitted(encoder, manifest, **options)
    calls, fit = [], add.fit_readouts

    def killed_after_five_batches(*arguments, **keywords):
        def beat():
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt

        return fit(*arguments, **keywords, beat=beat)

    monkeypatch.setattr(add, "fit_readouts", killed_after_five_batches)
    with pytest.raises(KeyboardInterrupt):
        fitted(encoder, manifest, **options)
    monkeypatch.setattr(add, "fit_readouts", fit)
    reads, zscore = [], add_zscore()
    monkeypatch.setattr("pretrain.weights.scan_source.zscore", lambda voxels: reads.append(1) or zscore(voxels))
    found = fitted(encoder, manifest, **options)
    assert len(reads) == 24 + 55 - 5 * 8
    np.testing.assert_array_equal(found.readouts["age"].coefficients, expected.readouts["age"].coefficients)
    np.testing.assert_array_equal(found.readouts["age"].residuals, expected.readouts["age"].residuals)
    # Features of other people are not taken for these.
    calls.clear()
    monkeypatch.setattr(add, "fit_readouts", killed_after_five_batches)
    with pytest.raises(KeyboardInterrupt):
        fitted(encoder, manifest, **options)
    monkeypatch.setattr(add, "fit_readouts", fit)
    reads.clear()
    fitted(encoder, manifest, calibration="none", **options)
    assert len(reads) == 24


def add_zscore():
    from data_pipeline.volume.intensity import zscore

    return zscore
