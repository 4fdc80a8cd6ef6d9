"""The layouts of cohorts: the files that become scans, and their rows in the tables."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.cohort.read import LAYOUTS, detect_layout, read_cohort
from infra.errors import UserError


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.arange(27, dtype=np.float32).reshape(3, 3, 3), np.eye(4)), path)
    return path


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.replace(" | ", "\t") for line in lines) + "\n")
    return path


def bids(root: Path) -> Path:
    """Raw T1 images of two participants, one with two sessions and two runs; grey-matter maps in derivatives."""
    image(root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_run-1_T1w.nii.gz")
    image(root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_run-2_T1w.nii")
    image(root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_T1w.nii.gz")
    image(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    image(root / "sub-02" / "anat" / "sub-02_T2w.nii.gz")
    image(root / "derivatives" / "cat12" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_desc-mwp1_probseg.nii.gz")
    table(
        root / "participants.tsv",
        "participant_id | age | sex | iq",
        "sub-01 | 30 | F | 101",
        "sub-02 | 41.5 | male | n/a",
    )
    return root


def ages(scans) -> dict[str, float]:
    return {scan.key: scan.age for scan in scans}


def test_bids_reads_sessions_runs_and_scans_without_a_session(tmp_path):
    scans, unlisted = read_cohort(bids(tmp_path / "ds"), modality="t1w")
    assert ages(scans) == {
        "ds_sub-01_ses-1_run-1": 30, "ds_sub-01_ses-1_run-2": 30, "ds_sub-01_ses-2": 30, "ds_sub-02_ses-1": 41.5,
    }  # fmt: skip
    assert [(s.sex, s.extra) for s in scans[2:]] == [("F", {"iq": 101.0}), ("M", {"iq": None})]
    assert unlisted == []
    assert all(scan.path.is_absolute() for scan in scans)


def test_bids_derivatives_are_read_through_the_raw_folder_or_directly(tmp_path):
    root = bids(tmp_path / "ds")
    (through_raw,), _ = read_cohort(root, modality="vbm")
    (direct,), _ = read_cohort(root / "derivatives" / "cat12", "ds", modality="vbm")
    assert through_raw == direct
    assert (direct.key, direct.age, direct.path.name) == (
        "ds_sub-01_ses-1", 30, "sub-01_ses-1_desc-mwp1_probseg.nii.gz",
    )  # fmt: skip


def test_a_parent_folder_whose_name_begins_with_sub_is_not_a_participant(tmp_path):
    scans, _ = read_cohort(bids(tmp_path / "sub-project" / "ds"), modality="t1w")
    assert {scan.participant_id for scan in scans} == {"01", "02"}


def test_sessions_tables_override_the_participants_row(tmp_path):
    root = bids(tmp_path / "ds")
    table(root / "sub-01" / "sub-01_sessions.tsv", "session_id | age", "ses-1 | 31", "ses-2 | 33")
    assert [scan.age for scan in read_cohort(root, modality="t1w")[0]] == [31, 31, 33, 41.5]
    (root / "sub-01" / "sub-01_sessions.tsv").unlink()
    table(
        root / "sessions.tsv",
        "participant_id | session_id | age | site",
        "sub-01 | ses-2 | 35 | 7",
        "sub-01 | ses-1 | n/a | 8",
    )
    scans, _ = read_cohort(root, modality="t1w")
    assert [scan.site for scan in scans] == ["8", "8", "7", ""]
    assert np.isnan(scans[0].age)
    assert [scan.age for scan in scans[2:]] == [35, 41.5]
    assert set(scans[0].extra) == {"iq"}


@pytest.mark.parametrize("name", ["session", "session_id", "ses"])
def test_a_session_column_distinguishes_the_rows_of_a_participant(tmp_path, name):
    root = bids(tmp_path / "ds")
    table(
        root / "participants.tsv",
        f"participant_id | {name} | age",
        "sub-01 | ses-1 | 20",
        "sub-01 | 2 | 22",
        "02 | x | 40",
    )
    scans, unlisted = read_cohort(root, modality="t1w")
    assert [scan.age for scan in scans] == [20, 20, 22, 40]
    assert [scan.extra for scan in scans] == [{}] * 4
    table(
        root / "participants.tsv",
        f"participant_id | {name} | age",
        "sub-01 | ses-1 | 20",
        "sub-01 | 3 | 22",
        "02 | x | 40",
    )
    scans, unlisted = read_cohort(root, modality="t1w")
    assert [scan.key for scan in unlisted] == ["ds_sub-01_ses-2"]  # no row has its session
    table(root / "participants.tsv", f"participant_id | {name} | age", "sub-01 | ses-1 | 20", "sub-01 | ses-1 | 22")
    with pytest.raises(UserError, match="line 3: participant_id '01' appears twice; keep one row each"):
        read_cohort(root, modality="t1w")


REPORT = """<?xml version="1.0"?><S><subjectmeasures><vol_TIV>Total intracranial volume</vol_TIV>
</subjectmeasures><help><subjectmeasures><vol_TIV>{tiv}</vol_TIV></subjectmeasures></help>
<qualityratings><NCR>1.9</NCR><IQR>{iqr}</IQR></qualityratings></S>"""


def cat12(root: Path) -> Path:
    image(root / "siteA" / "mri" / "mwp1sub-01_ses-2_T1w.nii")
    image(root / "siteA" / "mri" / "mwp2sub-01_ses-2_T1w.nii")  # white matter
    image(root / "siteB" / "deep" / "mri" / "mwp1IXI002-Guys-0828-T1.nii.gz")
    image(root / "mri" / "mwp1sub-03_T1w.nii")
    image(root / "mri" / "mwp1sub-09_T1w.nii")
    for folder, stem, tiv, iqr in (
        (root / "siteA", "sub-01_ses-2_T1w", "1456.78", "2.13"),
        (root / "siteB" / "deep", "IXI002-Guys-0828-T1", "1300", "NaN"),
        (root, "sub-03_T1w", "1500.5", "3.4"),
    ):
        (folder / "report").mkdir()
        (folder / "report" / f"cat_{stem}.xml").write_text(REPORT.format(tiv=tiv, iqr=iqr))
    lines = ["sub-01 | 30 | F | n/a", "IXI002 | 40 | M | 1111", "IXI00 | 99 | M | 1", "sub-03 | 50 | F | n/a"]
    table(root / "participants.tsv", "participant_id | age | sex | tiv", *lines)
    return root


def test_cat12_maps_have_the_quality_and_head_size_of_their_reports(tmp_path):
    scans, unlisted = read_cohort(cat12(tmp_path / "cat"))
    assert ages(scans) == {"cat_sub-01_ses-2": 30, "cat_sub-03_ses-1": 50, "cat_sub-IXI002_ses-1": 40}
    assert [scan.extra.get("cat12_iqr") for scan in scans] == [2.13, 3.4, None]
    assert [scan.extra["tiv"] for scan in scans] == [1456.78, 1500.5, 1111.0]  # the table's value has precedence
    assert [scan.key for scan in unlisted] == ["cat_sub-09_ses-1"]
    (tmp_path / "cat" / "report" / "cat_sub-03_T1w.xml").write_text("<S><qualityratings><IQR>3")
    scans, _ = read_cohort(tmp_path / "cat")
    assert "cat12_iqr" not in scans[1].extra  # a damaged report is ignored
    with pytest.raises(UserError, match="modality='t1w': layout cat12 has vbm only"):
        read_cohort(tmp_path / "cat", modality="t1w")


def openbhb(root: Path) -> Path:
    for part, number in (("train", "100"), ("val", "200")):
        folder = root / part / "derivatives" / f"sub-{number}" / "ses-1"
        folder.mkdir(parents=True)
        np.save(folder / f"sub-{number}_preproc-cat12vbm_desc-gm_T1w.npy", np.ones((1, 1, 121, 145, 121), np.uint8))
        np.save(folder / f"sub-{number}_preproc-quasiraw_T1w.npy", np.ones((1, 4, 4, 4), np.uint8))
        np.save(folder / f"sub-{number}_preproc-cat12vbm_desc-gm_ROI.npy", np.ones((1, 284), np.uint8))
    table(
        root / "participants.tsv", "participant_id | sex | age | site", "100 | male | 25.5 | 3", "200 | female | 60 | 4"
    )
    return root


@pytest.mark.parametrize("tables", ["root", "parts"])
def test_openbhb_reads_the_arrays_of_train_and_val(tmp_path, tables):
    root = openbhb(tmp_path / "bhb")
    if tables == "parts":
        head, train, val = (root / "participants.tsv").read_text().splitlines()
        table(root / "train" / "participants.tsv", head, train)
        table(root / "val" / "participants.tsv", head, val)
        (root / "participants.tsv").unlink()
    scans, unlisted = read_cohort(root)
    assert [(s.key, s.age, s.sex, s.site, s.extra) for s in scans] == [
        ("bhb_sub-100_ses-1", 25.5, "M", "3", {"openbhb_split": "train"}),
        ("bhb_sub-200_ses-1", 60.0, "F", "4", {"openbhb_split": "val"}),
    ]
    assert [s.path.name for s in read_cohort(root, modality="quasiraw")[0]] == [
        "sub-100_preproc-quasiraw_T1w.npy", "sub-200_preproc-quasiraw_T1w.npy",
    ]  # fmt: skip
    assert unlisted == []
    with pytest.raises(UserError, match="modality='t1w': layout openbhb has vbm and quasiraw"):
        read_cohort(root, modality="t1w")


@pytest.mark.parametrize(("ending", "mark"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_a_table_of_paths_lists_any_files_with_any_columns(tmp_path, ending, mark):
    image(tmp_path / "scans" / "a.nii.gz")
    lines = ["path;participant_id;session;age;handedness", "scans/a.nii.gz;sub-1;ses-7;20;left", "b.mgz;2;;30;n/a"]
    path = table(tmp_path / f"list{ending}", *(line.replace(";", mark) for line in lines))
    scans, unlisted = read_cohort(path)
    assert ages(scans) == {"list_sub-1_ses-7": 20, "list_sub-2_ses-1": 30}
    assert [scan.path for scan in scans] == [tmp_path / "scans" / "a.nii.gz", tmp_path / "b.mgz"]
    assert [scan.extra for scan in scans] == [{"handedness": "left"}, {"handedness": None}]
    assert unlisted == []
    table(path, *(line.replace(";", mark) for line in [*lines, ";3;;20;"]))
    with pytest.raises(UserError, match="line 4: path is empty; every row needs one"):
        read_cohort(path)


def test_the_layout_is_detected_and_an_ambiguous_one_is_refused(tmp_path):
    folders = {"bids": bids, "cat12": cat12, "openbhb": openbhb}
    for name, write in folders.items():
        assert detect_layout(write(tmp_path / name)) == name
    assert detect_layout(table(tmp_path / "list.csv", "path")) == "csv"
    assert set(LAYOUTS) == {*folders, "csv"}
    image(tmp_path / "bids" / "mri" / "mwp1sub-01.nii")
    with pytest.raises(UserError) as error:
        read_cohort(tmp_path / "bids", modality="t1w")
    assert "could be bids (sub-02/anat/sub-02_T" in str(error.value)
    assert "or cat12 (mri/mwp1sub-01.nii); choose one with --layout" in str(error.value)
    assert len(read_cohort(tmp_path / "bids", modality="t1w", layout="bids")[0]) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no known layout: no sub-.* \(bids\)"):
        read_cohort(tmp_path / "empty")
    with pytest.raises(UserError, match=r"layout='bid' is not known \(did you mean 'bids'\?\); allowed: bids, cat12"):
        read_cohort(tmp_path / "bids", layout="bid")
    (tmp_path / "scan.bin").touch()
    with pytest.raises(UserError, match="scan.bin is not a folder; give one, a table of paths"):
        read_cohort(tmp_path / "scan.bin")


def test_two_files_with_one_key_are_refused(tmp_path):
    root = bids(tmp_path / "ds")
    image(root / "sub-02" / "anat" / "sub-02_acq-b_T1w.nii.gz")
    with pytest.raises(
        UserError, match="2 files have the key ds_sub-02_ses-1, for example .* name their runs _run-1, _run-2"
    ) as error:
        read_cohort(root, modality="t1w")
    assert "anat/sub-02_T1w.nii.gz and " in str(error.value)
    assert "anat/sub-02_acq-b_T1w.nii.gz; " in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"participant_id\tage\nsub-01\t30\t1\n", "line 2 has 3 fields, the header has 2"),
        (b"", "is not a tab-separated table: it is empty"),
        (b"participant_id\tage\tage\n", "column 'age' appears twice"),
        (b"participant_id\tage\nsub-01\t\xff\xfe\n", "is not a tab-separated table: 'utf-8' codec"),
        (b"participant_id\tage\n\t30\n", "line 2: participant_id is empty; every row needs one"),
    ],
    ids=["fields", "empty", "twice", "bytes", "id"],
)
def test_a_damaged_table_is_reported_with_its_line(tmp_path, content, text):
    root = bids(tmp_path / "ds")
    (root / "participants.tsv").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_cohort(root, modality="t1w")
    assert text in str(error.value)
    assert str(root / "participants.tsv") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_missing_empty_fields_are_accepted(tmp_path):
    root = bids(tmp_path / "ds")
    (root / "participants.tsv").write_bytes(b"\xef\xbb\xbfparticipant_id\tage\tsite\r\nsub-01\t30\tx\r\nsub-02\t40\r\n")
    scans, _ = read_cohort(root, modality="t1w")
    assert [(scan.age, scan.site) for scan in scans[2:]] == [(30, "x"), (40, "")]
