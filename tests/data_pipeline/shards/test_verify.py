"""Verify finds every changed byte and names its place; repair accepts only the original bytes."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from infra import cli
from tests.cohorts import GRID, blob, write_cohort


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Nine scans in two shards, with every kind of value in the table; the cohort beside them."""
    root = tmp_path_factory.mktemp("small")
    cohort = write_cohort(root / "cohort", participants=9)
    table = (cohort / "participants.tsv").read_text().splitlines()
    table = [f"{line}\t{'note' if n == 0 else 'n/a' if n == 3 else f'é {n}'}" for n, line in enumerate(table)]
    (cohort / "participants.tsv").write_text("\n".join(table).replace("\t20.0\t", "\tn/a\t") + "\n")
    build_shards(cohort, root / "shards", scans_per_shard=5)
    return root


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small / "shards", tmp_path / "shards")
    return Manifest.load(tmp_path / "shards")


def owners(path) -> list[tuple[int, int, str]]:
    """(start, end, scan) for the archive's bytes, from the tar library; the rest is the archive's end."""
    with tarfile.open(path) as tar:
        return [(m.offset, m.offset_data + -(-m.size // 512) * 512, m.name.partition(".")[0]) for m in tar]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shard=st.integers(0, 1), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), region=st.integers(0, 3)
)
def test_any_flipped_bit_is_found_and_its_scan_is_named(small, shard, place, bit, region):
    manifest = Manifest.load(small / "shards")
    name = manifest.shards[shard]["name"]
    path = manifest.root / name
    content = bytearray(path.read_bytes())
    # Voxels fill nine tenths of an archive, so three of four draws are restricted to headers, descriptions or the end.
    members = owners(path)
    low, high = 0, len(content)
    if region in (1, 2):
        low, high, _ = members[int(place * 1e6) % len(members)]
        high = min(high, low + 1024)
    elif region == 3:
        low = members[-1][1]
    byte = low + int(place * (high - low))
    content[byte] ^= 1 << bit
    original = path.read_bytes()
    path.write_bytes(bytes(content))
    try:
        problems = find_problems(manifest)
    finally:
        path.write_bytes(original)
    assert list(problems) == [name]
    owner = [key for start, end, key in members if start <= byte < end]
    expected = f"scan {owner[0]} (" if owner else "the archive's end"
    assert expected in problems[name]
    assert problems[name].count("scan ") == len(owner)


@pytest.mark.parametrize(
    "part", ["voxels", "description", "header of its voxels", "header of its description", "padding"]
)
def test_the_damaged_part_is_named(copy, part):
    scan = copy.scans.loc[2]
    path = copy.root / copy.shards[0]["name"]
    places = {
        "voxels": int(scan["offset"]) + 77,
        "header of its voxels": int(scan["offset"]) - 300,
        "description": int(scan["offset"]) - 1000,
        "header of its description": int(scan["offset"]) - 512 * 3 + 8,
        "padding": int(scan["offset"] + scan["size"]),
    }
    assert (scan["offset"] + scan["size"]) % 512
    content = bytearray(path.read_bytes())
    content[places[part]] ^= 16
    path.write_bytes(bytes(content))
    ((name, problem),) = find_problems(copy).items()
    assert name == path.name
    assert f"damaged: scan {scan['key']} ({part} in bytes" in problem


def test_the_scans_lost_by_truncation_are_named(copy):
    path = copy.root / copy.shards[0]["name"]
    keep = int(copy.scans.at[3, "offset"]) + 10
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    ((name, problem),) = find_problems(copy).items()
    assert name == path.name
    assert problem.startswith(f"damaged: {keep} bytes, the manifest says {size}")
    named = [key for key in copy.scans["key"][:5] if f"scan {key} (" in problem]
    assert named == list(copy.scans["key"][3:5])
    assert problem.count("cut off") == 2


def test_surplus_bytes_and_missing_or_extra_files_are_found(copy, capsys):
    first, second = (copy.root / row["name"] for row in copy.shards)
    first.write_bytes(first.read_bytes() + b"\0" * 512)
    second.unlink()
    (copy.root / "stray.tar").write_bytes(b"x")
    (copy.root / "scans-12345678.parquet").write_bytes(b"x")
    problems = find_problems(copy)
    assert set(problems) == {first.name, second.name, "stray.tar", "scans-12345678.parquet"}
    assert "the manifest says" in problems[first.name]
    assert problems[second.name] == "missing, with 4 scans"
    assert cli.run(["shards", "verify", str(copy.root)]) == 1
    assert "2 shards, 9 scans, 4 problems" in capsys.readouterr().out


def test_modification_times_are_not_trusted(copy):
    path = copy.root / copy.shards[0]["name"]
    stamps = path.stat()
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert len(find_problems(copy)) == 1


def test_an_intact_data_set_has_no_problems(small, capsys):
    assert cli.run(["shards", "verify", str(small / "shards")]) == 0
    assert "2 shards, 9 scans, 0 problems" in capsys.readouterr().out


def edit_settings(content):
    content["settings"]["codec"] = "npy"


def edit_shard(content):
    content["shards"][0]["sha256"] = "0" * 64


@pytest.mark.parametrize("edit", [edit_settings, edit_shard], ids=["settings", "shard"])
def test_an_edited_manifest_is_a_problem(copy, capsys, edit):
    path = copy.root / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    assert cli.run(["shards", "verify", str(copy.root)]) == 1
    assert "manifest.json was edited" in capsys.readouterr().out


def test_an_edit_that_the_digest_does_not_cover_is_a_problem(copy):
    path = copy.root / "manifest.json"
    path.write_text(path.read_text().replace('"dtype"', '"dtype": "float64",\n "dtype"', 1))
    assert find_problems(Manifest.load(copy.root))["manifest.json"].startswith("was edited")


def test_an_edited_scan_table_is_a_problem(copy, capsys):
    table = copy.scans.assign(age=30.0)
    table.to_parquet(copy.root / "scans.parquet", index=False)
    assert cli.run(["shards", "verify", str(copy.root)]) == 1
    assert "scans.parquet is missing or differs from manifest.json" in capsys.readouterr().out


def test_a_folder_without_a_manifest_is_rejected(tmp_path, capsys):
    assert cli.run(["shards", "verify", str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err


def test_repair_rebuilds_only_damaged_and_missing_shards(small, copy, capsys):
    first, second = (copy.root / row["name"] for row in copy.shards)
    second.unlink()
    inode = first.stat().st_ino
    assert cli.run(["shards", "verify", str(copy.root), "--repair", str(small / "cohort")]) == 0
    assert "1 repaired, 0 problems" in capsys.readouterr().out
    assert second.read_bytes() == (small / "shards" / second.name).read_bytes()
    assert first.stat().st_ino == inode
    content = bytearray(first.read_bytes())
    content[-700] ^= 1
    first.write_bytes(bytes(content))
    assert cli.run(["shards", "verify", str(copy.root), "--repair", str(small / "cohort")]) == 0
    assert first.read_bytes() == (small / "shards" / first.name).read_bytes()
    assert {p.name for p in copy.root.iterdir()} == {p.name for p in (small / "shards").iterdir()}


@pytest.mark.parametrize("change", ["voxels", "table", "scan gone", "scan unreadable", "no cohort"])
def test_repair_from_a_changed_cohort_reports_it_and_keeps_the_file(small, copy, tmp_path, capsys, change):
    cohort = tmp_path / "cohort"
    shutil.copytree(small / "cohort", cohort)
    participant = str(copy.scans.at[1, "participant_id"])
    path = next((cohort / f"sub-{participant}").rglob("*.nii.gz"))
    texts = {
        "voxels": "its bytes differ from the manifest", "table": "its bytes differ from the manifest",
        "scan gone": f"has no scan cohort_sub-{participant}_ses-1", "scan unreadable": "can no longer be used (unreadable",
        "no cohort": "is not a folder",
    }  # fmt: skip
    if change == "voxels":
        nibabel.save(nibabel.Nifti1Image(blob(77, 33.0), np.array(GRID.affine)), path)
    elif change == "table":
        text = (cohort / "participants.tsv").read_text()
        (cohort / "participants.tsv").write_text(text.replace("\tsite", "\tplace").replace("\tplace\t", "\tsite\t", 1))
    elif change == "scan gone":
        path.unlink()
    elif change == "scan unreadable":
        path.write_bytes(b"x")
    else:
        shutil.rmtree(cohort)
    damaged = copy.root / copy.shards[0]["name"]
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(bytes(content))
    assert cli.run(["shards", "verify", str(copy.root), "--repair", str(cohort)]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith(f"shards: {damaged.name}")]
    assert "not repaired" in line
    assert texts[change] in line
    assert "0 repaired, 1 problems" in printed
    assert damaged.read_bytes() == bytes(content)
    assert not list(copy.root.glob(".unfinished-*"))


def test_repair_after_an_append_rebuilds_only_the_shards_of_its_cohort(copy, small, tmp_path):
    other = write_cohort(tmp_path / "other", participants=4, seed=4)
    after = append_shards(other, copy.root)
    original = {row["name"]: (after.root / row["name"]).read_bytes() for row in after.shards}
    for name in original:
        (after.root / name).unlink()
    assert cli.run(["shards", "verify", str(after.root), "--repair", str(other)]) == 1
    assert [row["name"] for row in after.shards if (after.root / row["name"]).exists()] == ["other-000000.tar"]
    assert cli.run(["shards", "verify", str(after.root), "--repair", str(small / "cohort")]) == 0
    assert {row["name"]: (after.root / row["name"]).read_bytes() for row in after.shards} == original
