"""On whom readouts are calibrated: settings, people whom the fit or the encoder knows, splits of tests, too few people."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from infra.files import sha256_of
from pretrain.readouts.calibration import CalibrationChoice, choose_calibration
from pretrain.readouts.targets import read_targets
from pretrain.weights.encoder import Encoder
from tests.pretrain.weights.encoders import write_encoders_of, write_small_encoder


def chosen(encoder, manifest, name="auto", split=("pretrain",), query=None, monitor="monitor"):
    """Return the calibration of a fit to some scans."""
    rows = manifest.rows(split=list(split), query=query)
    return choose_calibration(Encoder.from_pretrained(encoder), manifest, rows, CalibrationChoice(name, monitor, query))


def people_of(calibration, manifest, column="age"):
    """How many people of a calibration have a value of a column."""
    known = calibration.rows[manifest.scans[column].iloc[calibration.rows].notna().to_numpy()]
    return len(set(manifest.subjects()[known]))


@pytest.mark.parametrize(
    ("options", "split", "people", "seen", "reason"),
    [
        ({}, "monitor", 54, True, ""),
        ({"name": "none"}, "", 0, True, "calibration is none"),
        ({"split": ["monitor"]}, "", 0, False, ""),
        ({"split": ["monitor"], "name": "none"}, "", 0, False, ""),
        ({"split": ["pretrain", "monitor"]}, "monitor", 0, True, ""),
        ({"split": ["other", "pretrain"], "query": "key > 'cohort_sub-01'"}, "monitor", 48, True, ""),
        ({"monitor": "watched"}, "", 0, True, "the shards have no split watched"),
        ({"name": "monitor"}, "monitor", 54, True, ""),
        ({"name": "monitor", "split": ["other"]}, "monitor", 54, False, ""),
    ],
)
def test_who_is_used_depends_on_the_setting_and_on_the_fit(trained, manifest, options, split, people, seen, reason):
    found = chosen(trained, manifest, **options)
    assert (found.split, people_of(found, manifest)) == (split, people)
    assert (found.seen, found.reason) == (seen, reason)


def test_too_few_people_leave_no_trace_in_the_fit(trained, manifest):
    manifest.scans.loc[manifest.rows(split="monitor")[31:], "split"] = "other"
    rows, columns = manifest.rows(split="pretrain"), ["age", "sex"]
    found = read_targets(manifest, rows, columns, calibration=chosen(trained, manifest))
    expected = read_targets(manifest, rows, columns)
    assert not len(found.calibration)
    for one, other in zip(found.groups, expected.groups, strict=True):
        assert one.calibration is None
        np.testing.assert_array_equal(one.folds, other.folds)
        np.testing.assert_array_equal(one.values, other.values)
        assert {target.reason for target in one.targets} <= {
            f"the split monitor has {count} people with a value to calibrate on, fewer than 50" for count in (30, 31)
        }


def test_an_untrained_encoder_and_one_without_a_record_are_measured_out_of_fold(trained, manifest, tmp_path):
    encoder = shutil.copytree(trained, tmp_path / "encoder")
    content = json.loads((encoder / "config.json").read_text())
    for change, record, seen, reason in (
        ({"method": "random"}, True, False, ""),
        ({"manifest_digest": "1" * 64}, False, None, "no record says whom the encoder was trained on"),
        ({}, False, True, ""),  # trained on these shards, which say whom
    ):
        (encoder / "config.json").write_text(json.dumps({**content, **change}))
        if not record:
            (encoder / "seen_scans.json").unlink(missing_ok=True)
        names = [path.name for path in encoder.iterdir() if path.is_file() and path.name != "checksums.json"]
        (encoder / "checksums.json").write_text(json.dumps({name: sha256_of(encoder / name) for name in names}))
        found = chosen(encoder, manifest)
        assert (found.seen, found.reason, found.split) == (seen, reason, "monitor" if seen else "")


def test_people_with_scans_elsewhere_are_never_calibrated_on(manifest, tmp_path):
    """By name in the training split, by voxels under another name, and, unless the split is named, by name in any split."""
    scans, pretrain, monitor = manifest.scans, manifest.rows(split="pretrain"), manifest.rows(split="monitor")
    scans.loc[monitor[6], "participant_id"] = scans["participant_id"][pretrain[0]]
    scans.loc[monitor[7], "voxels_sha256"] = scans["voxels_sha256"][pretrain[1]]
    scans.loc[manifest.rows(split="other")[0], "participant_id"] = scans["participant_id"][monitor[9]]
    write_encoders_of(manifest, tmp_path / "encoder")
    for name, left_out in (("auto", [6, 7, 9]), ("monitor", [6, 7])):
        # Also if the scans of these people are not among those of the fit.
        for query in (None, f"key != {scans['key'][pretrain[0]]!r} and key != {scans['key'][pretrain[1]]!r}"):
            found = chosen(tmp_path / "encoder", manifest, name, query=query)
            np.testing.assert_array_equal(found.rows, np.delete(monitor, left_out))
            assert found.excluded == len(left_out)


def test_people_of_the_fit_are_not_calibrated_on_if_nothing_is_known_of_the_encoder(manifest, tmp_path):
    scans, monitor = manifest.scans, manifest.rows(split="monitor")
    scans.loc[manifest.rows(split="pretrain")[0], "participant_id"] = scans["participant_id"][monitor[0]]
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    found = chosen(tmp_path / "encoder", manifest, "monitor")
    np.testing.assert_array_equal(found.rows, monitor[1:])
    assert (found.excluded, found.seen) == (1, None)


def test_the_splits_of_tests_are_used_only_if_they_are_named(trained, manifest, tmp_path):
    manifest.scans.loc[manifest.rows(split="monitor"), "split"] = "downstream"
    assert chosen(trained, manifest).reason == "the shards have no split monitor"
    assert chosen(trained, manifest, "downstream").split == "downstream"
    assert (
        chosen(trained, manifest, monitor="downstream").reason
        == "the monitor's split is downstream, which is for tests"
    )


def test_each_column_needs_enough_people_of_a_named_split(trained, manifest):
    """``rare`` is known for 30 people of monitor, enough for a split that is named; with 15 it has no readout."""
    columns = ["age", "rare", "handed", "sex"]
    rows, calibration = manifest.rows(split="pretrain"), chosen(trained, manifest, "monitor")
    named = read_targets(manifest, rows, columns, calibration=calibration)
    assert all(group.calibration is not None for group in named.groups)
    assert not named.left_out
    known = [row for row in manifest.rows(split="monitor") if np.isfinite(manifest.scans["rare"][row])]
    manifest.scans.loc[known[15:], "rare"] = np.nan
    assert read_targets(manifest, rows, columns, calibration=calibration).left_out == {
        "rare": "the split monitor has 15 people with a value to calibrate on, fewer than 20"
    }
