"""Readouts that are calibrated on people whom the encoder has not seen: fits and errors against scikit-learn, files, kills."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from data_pipeline.volume.intensity import zscore
from infra import cli
from infra.errors import UserError
from pretrain.readouts import add
from pretrain.readouts.add import add_readouts
from pretrain.readouts.fit import OwnFeatures, Ranks, fit_group
from pretrain.readouts.solve import FOLDS, GRID
from pretrain.readouts.targets import Target, TargetGroup, deal_folds
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import read_readouts, whose_errors
from pretrain.weights.seen_scans import source_of
from tests.pretrain.readouts.test_readouts import renew_checksums
from tests.pretrain.weights.encoders import write_encoders_of

WIDE = {"layer": None, "pooling": ["mean"]}  # 64 features, more than scans: Samples
NARROW = {"layer": "layer1", "pooling": ["mean"]}  # 8 features: Moments


@pytest.fixture
def encoder(tmp_path, trained):
    """A copy of the encoder."""
    return shutil.copytree(trained, tmp_path / "encoder")


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
    if block["layer"]:
        fitted(encoder, manifest, **block)
    loaded = Encoder.from_pretrained(encoder)
    readout = loaded.readouts.readouts["age"]
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


def test_the_file_and_the_command_say_who_was_calibrated_on(tmp_path, manifest, two_splits, capsys):
    write_encoders_of(manifest, tmp_path / "encoder")
    assert cli.run(["readouts", str(tmp_path / "encoder"), "--shards", str(two_splits), "--columns", "age"]) == 0
    said = "on 54 people of the split monitor whom the encoder has not seen (fitted to 24 people, 24 scans; penalty "
    assert said in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "encoder" / "readouts" / "readouts.json").read_text())["readouts"]
    assert entry["summary"]["calibrated_on"] == {
        "split": "monitor", "people": 54, "scans": 54, "excluded": 0, "seen": False, "reason": "",
    }  # fmt: skip
    sources = Encoder.from_pretrained(tmp_path / "encoder").readouts.fitted_on
    assert [source.role for source in sources] == ["readouts", "calibration"]
    assert sources[1] == source_of(manifest, manifest.rows(split="monitor"), "calibration")


def test_files_of_before_are_read_as_out_of_fold(encoder):
    path = encoder / "readouts" / "readouts.json"
    content = json.loads(path.read_text())
    del content["readouts"][0]["summary"]["calibrated_on"]
    path.write_text(json.dumps(content))
    renew_checksums(path.parent)
    found = read_readouts(encoder, content["weights"])
    assert " out of fold (fitted to 24 people" in found.lines()[0]


def test_none_is_out_of_fold_and_says_why(encoder, manifest):
    (line,) = fitted(encoder, manifest, calibration="none").lines()
    assert "out of fold, of the encoder's own training people (fitted to 24 people, 24 scans; penalty " in line
    assert line.endswith("; the interval may be too narrow: calibration is none")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"split": None, "seen": False}, "out of fold, of people whom the encoder has not seen"),
        ({"split": None, "seen": True}, "out of fold, of the encoder's own training people"),
        ({"split": None, "seen": None}, "out of fold"),
        ({"split": "m", "seen": False}, "on 60 people of the split m whom the encoder has not seen, 2 others left out"),
        ({"split": "m", "seen": None}, "on 60 people of the split m, 2 others left out"),
    ],
)
def test_whose_errors_they_are_is_said_in_words(found, said):
    assert whose_errors({"calibrated_on": {"people": 60, "scans": 61, "excluded": 2, "reason": "", **found}}) == said


def test_the_split_of_the_runs_monitor_is_used(trained, manifest, tmp_path):
    manifest.scans.loc[manifest.rows(split="monitor"), "split"] = "watched"
    encoder = tmp_path / "checkpoints" / "step-00000005" / "encoder"
    shutil.copytree(trained, encoder)
    (tmp_path / "recipe.yaml").write_text("monitor: {split: watched}\n")
    assert "on 54 people of the split watched whom the encoder" in fitted(encoder, manifest).lines()[0]


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


def test_a_killed_fit_is_continued_with_the_same_people(encoder, manifest, monkeypatch):
    expected = Encoder.from_pretrained(encoder).readouts.readouts["age"]
    options = {"batch_size": 8, "workers": 0}
    fit, reads = add.fit_readouts, []
    monkeypatch.setattr("pretrain.weights.scan_source.zscore", lambda voxels: reads.append(1) or zscore(voxels))

    def kill_after_five_batches():
        calls = []

        def beat():
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(add, "fit_readouts", lambda *arguments, **keywords: fit(*arguments, **keywords, beat=beat))
        with pytest.raises(KeyboardInterrupt):
            fitted(encoder, manifest, **options)
        monkeypatch.setattr(add, "fit_readouts", fit)
        reads.clear()

    kill_after_five_batches()
    found = fitted(encoder, manifest, **options).readouts["age"]
    assert len(reads) == 24 + 55 - 5 * 8
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    np.testing.assert_array_equal(found.residuals, expected.residuals)
    # Features of these people are not taken for others.
    kill_after_five_batches()
    fitted(encoder, manifest, calibration="none", **options)
    assert len(reads) == 24
