"""Builds from tables with blemishes, real files and real commands: pages of columns, splits, pipes, CAT12 in a BIDS tree."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from data_pipeline.quality.rules import Quality
from data_pipeline.quality.survey import survey_cohort
from data_pipeline.shards.append import append_shards
from data_pipeline.shards.build import build_shards
from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from tests.cohorts import write_cohort


def find(cohort: Path, key: str) -> Path:
    participant, session = key.split("_")[1:3]
    return next((cohort / participant / session / "anat").glob("*.nii.gz"))


def test_a_page_says_how_each_column_was_read(tmp_path, capsys):
    cohort = write_cohort(tmp_path / "cohort", participants=6)
    text = (cohort / "participants.tsv").read_text()
    text = text.replace("\t20.0\tF", "\t240\tfemale").replace("sub-001\t", "sub-001\tNA_")
    (cohort / "participants.tsv").write_text(text.replace("NA_32.0", "NA").replace("1403", "NA"))
    rules = tmp_path / "columns.yaml"
    rules.write_text("values: {diagnosis: {AD: dementia}}\ncap: 70\nmissing: {age: [240]}")
    assert cli.run(["shards", "build", str(cohort), str(tmp_path / "out"), "--columns", str(rules)]) == 0
    assert f"how each column was read is in {tmp_path / 'out' / 'columns.html'}" in capsys.readouterr().out
    page = re.sub(r"<[^>]+>", "|", (tmp_path / "out" / "columns.html").read_text()).replace("||", "|")
    assert "|age|years|2|44|70|3|" in page  # 240 and NA are missing, 80 is capped
    assert "|sex|sex: F, M, O|0|F|M|1|" in page
    assert "|tiv|number|0|1400|1450|0|" in page
    assert "|cap: 70|1|participants.tsv line 7: &#x27;80.0&#x27; is 70|" in page
    assert "|missing of columns.yaml|1|participants.tsv line 2: &#x27;240&#x27; is missing|" in page
    assert "|values of columns.yaml|2|" in page
    assert cli.run(["cohort", "inspect", str(cohort), "--out", str(tmp_path / "i"), "--columns", str(rules)]) == 0
    inspected = re.sub(r"<[^>]+>", "|", (tmp_path / "i" / "inspect.html").read_text()).replace("||", "|")
    assert "|age|years|2|44|70|3|" in inspected
    assert "Columns of 6 scans" in capsys.readouterr().out


def test_a_pipe_and_a_folder_in_place_of_a_scan_are_quarantined(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=6)
    for number, replace in (("000", os.mkfifo), ("003", Path.mkdir)):
        path = find(cohort, f"c_sub-{number}_ses-1")
        path.unlink()
        replace(path)
    built = build_shards(cohort, tmp_path / "out")
    assert len(built.scans) == 4
    quarantine = pd.read_csv(tmp_path / "out" / "quarantine.tsv", sep="\t")
    assert quarantine["rule"].tolist() == ["file", "file"]


def test_people_declared_as_test_are_never_trained_on(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", participants=12, diagnosis=["control"])
    head, *rows = (cohort / "participants.tsv").read_text().splitlines()
    splits = ["test"] * 4 + ["pretrain"] * 8
    text = [f"{head}\tsplit", *(f"{row}\t{split}" for row, split in zip(rows, splits, strict=True))]
    (cohort / "participants.tsv").write_text("\n".join([*text[:-1], text[-1].replace("pretrain", "n/a")]))
    with pytest.raises(UserError, match="participants.tsv line 13: split='n/a' is missing"):
        build_shards(cohort, tmp_path / "out")
    other = write_cohort(tmp_path / "other", participants=12, seed=9, diagnosis=["control"])
    (cohort / "participants.tsv").write_text("\n".join(text))
    (tmp_path / "all.yaml").write_text(f"datasets: [{{path: {cohort}}}, {{path: {other}}}]")  # other declares no splits
    scans = build_shards(tmp_path / "all.yaml", tmp_path / "all").scans
    declared = scans[scans["dataset"] == "cohort"].sort_values("participant_id")
    assert declared["split"].tolist() == splits
    assert {"pretrain", "downstream"} <= set(scans.loc[scans["dataset"] == "other", "split"])


def test_a_bids_tree_with_cat12_is_scaled_by_its_head_sizes_and_rated(tmp_path):
    source = write_cohort(tmp_path / "source", participants=4)
    (source / "participants.tsv").write_text("participant_id\tage\n" + "".join(f"sub-{n:03d}\t30\n" for n in range(4)))
    for number, (tiv, iqr) in enumerate([(1500, 2.0), (1200, 2.0), (1500, 4.4), (None, None)]):
        old = find(source, f"c_sub-{number:03d}_ses-1")
        home = source / "derivatives" / "CAT12.9" / f"sub-{number:03d}" / "ses-1" / "anat"
        home.mkdir(parents=True)
        old.rename(home / f"mwp1sub-{number:03d}_ses-1_T1w.nii.gz")
        shutil.copy(
            home / f"mwp1sub-{number:03d}_ses-1_T1w.nii.gz", old.with_name(f"sub-{number:03d}_ses-1_T1w.nii.gz")
        )
        report = f"<S><vol_TIV>x</vol_TIV><subjectmeasures><vol_TIV>{tiv}</vol_TIV></subjectmeasures>"
        report += f"<qualityratings><IQR>{iqr}</IQR></qualityratings></S>"
        if tiv:
            (home / f"cat_sub-{number:03d}_ses-1_T1w.xml").write_text(report)
    built = build_shards(source, tmp_path / "out", scaling="tiv")
    scans = built.scans.sort_values("key")
    assert scans[["participant_id", "tiv", "cat12_iqr"]].to_numpy().tolist() == [
        ["000", 1500.0, 2.0],
        ["001", 1200.0, 2.0],
    ]
    excluded = pd.read_csv(tmp_path / "out" / "quarantine.tsv", sep="\t").set_index("key")["rule"]
    assert excluded["source_sub-002_ses-1"] == "cat12"
    assert "source_sub-003_ses-1" in excluded  # no head size


def copies(root: Path, *splits: str) -> Path:
    """A table of paths that lists a scan once per split, as other people; and two other scans."""
    cohort = write_cohort(root / "scans", participants=3)
    files = [find(cohort, f"c_sub-{number:03d}_ses-1") for number in range(3)]
    rows = [f"{files[0]},{person},{split}" for person, split in zip("abcd", splits, strict=False)]
    rows += [f"{files[1]},x,pretrain", f"{files[2]},y,test"]
    (root / "list.csv").write_text("\n".join(["path,participant_id,split", *rows]))
    return root / "list.csv"


@pytest.mark.parametrize("splits", [("pretrain", "test"), ("Test", "downstream"), ("pretrain", "pretrain", "test")])
@pytest.mark.parametrize("rule", ["refuse", "keep"])
def test_copies_of_one_scan_in_two_splits_are_an_error_that_names_both(tmp_path, splits, rule):
    table = copies(tmp_path, *splits)
    with pytest.raises(UserError, match=r"list_sub-a_ses-1 \(split .*\) and list_sub-[bc]_ses-1 \(split .*same voxels"):
        build_shards(table, tmp_path / "out", quality=Quality(duplicate=rule))
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="have the same voxels, so a scan would be in two splits; remove one"):
        survey_cohort(table, parts=tmp_path, quality=Quality(duplicate=rule))


def test_of_copies_in_two_data_sets_the_one_with_a_declared_split_is_kept(tmp_path):
    declared = copies(tmp_path, "test", "test")
    (tmp_path / "a.csv").write_text(f"path,participant_id\n{find(tmp_path / 'scans', 'c_sub-000_ses-1')},1\n")
    (tmp_path / "all.yaml").write_text(f"datasets: [{{path: a.csv}}, {{path: {declared.name}}}]")
    scans = build_shards(tmp_path / "all.yaml", tmp_path / "out").scans
    assert set(scans["key"]) == {"list_sub-a_ses-1", "list_sub-x_ses-1", "list_sub-y_ses-1"}
    with pytest.raises(UserError, match="split not declared"):
        build_shards(tmp_path / "all.yaml", tmp_path / "kept", quality=Quality(duplicate="keep"))


def test_a_test_copy_of_a_scan_in_the_shards_is_not_appended_in_silence(tmp_path):
    built = build_shards(copies(tmp_path, "pretrain"), tmp_path / "out")
    (tmp_path / "new.csv").write_text(
        f"path,participant_id,split\n{find(tmp_path / 'scans', 'c_sub-000_ses-1')},1,test\n"
    )
    with pytest.raises(UserError, match=r"list_sub-a_ses-1 \(split pretrain\) and new_sub-1_ses-1 \(split test\)"):
        append_shards(tmp_path / "new.csv", tmp_path / "out")
    assert Manifest.load(tmp_path / "out").digest == built.digest


def test_a_path_that_is_too_long_is_quarantined(tmp_path):
    table = copies(tmp_path, "pretrain")
    table.write_text(table.read_text() + f"\n{'x' * 5000}.nii,long,pretrain\n{'y/' * 3000}z.npy,deep,pretrain")
    assert len(build_shards(table, tmp_path / "out").scans) == 3
    quarantine = pd.read_csv(tmp_path / "out" / "quarantine.tsv", sep="\t")
    assert quarantine["key"].tolist() == ["list_sub-deep_ses-1", "list_sub-long_ses-1"]
    assert quarantine["reason"].str.contains("File name too long").all()
