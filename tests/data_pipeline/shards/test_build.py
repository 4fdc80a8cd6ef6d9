"""From NIfTI files to shards: what is written, that it is the same every time, and what is excluded for which reason."""

from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import webdataset
import zstandard

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.grid import Grid
from infra import cli
from infra.errors import UserError
from tests.cohorts import GRID, blob, write_cohort


def find(cohort: Path, key: str) -> Path:
    participant, session = key.split("_")[1:3]
    return next((cohort / participant / session / "anat").glob("*.nii.gz"))


def test_every_scan_is_stored_with_its_row_and_its_voxels(cohort, manifest):
    scans = manifest.scans
    assert len(scans) == 48
    assert scans["key"].is_unique
    people = pd.read_csv(cohort / "participants.tsv", sep="\t", dtype={"participant_id": str}).set_index(
        "participant_id"
    )
    for row in range(0, 48, 7):
        scan = scans.loc[row]
        voxels = np.asarray(nibabel.load(find(cohort, scan["key"])).dataobj)
        assert np.array_equal(manifest.read_volume(row), voxels.astype(np.float16))
        expected = people.loc[f"sub-{scan['participant_id']}"]
        assert (scan["age"], scan["sex"], scan["diagnosis"]) == (
            expected["age"],
            expected["sex"],
            expected["diagnosis"],
        )
    assert manifest.grid == GRID.to_dict()
    assert [row["scans"] for row in manifest.shards] == [10, 10, 10, 10, 8]


def test_plain_tar_lists_the_members(manifest):
    path = manifest.root / manifest.shards[0]["name"]
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True).stdout.split()
    keys = manifest.scans["key"][manifest.scans["shard"] == 0]
    assert sorted(listed) == sorted(f"{key}.{ending}" for key in keys for ending in ("json", "npy.zst"))
    verbose = subprocess.run(
        ["tar", "tvf", str(path)], capture_output=True, text=True, check=True, env={"TZ": "UTC"}
    ).stdout
    assert all("root/root" in line and "1970-01-01 00:00" in line for line in verbose.splitlines())


def test_the_webdataset_library_alone_reads_the_shards(manifest):
    urls = [str(manifest.root / row["name"]) for row in manifest.shards]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert set(samples) == set(manifest.scans["key"])
    for row in (0, 30):
        key = manifest.scans.at[row, "key"]
        raw = zstandard.ZstdDecompressor().decompress(samples[key]["npy.zst"])
        assert np.array_equal(np.load(io.BytesIO(raw)), manifest.read_volume(row))
        described = json.loads(samples[key]["json"])
        assert described["participant_id"] == manifest.scans.at[row, "participant_id"]
        assert "path" not in described


def test_the_same_cohort_gives_the_same_bytes_with_any_number_of_workers(cohort, manifest, tmp_path):
    again = build_shards(cohort, tmp_path / "again", scans_per_shard=10)
    assert again.shards == manifest.shards
    assert again.digest == manifest.digest
    other = build_shards(cohort, tmp_path / "seed", scans_per_shard=10, seed=1)
    assert other.shards != manifest.shards


def test_codec_npy_holds_plain_arrays(cohort, tmp_path):
    built = build_shards(cohort, tmp_path / "npy", codec="npy", scans_per_shard=48)
    (sample, *_) = webdataset.WebDataset(str(built.root / built.shards[0]["name"]), shardshuffle=False)
    assert np.array_equal(np.load(io.BytesIO(sample["npy"])), built.read_volume(0))


def test_bad_scans_are_quarantined_with_their_reason_and_the_build_continues(tmp_path, capsys):
    cohort = write_cohort(tmp_path / "cohort", participants=9)
    affine = np.array(GRID.affine)
    bad = {
        "000": None,  # cut short
        "001": np.full(GRID.shape, np.nan, np.float32),
        "002": np.full(GRID.shape, 3.0, np.float32),
        "003": np.stack([blob(0, 30.0)] * 2, axis=-1),
    }
    for number, voxels in bad.items():
        path = find(cohort, f"c_sub-{number}_ses-1")
        if voxels is None:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    table = (cohort / "participants.tsv").read_text().splitlines()
    (cohort / "participants.tsv").write_text("\n".join(line for line in table if "sub-004" not in line) + "\n")
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out")]) == 0
    assert "5 scans were excluded; the reasons are in" in capsys.readouterr().out
    quarantine = pd.read_csv(tmp_path / "out" / "quarantine.tsv", sep="\t").set_index("key")["reason"]
    texts = [
        "unreadable",
        "voxels are NaN or infinite",
        "every voxel is 3",
        "is not one 3D volume",
        "not in participants.tsv",
    ]
    for number, text in enumerate(texts):
        assert text in quarantine[f"cohort_sub-00{number}_ses-1"]
    assert len(Manifest.load(tmp_path / "out").scans) == 4


def test_another_grid_is_resampled_and_another_orientation_is_reoriented(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=5)
    path = find(cohort, "c_sub-000_ses-1")
    image = nibabel.load(path)
    voxels = np.array(image.dataobj)
    turned = image.affine @ np.array([[-1, 0, 0, GRID.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(voxels[::-1], turned), path)  # the same brain, stored from right to left
    built = build_shards(cohort, tmp_path / "out", grid=GRID)
    row = int(built.scans.index[built.scans["participant_id"] == "000"][0])
    np.testing.assert_array_equal(built.read_volume(row), voxels.astype(np.float16))
    coarse = build_shards(cohort, tmp_path / "coarse", grid=Grid.of((7, 8, 6), np.diag([12.0, 12, 12, 1]) + shift()))
    assert coarse.read_volume(0).shape == (7, 8, 6)
    assert np.isfinite(coarse.read_volume(0)).all()


def shift() -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[:3, 3] = np.array(GRID.affine)[:3, 3]
    return matrix


def test_scaling_by_tiv_removes_head_size(cohort, tmp_path, manifest):
    built = build_shards(cohort, tmp_path / "out", scaling="tiv", scans_per_shard=10)
    tiv = built.scans.set_index("key")["tiv"]
    for row in (0, 17):
        key = manifest.scans.at[row, "key"]
        other = int(built.scans.index[built.scans["key"] == key][0])
        expected = manifest.read_volume(row).astype(np.float32) * 1500.0 / tiv[key]
        np.testing.assert_allclose(built.read_volume(other).astype(np.float32), expected, rtol=2e-3)


def test_splits_are_by_participant_and_patients_are_downstream(manifest):
    scans = manifest.scans
    assert scans.groupby("participant_id")["split"].nunique().max() == 1
    assert set(scans[scans["diagnosis"] == "AD"]["split"]) == {"downstream"}
    assert {"pretrain", "monitor", "downstream"} == set(scans["split"])


def test_a_finished_build_is_kept_and_another_one_is_rejected(cohort, tmp_path, capsys):
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out")]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out")]) == 0
    assert "already built" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out"), "--seed", "5"]) == 2
    assert "holds shards built with other settings (seed was 0, now 5)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_verify_finds_any_damage(cohort, tmp_path, damage, capsys):
    built = build_shards(cohort, tmp_path / "out", scans_per_shard=16)
    path = built.root / built.shards[1]["name"]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 4
        path.write_bytes(bytes(content))
    elif damage == "truncate":
        path.write_bytes(bytes(content[:-512]))
    elif damage == "remove":
        path.unlink()
    else:
        (built.root / "stray.tar").write_bytes(b"x")
    assert list(find_problems(built)) == ["stray.tar" if damage == "add" else path.name]
    assert cli.run(["shards", "verify", str(built.root)]) == 1


def test_an_edited_manifest_is_rejected(cohort, tmp_path):
    built = build_shards(cohort, tmp_path / "out")
    path = built.root / "manifest.json"
    path.write_text(path.read_text().replace('"codec": "zst"', '"codec": "npy"'))
    with pytest.raises(UserError, match="was edited"):
        Manifest.load(built.root)


def test_reading_a_damaged_sample_names_shard_and_key(cohort, tmp_path):
    built = build_shards(cohort, tmp_path / "out", scans_per_shard=16)
    offset = int(built.scans.at[20, "offset"]) + 40
    path = built.root / built.shards[int(built.scans.at[20, "shard"])]["name"]
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(OSError, match=f"shard {path.name}, scan {built.scans.at[20, 'key']} fails its checksum"):
        built.read_volume(20)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda c: (c / "participants.tsv").unlink(), r"participants.tsv is missing; a cohort needs this table"),
        (
            lambda c: swap(c, "\t20.0\t", "\ttwenty\t"),
            r"participants.tsv line 2: age='twenty' is not a number of years",
        ),
        (lambda c: swap(c, "\tF\t", "\tQ\t"), r"line 2: sex='Q' is not F, M"),
        (lambda c: swap(c, "participant_id\t", "subject\t"), r"has no column participant_id; found: subject"),
        (lambda c: swap(c, "sub-001\t", "sub-000\t"), r"line 3: participant_id '000' appears twice"),
    ],
    ids=["missing", "age", "sex", "column", "twice"],
)
def test_an_invalid_table_is_rejected_with_one_line(tmp_path, capsys, edit, text):
    cohort = write_cohort(tmp_path / "cohort", participants=3)
    edit(cohort)
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(text, printed)
    assert not (tmp_path / "out").exists()


def swap(cohort: Path, old: str, new: str) -> None:
    path = cohort / "participants.tsv"
    path.write_text(path.read_text().replace(old, new, 1))


def test_an_invalid_option_is_rejected_with_one_line(cohort, tmp_path, capsys):
    for option, text in (
        (["--modality", "t1"], "modality='t1' is not known"),
        (["--modality", "t1w"], "has no t1w scan of a listed participant"),
        (["--scaling", "icv"], "scaling='icv' is not known (did you mean 'tiv'?); allowed: none, tiv"),
        (["--codec", "gz"], "codec='gz' is not known"),
        (["--splits", "a=.5,b=.1"], "the shares sum to 0.6"),
        (["--scans-per-shard", "0"], "must be at least 1"),
    ):
        assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out"), *option]) == 2
        assert text in capsys.readouterr().err
    assert cli.run(["shards", "build", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_missing_values_stay_missing(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=6)
    swap(cohort, "\t20.0\tF\t", "\tn/a\tn/a\t")
    built = build_shards(cohort, tmp_path / "out")
    row = int(built.scans.index[built.scans["participant_id"] == "000"][0])
    assert np.isnan(built.proxies(["age"])[row, 0])
    assert np.isnan(built.proxies(["sex"])[row, 0])
    assert set(built.proxies(["sex"])[:, 0][np.arange(6) != row]) == {0.0, 1.0}


def test_info_prints_a_summary(manifest, capsys):
    assert cli.run(["shards", "info", str(manifest.root)]) == 0
    printed = capsys.readouterr().out
    assert "48 of 24 participants in 5 shards" in printed
    assert "14 x 16 x 12 voxels of 6 x 6 x 6 mm" in printed
    assert manifest.digest in printed


def test_preview_writes_an_image(manifest, tmp_path, capsys):
    out = tmp_path / "preview.png"
    assert cli.run(["shards", "preview", str(manifest.root), "--out", str(out), "--augmentation", "paper-all"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli.run(["shards", "preview", str(manifest.root), "--augmentation", "papr"]) == 2
    assert "augmentation.preset='papr' is not known" in capsys.readouterr().err
