"""Planted faults: each is excluded by its rule with the measured value, and the remaining shards are a valid data set."""

from __future__ import annotations

import hashlib
import io
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cohort.scan import Scan
from data_pipeline.quality.rules import (
    Limits,
    Outlier,
    Quality,
    Removal,
    coarse_volume,
    load_quality,
    read_quarantine,
    read_scan,
    write_quarantine,
)
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.purge import rewrite_shard
from data_pipeline.shards.tar import copy_without, encode, write_shard
from data_pipeline.shards.verify import find_problems
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import Preparation
from infra import cli
from infra.errors import UserError
from infra.settings import to_dict
from tests.cohorts import GRID, blob, write_cohort
from tests.data_pipeline.shards.faults import PLANTED, find, save, write_faulty_cohort

ALL_OFF = [
    "--quality.nonfinite=zero", "--quality.constant=keep", "--quality.duplicate=keep", "--quality.outlier.use=false",
    "--quality.cat12.use=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return write_faulty_cohort(tmp_path_factory.mktemp("cohort") / "faulty")


@pytest.fixture(scope="module")
def built(faulty, tmp_path_factory):
    return build_shards(faulty, tmp_path_factory.mktemp("shards") / "out", scans_per_shard=7)


def quarantine(manifest) -> pd.DataFrame:
    return pd.read_csv(manifest.root / "quarantine.tsv", sep="\t").set_index("key")


def test_each_fault_is_excluded_by_its_rule_and_every_other_scan_is_kept(built):
    expected = {f"faulty_{scan}": rule for scan, rule in PLANTED.items() if rule != "tiv"}
    assert quarantine(built)["rule"].to_dict() == expected
    assert len(built.scans) == 31 - len(expected)
    assert built.settings["quarantined"] == len(expected)


def test_the_quarantine_has_value_threshold_and_reason(built, faulty):
    out = quarantine(built)
    assert list(out.columns) == ["path", "rule", "measured", "threshold", "reason"]
    row = out.loc["faulty_sub-000_ses-1"]
    assert (row["measured"], row["threshold"], row["path"]) == (7, 0, str(find(faulty, "sub-000_ses-1")))
    assert out.loc["faulty_sub-001_ses-1", "measured"] == 0.25
    assert tuple(out.loc["faulty_sub-009_ses-1", ["measured", "threshold"]]) == (4.2, 3.5)
    assert tuple(out.loc["faulty_sub-007_ses-1", ["measured", "threshold"]]) == (2, 1)
    for number in (3, 4, 5):
        row = out.loc[f"faulty_sub-00{number}_ses-1"]
        assert row["measured"] < row["threshold"] == -5
        assert "correlation" in row["reason"]
    assert np.isnan(out.loc["faulty_sub-002_ses-1", "measured"])


def test_a_duplicate_names_the_kept_scan_and_warns_if_the_ids_differ(built):
    reasons = quarantine(built)["reason"]
    assert "same voxels as faulty_sub-006_ses-1" in reasons["faulty_sub-007_ses-1"]
    assert "listed as two participants" in reasons["faulty_sub-007_ses-1"]
    assert "same voxels as faulty_sub-008_ses-1" in reasons["faulty_sub-008_ses-2"]
    assert "listed as two participants" not in reasons["faulty_sub-008_ses-2"]
    assert {"faulty_sub-006_ses-1", "faulty_sub-008_ses-1"} <= set(built.scans["key"])


def test_the_statistics_are_those_of_the_stored_voxels(built):
    volumes = np.stack([built.read_volume(row) for row in range(len(built.scans))])
    wide = volumes.astype(np.float64)
    scans = built.scans
    np.testing.assert_allclose(scans["quality_mean"], wide.mean(axis=(1, 2, 3)), rtol=1e-4)  # measured before rounding
    np.testing.assert_allclose(scans["quality_std"], wide.std(axis=(1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(scans["quality_zeros"], (wide == 0).mean(axis=(1, 2, 3)), atol=1e-6)
    assert list(scans["voxels_sha256"]) == [hashlib.sha256(volume.tobytes()).hexdigest() for volume in volumes]
    # With voxels of 6 mm, each block of the coarse volume is one voxel. The planted outliers shift the median slightly.
    median = np.median(wide, axis=0).ravel()
    expected = [np.corrcoef(volume.ravel(), median)[0, 1] for volume in wide]
    np.testing.assert_allclose(scans["quality_correlation"], expected, atol=0.03)


def test_webdataset_reads_exactly_the_scans_of_the_manifest(built):
    assert find_problems(built) == {}
    urls = [str(built.root / row["name"]) for row in built.shards]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(samples) == sorted(built.scans["key"])
    assert [row["scans"] for row in built.shards] == built.scans["shard"].value_counts().sort_index().to_list()
    for row, key in enumerate(built.scans["key"]):
        raw = zstandard.ZstdDecompressor().decompress(samples[key]["npy.zst"])
        np.testing.assert_array_equal(
            np.load(io.BytesIO(raw)), built.read_volume(row)
        )  # read by offset, checksum verified
    assert not list(built.root.glob("*.coarse-*"))


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("nonfinite=zero", ["sub-000_ses-1"]),
        ("constant=keep", ["sub-001_ses-1"]),
        ("duplicate=keep", ["sub-007_ses-1", "sub-008_ses-2"]),
        ("outlier.use=false", ["sub-003_ses-1", "sub-004_ses-1", "sub-005_ses-1"]),
        ("cat12.use=false", ["sub-009_ses-1"]),
        ("cat12.column=other_rating", ["sub-009_ses-1"]),  # the column does not exist, so the rule does nothing
    ],
)
def test_each_rule_can_be_switched_off(faulty, tmp_path, setting, kept):
    quality = load_quality(None, [f"--quality.{setting}"])
    manifest = build_shards(faulty, tmp_path / "out", quality=quality)
    expected = {f"faulty_{scan}" for scan, rule in PLANTED.items() if rule != "tiv" and scan not in kept}
    assert set(quarantine(manifest).index) == expected
    assert manifest.settings["quality"] == to_dict(quality)


def test_with_all_rules_off_only_unreadable_scans_are_excluded(faulty, tmp_path, capsys):
    assert cli.run(["shards", "build", str(faulty), str(tmp_path / "out"), *ALL_OFF]) == 0
    assert "30 scans in 1 shards" in capsys.readouterr().out
    assert cli.run(["shards", "build", str(faulty), str(tmp_path / "out")]) == 2
    assert "holds shards built with other settings (quality was" in capsys.readouterr().err


def test_voxels_that_are_not_finite_can_be_set_to_zero(faulty, tmp_path):
    manifest = build_shards(faulty, tmp_path / "out", quality=Quality(nonfinite="zero"))
    row = int(manifest.scans.index[manifest.scans["key"] == "faulty_sub-000_ses-1"][0])
    volume = manifest.read_volume(row)
    assert (volume.flat[:7] == 0).all()
    np.testing.assert_array_equal(volume.flat[7:], blob(0, 50.0).astype(np.float16).flat[7:])


def test_changed_thresholds_are_applied(faulty, tmp_path):
    overrides = [
        "--quality.outlier.robust_z=-1000",
        "--quality.cat12.worst=4.2",
        "--quality.limits={age: {max: 70}, quality_mean: {min: 0.3}}",
    ]
    out = quarantine(build_shards(faulty, tmp_path / "out", quality=load_quality(None, overrides)))
    assert not {"outlier", "cat12"} & set(out["rule"])
    old = out[out["rule"] == "limits.age"]
    assert sorted(old.index) == [f"faulty_sub-{n:03d}_ses-1" for n in range(25, 30)]  # 20 + 60 n / 29 years
    assert (old["measured"] > 70).all()
    assert (old["threshold"] == 70).all()
    dark = out[out["rule"] == "limits.quality_mean"]
    assert len(dark)
    assert (dark["measured"] < 0.3).all()


def test_a_scan_on_another_grid_can_be_refused_with_its_distance(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=4)
    path = find(cohort, "sub-002_ses-1")
    shifted = np.array(GRID.affine)
    shifted[0, 3] += 2.5
    save(path, np.array(nibabel.load(path).dataobj), shifted)
    out = quarantine(build_shards(cohort, tmp_path / "out", grid=GRID, quality=Quality(grid="refuse")))
    assert out.loc["cohort_sub-002_ses-1", "rule"] == "grid"
    assert out.loc["cohort_sub-002_ses-1", "measured"] == pytest.approx(2.5)
    assert len(build_shards(cohort, tmp_path / "resampled", grid=GRID).scans) == 4


def test_a_copy_with_another_head_size_is_a_duplicate(faulty, tmp_path):
    manifest = build_shards(faulty, tmp_path / "out", scaling="tiv")
    out = quarantine(manifest)["rule"]
    assert out["faulty_sub-007_ses-1"] == "duplicate"  # its tiv is 10 ml above that of sub-006
    assert out["faulty_sub-010_ses-1"] == "tiv"


def test_a_shard_that_loses_all_scans_is_deleted(faulty, tmp_path):
    manifest = build_shards(faulty, tmp_path / "out", scans_per_shard=1)
    assert find_problems(manifest) == {}
    assert len(manifest.shards) == len(manifest.scans) == 22
    for row in range(22):
        assert manifest.read_volume(row).shape == GRID.shape


def test_a_small_cohort_is_not_judged_for_outliers(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=19)
    save(find(cohort, "sub-004_ses-1"), np.random.default_rng(0).random(GRID.shape).astype(np.float32))
    assert len(build_shards(cohort, tmp_path / "out").scans) == 19
    rule = Outlier(least_scans=19)
    assert len(build_shards(cohort, tmp_path / "judged", quality=Quality(outlier=rule)).scans) == 18


@given(removed=st.sets(st.integers(0, 5)), codec=st.sampled_from(["zst", "npy"]))
@settings(max_examples=25, deadline=None)
def test_removing_samples_gives_the_bytes_of_a_shard_written_without_them(tmp_path_factory, removed, codec):
    folder = tmp_path_factory.mktemp("shard")
    samples = [
        (f"d_sub-{n}_ses-1", encode(blob(n, 30.0 + n).astype(np.float16), codec), {"age": n, "note": "x" * 300 * n})
        for n in range(6)
    ]
    write_shard(folder / "all.tar", samples, codec)
    write_shard(folder / "fewer.tar", [sample for n, sample in enumerate(samples) if n not in removed], codec)
    copy_without(folder / "all.tar", folder / "copied.tar", {samples[n][0] for n in removed})
    assert (folder / "copied.tar").read_bytes() == (folder / "fewer.tar").read_bytes()


def test_removing_the_same_samples_twice_changes_nothing(built, tmp_path):
    name = built.shards[0]["name"]
    (tmp_path / name).write_bytes((built.root / name).read_bytes())
    first = rewrite_shard(str(tmp_path), name, {built.scans["key"][0]}, "zst")
    content = (tmp_path / name).read_bytes()
    assert rewrite_shard(str(tmp_path), name, {built.scans["key"][0]}, "zst") == first
    assert (tmp_path / name).read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize(("shape", "spacing"), [((121, 145, 121), 1.5), ((30, 37, 31), 6.0), ((9, 8, 5), 3.0)])
def test_the_coarse_volume_holds_the_means_of_blocks(shape, spacing):
    volume = np.random.default_rng(0).random(shape).astype(np.float32)
    grid = Grid.of(shape, np.diag([spacing, spacing, spacing, 1.0]))
    sides = [max(1, round(8 / spacing), -(-length // 20)) for length in shape]
    expected = [
        volume[i : i + sides[0], j : j + sides[1], k : k + sides[2]].mean(dtype=np.float64)
        for i in range(0, shape[0], sides[0])
        for j in range(0, shape[1], sides[1])
        for k in range(0, shape[2], sides[2])
    ]
    np.testing.assert_allclose(coarse_volume(volume, grid), expected, rtol=1e-5)
    assert len(expected) <= 20**3


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--quality.outlyer.robust_z=-4"], "unknown key 'quality.outlyer' (did you mean 'outlier'?)"),
        (["--quality.outlier.robust=-4"], "unknown key 'quality.outlier.robust' (did you mean 'robust_z'?)"),
        (["--quality.outlier.robust_z=4"], "quality.outlier.robust_z: Input should be less than 0, found 4"),
        (["--quality.grid=drop"], "quality.grid: Input should be 'resample' or 'refuse', found 'drop'"),
        (["--quality.limits.tiv.max=1000", "--quality.limits.tiv.min=2000"], "min 2000 is above max 1000"),
        (["--quality.limits.tiv={}"], "give min, max or both"),
        (["--quality.limits.agee.max=3"], "no numeric column 'agee' (did you mean 'age'?)"),
        (["--quality.cat12.column=tiv"], "is not a CAT12 rating of 0.5..10.5"),
    ],
)
def test_a_wrong_rule_is_one_clear_line(faulty, tmp_path, capsys, overrides, text):
    assert cli.run(["shards", "build", str(faulty), str(tmp_path / "out"), *overrides]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rules_come_from_a_file_and_the_command_overrides_single_ones(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("quality:\n  duplicate: keep\n  outlier: {robust_z: -3}\n  limits:\n    tiv: {min: 900}\n")
    quality = load_quality(path, ["--quality.outlier.least_scans=50"])
    assert quality == Quality(
        duplicate="keep", outlier=Outlier(robust_z=-3, least_scans=50), limits={"tiv": Limits(min=900)}
    )
    path.write_text("qualty: {}\n")
    with pytest.raises(UserError, match="did you mean 'quality'"):
        load_quality(path)


def test_removals_survive_json_and_the_quarantine_file(tmp_path):
    removals = [
        Removal("a_sub-2", "b\t.nii", "outlier", -7.25, -5.0, 'text with "quotes"'),
        Removal("a_sub-1", "a.nii", "unreadable", None, None, "damaged"),
        Removal("a_sub-1", "a.nii", "nonfinite", 7, 0, "7 voxels are NaN or infinite"),
    ]
    assert [Removal.from_dict(json.loads(json.dumps(removal.to_dict()))) for removal in removals] == removals
    write_quarantine(tmp_path / "quarantine.tsv", [*removals, removals[0]])
    assert read_quarantine(tmp_path / "quarantine.tsv") == sorted(removals, key=lambda r: (r.key, r.rule))
    assert read_quarantine(tmp_path / "absent.tsv") == []
    head, rows = (tmp_path / "quarantine.tsv").read_text().split("\n", 1)
    older = head.replace("measured", "figure")  # as older versions called the column
    assert older != head
    (tmp_path / "older.tsv").write_text(f"{older}\n{rows}")
    assert read_quarantine(tmp_path / "older.tsv") == read_quarantine(tmp_path / "quarantine.tsv")


def test_zeros_of_either_sign_are_counted_in_any_axis_order(tmp_path):
    voxels = blob(0, 40.0)
    voxels[:3] = 0.0
    voxels[3:5] = -0.0
    save(tmp_path / "scan.nii.gz", voxels)
    stored, statistics, coarse = read_scan(Scan(tmp_path / "scan.nii.gz", "d", "1"), Preparation(GRID), Quality())
    assert statistics["quality_zeros"] == pytest.approx(5 / 14, rel=1e-5)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(coarse, voxels.ravel())
    np.testing.assert_array_equal(coarse_volume(np.asfortranarray(voxels), GRID), coarse_volume(voxels, GRID))
