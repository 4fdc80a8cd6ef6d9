"""Appending: existing shards and rows stay, readers see the data set before or after, mismatches are rejected."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from data_pipeline.cohort.split import assign_splits
from data_pipeline.shards import writing
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.repair import repair_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from tests.cohorts import GRID, blob, write_cohort


@pytest.fixture
def other(tmp_path):
    return write_cohort(tmp_path / "other", participants=11, sessions=1, seed=7)


@pytest.fixture
def built(manifest, tmp_path):
    """A copy of the 48 scans in 5 shards."""
    shutil.copytree(manifest.root, tmp_path / "shards")
    return Manifest.load(tmp_path / "shards")


def tars(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.tar")}


def copy_of(cohort: Path, to: Path) -> Path:
    shutil.copytree(cohort, to)
    return to


def add_session(cohort: Path, participant: str, session: int, seed: int = 0) -> None:
    folder = cohort / f"sub-{participant}" / f"ses-{session}" / "anat"
    folder.mkdir(parents=True)
    image = nibabel.Nifti1Image(blob(1000 + seed, 40.0), np.array(GRID.affine))
    nibabel.save(image, folder / f"sub-{participant}_ses-{session}_desc-mwp1_probseg.nii.gz")


def test_another_data_set_is_added_after_the_existing_scans(built, other, capsys):
    before = tars(built.root)
    assert cli.run(["shards", "append", str(other), str(built.root)]) == 0
    assert "appended 11 scans in 2 shards" in capsys.readouterr().out
    after = Manifest.load(built.root)
    assert before.items() <= tars(built.root).items()
    pd.testing.assert_frame_equal(after.scans.iloc[:48], built.scans)
    assert after.shards[:5] == built.shards
    assert [row["name"] for row in after.shards[5:]] == ["other-000000.tar", "other-000001.tar"]
    assert set(after.scans["dataset"][48:]) == {"other"}
    for row in (0, 47):
        assert np.array_equal(after.read_volume(row), built.read_volume(row))
    for row in (48, 58):
        path = next(other.glob(f"sub-{after.scans.at[row, 'participant_id']}/ses-*/anat/*.nii.gz"))
        assert np.array_equal(after.read_volume(row), np.asarray(nibabel.load(path).dataobj).astype(np.float16))
    assert find_problems(after) == {}
    assert after.settings["appended"] == [
        {
            "dataset": "other", "simulated": False, "scans_found": 11, "quarantined": 0, "scans": 11,
            "shards": ["other-000000.tar", "other-000001.tar"], "array_orientations": {},
        }
    ]  # fmt: skip
    assert {k: v for k, v in after.settings.items() if k != "appended"} == built.settings
    tables = [path.name for path in built.root.glob("*.parquet")]
    assert len(tables) == 1
    assert tables[0].startswith("scans-")


def test_repeating_an_append_changes_nothing(built, other, capsys):
    once = append_shards(other, built.root)
    before = {path.name: path.stat().st_mtime_ns for path in built.root.iterdir()}
    assert cli.run(["shards", "append", str(other), str(built.root)]) == 0
    assert "nothing to append" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in built.root.iterdir()} == before
    assert Manifest.load(built.root).digest == once.digest


def test_new_sessions_of_known_participants_get_their_split(cohort, built, tmp_path):
    grown = copy_of(cohort, tmp_path / "tiny")
    for number in range(24):
        add_session(grown, f"{number:03d}", 3, seed=number)
    after = append_shards(grown, built.root)
    assert len(after.scans) == 72
    pd.testing.assert_frame_equal(after.scans.iloc[:48], built.scans)
    assert after.scans.groupby("participant_id")["split"].nunique().max() == 1
    assert set(after.scans["session"][48:]) == {"3"}
    assert [row["name"] for row in after.shards[5:]] == [f"tiny-{n:06d}.tar" for n in (5, 6, 7)]
    # The original build call still recognises its data set.
    assert build_shards(cohort, built.root, scans_per_shard=10).digest == after.digest


def test_several_appends_are_recorded_in_their_order(built, other, tmp_path):
    append_shards(other, built.root)
    third = write_cohort(tmp_path / "third", participants=3, seed=3)
    after = append_shards(third, built.root)
    assert [part["dataset"] for part in after.settings["appended"]] == ["other", "third"]
    assert [int(n) for n in after.scans.groupby("shard", sort=True).size()] == [row["scans"] for row in after.shards]
    assert len(list(built.root.glob("*.parquet"))) == 1
    assert find_problems(after) == {}


@pytest.mark.parametrize("reread", [True, False])
def test_a_stored_scan_with_other_voxels_is_rejected(cohort, built, tmp_path, reread):
    changed = copy_of(cohort, tmp_path / "tiny")
    add_session(changed, "004", 3)
    path = next((changed / "sub-007" / "ses-1").rglob("*.nii.gz"))
    nibabel.save(nibabel.Nifti1Image(blob(5, 30.0), np.array(GRID.affine)), path)
    if not reread:
        assert len(append_shards(changed, built.root, reread=False).scans) == 49
        return
    with pytest.raises(UserError, match=r"scan tiny_sub-007_ses-1 is in .* with other voxels \(scans that differ: 1\)"):
        append_shards(changed, built.root)
    assert Manifest.load(built.root).digest == built.digest
    # Under another data set name, the changed and the added scan are new; the others are duplicates.
    assert len(append_shards(changed, built.root, dataset="again").scans) == 48 + 2
    quarantine = (built.root / "quarantine.tsv").read_text()
    assert quarantine.count("which the shards hold already") == 47


def test_a_stored_scan_with_another_age_is_rejected(cohort, built, tmp_path, capsys):
    changed = copy_of(cohort, tmp_path / "tiny")
    table = changed / "participants.tsv"
    table.write_text(table.read_text().replace("\t20.0\t", "\t21.0\t", 1))
    assert cli.run(["shards", "append", str(changed), str(built.root), "--skip-known"]) == 2
    printed = capsys.readouterr().err
    assert "scan tiny_sub-000_ses-1 is in" in printed
    assert "with age=20.0, in the cohort it has 21.0" in printed
    assert printed.count("\n") == 1


def test_settings_that_differ_from_the_manifest_are_rejected(built, other, capsys):
    before = tars(built.root)
    for option, text in (
        (["--codec", "npy"], "codec='npy' differs from"),
        (["--scaling", "tiv"], "which has 'none'"),
        (["--modality", "t1w"], "which has 'vbm'"),
        (["--spacing", "3"], "grid=Grid("),
    ):
        assert cli.run(["shards", "append", str(other), str(built.root), *option]) == 2
        printed = capsys.readouterr().err
        assert text in printed
        assert printed.count("\n") == 1
    assert tars(built.root) == before
    assert cli.run(["shards", "append", str(other), str(built.root), "--codec", "zst", "--modality", "vbm"]) == 0


def test_scans_on_another_grid_are_resampled_to_the_manifest_s(built, other):
    for path in other.rglob("*.nii.gz"):
        image = nibabel.load(path)
        moved = np.array(image.affine)
        moved[0, 3] += 6.0
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), moved), path)
    after = append_shards(other, built.root)
    row = int(after.scans.index[after.scans["participant_id"] == "002"][-1])
    source = np.asarray(nibabel.load(next((other / "sub-002").rglob("*.nii.gz"))).dataobj)
    np.testing.assert_allclose(after.read_volume(row)[1:], source[:-1].astype(np.float16), atol=2e-3)
    assert after.grid == built.grid


def test_columns_of_one_table_are_missing_values_for_the_other_s_scans(built, other):
    lines = (other / "participants.tsv").read_text().replace("\ttiv", "\tiq").splitlines()
    (other / "participants.tsv").write_text("\n".join(lines) + "\n")
    after = append_shards(other, built.root)
    assert after.scans["iq"].isna().to_list() == [True] * 48 + [False] * 11
    assert after.scans["tiv"].isna().to_list() == [False] * 48 + [True] * 11
    assert np.isfinite(after.proxies(["iq"])[48:]).all()
    assert list(after.scans.columns)[: len(built.scans.columns)] == list(built.scans.columns)
    assert find_problems(after) == {}


def test_a_column_of_another_type_is_rejected_with_one_line(built, other):
    text = (other / "participants.tsv").read_text()
    (other / "participants.tsv").write_text(text.replace("\t1400\n", "\tlarge\n", 1))
    found = (
        r"participants.tsv line \d+: tiv='{}' is not a number, but the shards hold numbers in this column; correct it, "
    )
    with pytest.raises(UserError, match=found.format("large")):
        append_shards(other, built.root)
    declared = other.parent / "columns.yaml"
    declared.write_text("types: {tiv: text}")
    with pytest.raises(UserError, match=r"column 'tiv' holds numbers in .* and text in the cohort's table"):
        append_shards(other, built.root, columns=declared)
    (other / "participants.tsv").write_text(re.sub(r"\t1[45]\d0\n", "\tlarge\n", text))  # no cell is a number
    with pytest.raises(UserError, match=r"line 2: tiv='large' is not a number, but the shards hold numbers"):
        append_shards(other, built.root)
    (other / "participants.tsv").write_text(re.sub(r"\t1(4\d0)\n", "\t0\\1\n", text))  # 0400 is a name of digits
    with pytest.raises(UserError, match=r"tiv='04\d0' is not a number, but the shards hold numbers"):
        append_shards(other, built.root)
    assert Manifest.load(built.root).digest == built.digest
    (other / "participants.tsv").write_text(text)
    assert len(append_shards(other, built.root).scans) == 59


def test_bad_scans_are_quarantined_once(built, other):
    path = next((other / "sub-005").rglob("*.nii.gz"))
    path.write_bytes(path.read_bytes()[:100])
    for _ in range(2):
        after = append_shards(other, built.root)
        assert len(after.scans) == 58
    lines = (built.root / "quarantine.tsv").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("other_sub-005_ses-1\t")
    assert not list(built.root.glob(".unfinished-*"))


def test_an_interrupted_append_is_invisible_and_can_be_continued(built, other, tmp_path, monkeypatch):
    shutil.copytree(built.root, tmp_path / "whole")
    real = writing.Progress.advance

    def advance(self, n=1, **counts):
        real(self, n, **counts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing.Progress, "advance", advance)
        append_shards(other, built.root)
    assert Manifest.load(built.root).digest == built.digest
    done = {p.name.removeprefix(".unfinished-").removesuffix(".json") for p in built.root.glob(".unfinished-*.json")}
    inodes = {name: (built.root / name).stat().st_ino for name in done}
    assert inodes
    append_shards(other, built.root)
    assert {name: (built.root / name).stat().st_ino for name in done} == inodes
    append_shards(other, tmp_path / "whole")
    contents = [{p.name: p.read_bytes() for p in root.iterdir()} for root in (built.root, tmp_path / "whole")]
    assert contents[0] == contents[1]


def test_leftovers_of_another_append_are_removed(built, other, tmp_path):
    (built.root / "gone-000000.tar").write_bytes(b"x")
    (built.root / ".unfinished-gone-000000.tar.json").write_text("{}")
    after = append_shards(other, built.root)
    assert not (built.root / "gone-000000.tar").exists()
    assert find_problems(after) == {}


def test_readers_see_the_data_set_before_or_after(built, tmp_path):
    parts = [write_cohort(tmp_path / f"part{n}", participants=3, seed=20 + n) for n in range(3)]
    seen: set[int] = set()
    errors: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                manifest = Manifest.load(built.root)
                assert sum(row["scans"] for row in manifest.shards) == len(manifest.scans)
                seen.add(len(manifest.scans))
            except BaseException as error:
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for part in parts:
        append_shards(part, built.root)
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert seen <= {48, 51, 54, 57}
    assert len(seen) > 1


def test_participants_who_arrive_one_by_one_are_split_by_the_shares():
    shares = {"pretrain": 0.7, "monitor": 0.1, "downstream": 0.2}
    one = pd.DataFrame({"participant": ["x"], "age": [40.0], "site": ["s"]})
    chosen = pd.Series([assign_splits(one, shares, 0, assigned).iloc[0] for assigned in range(200)])
    for name, share in shares.items():
        assert abs((chosen == name).mean() - share) < 0.02


def test_an_appended_simulated_cohort_marks_the_data_set_as_simulated(built, other):
    (other / "dataset_description.json").write_text('{"Simulated": true}')
    assert not built.simulated
    assert append_shards(other, built.root).simulated


def test_numbers_join_a_column_of_text_as_they_are_written(built, other):
    names = other / "participants.tsv"
    head, *rows = names.read_text().splitlines()
    numbered = [row.replace("site0", "12") for row in rows]
    names.write_text("\n".join([f"{head}\tfamily", *(f"{row}\t{n:04d}" for n, row in enumerate(numbered))]))
    first = append_shards(other, built.root)
    assert sorted(first.scans["family"].dropna()) == [f"{n:04d}" for n in range(11)]
    more = write_cohort(other.parent / "more", participants=3, seed=8)
    head, *rows = (more / "participants.tsv").read_text().splitlines()
    text = [f"{head}\tfamily", *(f"{row}\t{10234560 + n}" for n, row in enumerate(rows))]
    (more / "participants.tsv").write_text("\n".join(text))
    second = append_shards(more, built.root)
    assert sorted(second.scans["family"].iloc[-3:]) == ["10234560", "10234561", "10234562"]
    assert "family" in (built.root / "columns-more.html").read_text()
    name = str(second.shards[-1]["name"])
    (built.root / name).unlink()
    assert repair_shards(second, more, {name: "is missing"}) == {}


def test_a_participant_whose_split_is_declared_otherwise_later_is_refused(built, cohort, tmp_path):
    source = copy_of(cohort, tmp_path / "tiny")
    add_session(source, "000", 3)
    names = source / "participants.tsv"
    head, *rows = names.read_text().splitlines()
    names.write_text("\n".join([f"{head}\tsplit", *(f"{row}\ttest" for row in rows)]))
    with pytest.raises(UserError, match=r"participant tiny/\d+: split is 'test' in the cohort's table, but '"):
        append_shards(source, built.root, dataset="tiny")
    assert Manifest.load(built.root).digest == built.digest
