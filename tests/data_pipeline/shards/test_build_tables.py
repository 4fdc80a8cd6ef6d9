"""Builds from tables with blemishes, real files and real commands: pages of columns, splits, pipes, CAT12 in a BIDS tree."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from data_pipeline.shards.build import build_shards
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
