"""Tables with blemishes: what they state is read, or the message names the cell; nothing is dropped in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cohort.read import is_simulated, read_cohort, read_with_changes
from infra.errors import UserError
from tests.data_pipeline.cohort.test_cohort import REPORT, image, table
from tests.data_pipeline.cohort.test_declarations import read_table, refusal


def columns(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "columns.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("mark", ["", "n/a", "N/A", "NA", "NaN", "nan", "null", "NULL", "None", ".", "<NA>"])
def test_every_mark_of_a_missing_value_is_missing_in_every_column(tmp_path, mark):
    row = f"{mark},{mark},{mark},{mark},{mark}"
    first, second = read_table(tmp_path, "age,sex,site,tiv,hand", row, "30,F,a,1400,left")
    assert np.isnan(first.age)
    assert (first.sex, first.site, first.extra) == ("", "", {"tiv": None, "hand": None})
    assert second.extra == {"tiv": 1400.0, "hand": "left"}


@pytest.mark.parametrize("text", ["large", "137cm", "-", "1_000", "inf", "1e999", "12,5", "1400 ml", "٣"])
def test_a_text_in_a_column_of_numbers_names_its_cell(tmp_path, text):
    rows = [str(100 + n) for n in range(9)]
    cell = f'"{text}"'
    message = refusal(tmp_path, "tiv", *rows[:5], cell, *rows[5:])
    assert f"people.csv line 7: tiv={text!r} is not a number, but 9 of the column's 10 values are" in message
    declared = read_table(tmp_path, "tiv", *rows[:5], cell, *rows[5:], declare=f"missing: {{tiv: ['{text}']}}")
    assert [scan.extra["tiv"] for scan in declared].count(None) == 1
    as_text = read_table(tmp_path, "tiv", *rows[:5], cell, *rows[5:], declare="types: {tiv: text}")
    assert {scan.extra["tiv"] for scan in as_text} == {*rows, text}


def test_a_column_of_words_with_a_few_numbers_keeps_its_text_unless_it_is_declared(tmp_path):
    rows = ["left", "right", "left", "7"]
    assert [scan.extra["hand"] for scan in read_table(tmp_path, "hand", *rows)] == rows
    assert "line 2: hand='left' is not a number" in refusal(tmp_path, "hand", *rows, declare="types: {hand: number}")


@pytest.mark.parametrize(
    "names", [("007", "7"), ("10234560", "0010234560"), ("12345678901234567", "12345678901234568")]
)
def test_names_of_digits_keep_their_text(tmp_path, names):
    assert {scan.extra["family"] for scan in read_table(tmp_path, "family", *names)} == set(names)
    declared = read_table(tmp_path, "family", *names, declare="types: {family: number}")
    assert [scan.extra["family"] for scan in declared] == [float(name) for name in names]


def test_families_that_are_numbers_in_one_data_set_and_words_in_another_keep_their_text(tmp_path):
    families = [str(10234560 + n) for n in range(12)]
    table(tmp_path / "a.csv", "path,participant_id,family", *(f"{n}.nii,{n},{f}" for n, f in enumerate(families)))
    table(tmp_path / "b.csv", "path,participant_id,family", "x.nii,1,F12", "y.nii,2,F13")
    (tmp_path / "all.yaml").write_text("datasets: [{path: a.csv}, {path: b.csv}]")
    scans, _ = read_cohort(tmp_path / "all.yaml")
    assert {scan.extra["family"] for scan in scans} == {*families, "F12", "F13"}


@pytest.mark.parametrize(
    ("unit", "text", "years"),
    [
        ("months", "588", 49), ("Months", "6", 0.5), ("weeks", "40", 40 * 7 / 365.25), ("days", "3652.5", 10),
        ("years", "49", 49), ("yr", "49", 49), ("n/a", "49", 49),
    ],
)  # fmt: skip
def test_units_of_the_sidecar_convert_ages(tmp_path, capsys, unit, text, years):
    (tmp_path / "people.json").write_text(json.dumps({"age": {"Units": unit}}))
    (scan,) = read_table(tmp_path, "age", text)
    assert scan.age == pytest.approx(years)
    assert "warning" not in capsys.readouterr().err


def test_units_may_be_declared_and_unknown_ones_are_refused(tmp_path):
    (tmp_path / "people.json").write_text(json.dumps({"age": {"Units": "moons"}, "tiv": {"Units": "mm3"}}))
    assert "people.json: age: Units='moons' is not a known unit; allowed: years" in refusal(
        tmp_path, "age,tiv", "588,1"
    )
    (scan,) = read_table(tmp_path, "age,tiv", "588,1400000", declare="units: {age: months}")
    assert (scan.age, scan.extra["tiv"]) == (49.0, 1400.0)
    assert "units.age='fortnights' is not a known unit" in refusal(
        tmp_path, "age", "1", declare="units: {age: fortnights}"
    )
    assert "age='1600' is not a number of years in 0..130" in refusal(
        tmp_path, "age", "1600", declare="units: {age: months}"
    )


def test_a_cap_does_not_hide_ages_in_months(tmp_path, capsys):
    with pytest.raises(UserError, match="age='588' is not a number of years in 0..130.*declare `units: {age: months}`"):
        read_table(tmp_path, "age", "588", declare="cap: 89")
    ages = "\n".join(["age", *["120"] * 20])
    assert {scan.age for scan in read_table(tmp_path, *ages.splitlines(), declare="cap: 89")} == {89.0}
    assert "look like months (20 of 20 are above 100)" in capsys.readouterr().err
    (scan,) = read_table(tmp_path, "age", "1188", declare="cap: 89\nunits: {age: months}")
    assert scan.age == 89


def test_ages_that_look_like_months_are_warned_of(tmp_path, capsys):
    read_table(tmp_path, "age", *(str(60 + 3 * n) for n in range(20)))
    assert "ages are read as years, but look like months (6 of 20 are above 100)" in capsys.readouterr().err
    read_table(tmp_path, "age_months", "49", declare="columns: {age: age_months}")
    assert "the table calls them months" in capsys.readouterr().err
    read_table(tmp_path, "age_months", "49", declare="columns: {age: age_months}\nunits: {age: years}")
    read_table(tmp_path, "age", *(str(60 + n) for n in range(40)))
    assert capsys.readouterr().err == ""


def test_labels_of_the_sidecar_replace_codes_but_not_words(tmp_path):
    levels = {
        "sex": {"Levels": {"1": "male", "2": "female"}},
        "diagnosis": {"Levels": {"0": "control", "1": {"Description": "schizophrenia"}, "AD": "Alzheimer, NINCDS"}},
        "hand": {"Levels": {"R": "right", "L": "left"}},
        "tiv": {"Levels": {"-9": "n/a"}},
    }
    (tmp_path / "people.json").write_text(json.dumps(levels))
    scans, _, changes, _ = read_with_changes(
        table(tmp_path / "people.csv", "path,participant_id,sex,diagnosis,hand,tiv", "a.nii,1,1,0,R,1400",
              "b.nii,2,2,1,L,-9", "c.nii,3,F,AD,R,1500")
    )  # fmt: skip
    assert [scan.sex for scan in scans] == ["M", "F", "F"]
    assert [scan.extra["diagnosis"] for scan in scans] == ["control", "schizophrenia", "AD"]
    assert [scan.extra["hand"] for scan in scans] == ["right", "left", "right"]
    assert [scan.extra["tiv"] for scan in scans] == [1400.0, None, 1500.0]
    assert [change for change in changes if change.column == "tiv"] == [
        ("tiv", f"{tmp_path / 'people.csv'} line 3", "-9", "missing", "Levels of people.json")
    ]
    own_rule = read_table(tmp_path, "sex", "1", "2", declare="values: {sex: {1: F, 2: M}}")
    assert [scan.sex for scan in own_rule] == ["F", "M"]  # what the user declares precedes the sidecar


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"", b"{", b'"x"', b'{"age": 3}', b"\xff\xfe\x00", b"[" * 100_000, b"\x80"]
)
def test_a_damaged_sidecar_is_named_and_the_rest_is_read(tmp_path, capsys, content):
    (tmp_path / "people.json").write_bytes(content)
    assert read_table(tmp_path, "age", "49")[0].age == 49.0
    error = capsys.readouterr().err
    assert "people.json" in error
    assert "ignored" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_dataset_description_is_read_in_any_unicode_encoding(tmp_path, encoding):
    path = tmp_path / "dataset_description.json"
    path.write_text('{"Name": "Köln", "Simulated": true}', encoding=encoding)
    assert is_simulated(tmp_path)


@pytest.mark.parametrize("content", ["", "null", "[true]", "{"])
def test_a_damaged_dataset_description_is_named(tmp_path, capsys, content):
    (tmp_path / "dataset_description.json").write_text(content)
    assert not is_simulated(tmp_path)
    assert "dataset_description.json is ignored" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["89+", ">89", ">= 89", "≥89", "89 or older", "90+"])
def test_a_lower_bound_of_an_age_needs_a_cap_which_holds_for_all(tmp_path, text):
    message = refusal(tmp_path, "age", "30", text)
    assert f"line 3: age={text!r} is a lower bound" in message
    assert "declare `cap: {age: " in message
    scans = read_table(tmp_path, "age", "30", text, "95", declare="cap: 89")
    assert [scan.age for scan in scans] == [30.0, 89.0, 89.0]
    assert "age='70+' may be below the declared cap of 89" in refusal(tmp_path, "age", "70+", declare="cap: 89")


def test_a_rule_for_one_value_leaves_the_others(tmp_path):
    scans = read_table(
        tmp_path, "age,group", "89+,1", "30,2", "n/a,x", declare="values: {age: {89+: 89}, group: {1: AD}}"
    )
    assert [scan.age for scan in scans[:2]] == [89.0, 30.0]
    assert [scan.extra["group"] for scan in scans] == ["AD", "2", "x"]
    (scan, _) = read_table(tmp_path, "hand", "NA", "R", declare="values: {hand: {NA: neither}}")
    assert scan.extra["hand"] == "neither"  # a rule precedes the marks of missing values
    assert "values.age.only must be true or false" in refusal(
        tmp_path, "age", "1", declare="values: {age: {1: 2, only: maybe}}"
    )


SPLITS = ["test"] * 5 + ["pretrain"] * 4 + ["monitor"]


@pytest.mark.parametrize("mark", ["n/a", "", "NA"])
def test_a_missing_split_is_an_error_or_takes_the_declared_default(tmp_path, mark):
    message = refusal(tmp_path, "split", *SPLITS, mark)
    assert f"people.csv line 12: split={mark!r} is missing, while other rows have one" in message
    scans = read_table(tmp_path, "split", *SPLITS, mark, declare="default: {split: downstream}")
    assert sorted(scan.extra["split"] for scan in scans) == sorted([*SPLITS, "downstream"])


def test_the_column_split_is_read_although_the_declared_columns_forget_it(tmp_path):
    scans = read_table(tmp_path, "AGE,split", *(f"30,{split}" for split in SPLITS), declare="columns: {age: AGE}")
    assert sorted(scan.extra["split"] for scan in scans) == sorted(SPLITS)


def test_a_participant_in_two_splits_is_refused(tmp_path):
    path = table(tmp_path / "l.csv", "path,participant_id,session,split", "a.nii,1,1,pretrain", "b.nii,1,2,test")
    with pytest.raises(
        UserError, match=r"line 3: split='test', but .*line 2: split='pretrain' for the same participant"
    ):
        read_cohort(path)


def two_sessions(root: Path, *rows: str) -> Path:
    for session in ("1", "2"):
        image(root / "sub-01" / f"ses-{session}" / "anat" / f"sub-01_ses-{session}_T1w.nii.gz")
    image(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    table(root / "participants.tsv", "participant_id | session_id | age | sex", *rows, "sub-02 | n/a | 40 | M")
    return root


def test_a_scan_without_the_row_of_its_session_is_not_given_another_row(tmp_path):
    root = two_sessions(tmp_path / "ds", "sub-01 | ses-2 | 62 | F")
    scans, (unlisted,) = read_cohort(root, modality="t1w")
    assert [(scan.key, scan.age) for scan in scans] == [("ds_sub-01_ses-2", 62), ("ds_sub-02_ses-1", 40)]
    assert unlisted.key == "ds_sub-01_ses-1"
    assert unlisted.unlisted.startswith("participants.tsv has no row for ses-1 of the participant, only for ses-2; add")
    declared = columns(tmp_path, "person: [sex]")
    scans, unlisted = read_cohort(root, modality="t1w", columns=declared)
    assert [(scan.session, scan.sex) for scan in scans] == [("1", "F"), ("2", "F"), ("1", "M")]
    assert np.isnan(scans[0].age)
    assert unlisted == []


def test_ses_01_and_ses_1_are_told_apart(tmp_path):
    root = two_sessions(tmp_path / "ds", "sub-01 | ses-01 | 60 | F", "sub-01 | ses-2 | 62 | F")
    _, (unlisted,) = read_cohort(root, modality="t1w")
    assert "ses-01 and ses-1 are different names, write them alike" in unlisted.unlisted


def test_a_sessions_table_without_the_session_gives_no_row(tmp_path):
    root = two_sessions(tmp_path / "ds")
    table(root / "participants.tsv", "participant_id | age | sex", "sub-01 | 60 | F", "sub-02 | 40 | M")
    table(root / "sub-01" / "sub-01_sessions.tsv", "session_id | age", "ses-2 | 62")
    scans, (unlisted,) = read_cohort(root, modality="t1w")
    assert [scan.age for scan in scans] == [62, 40]
    assert "sub-01_sessions.tsv has no row for ses-1" in unlisted.unlisted


def test_columns_of_a_person_must_not_change(tmp_path):
    root = two_sessions(tmp_path / "ds", "sub-01 | ses-3 | 62 | F", "sub-01 | ses-2 | 62 | M")
    with pytest.raises(UserError, match="line 3: sex='M' differs from 'F' in the participant's other row"):
        read_cohort(root, modality="t1w", columns=columns(tmp_path, "person: [sex]"))


def test_the_same_session_with_and_without_prefix_is_twice(tmp_path):
    root = two_sessions(tmp_path / "ds", "sub-01 | ses-2 | 62 | F", "sub-01 | 2 | 63 | F")
    with pytest.raises(UserError, match="line 3: participant_id '01' appears twice"):
        read_cohort(root, modality="t1w")


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"])
def test_tables_are_utf_8_or_utf_16_and_others_are_refused_with_the_line_to_type(tmp_path, ending, encoding):
    mark = "," if ending == ".csv" else "\t"
    text = "\n".join(mark.join(row) for row in (["path", "participant_id", "site"], ["a.nii", "1", "Köln"])) + "\n"
    path = tmp_path / f"people{ending}"
    path.write_bytes(text.encode(encoding))
    if encoding in ("utf-8-sig", "utf-16"):
        assert read_cohort(path)[0][0].site == "Köln"
        return
    with pytest.raises(UserError) as error:
        read_cohort(path)
    command = str(error.value).partition("convert it: ")[2].partition(" (if")[0]
    assert os.system(f"cd {tmp_path} && {command}") == 0
    assert read_cohort(path)[0][0].site == "Köln"


def test_hidden_files_and_folders_are_no_scans(tmp_path):
    root = two_sessions(tmp_path / "ds", "sub-01 | 1 | 60 | F", "sub-01 | 2 | 62 | F")
    anat = root / "sub-02" / "anat"
    (anat / "._sub-02_T1w.nii.gz").write_bytes(b"\0\5\26\7")
    (anat / ".sub-02_T1w.nii.gz").write_bytes(b"")
    image(root / ".git" / "annex" / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
    image(root / "sub-02" / ".trash" / "anat" / "sub-02_T1w.nii.gz")
    scans, unlisted = read_cohort(root, modality="t1w")
    assert len(scans) == 3
    assert unlisted == []


def test_cat12_inside_a_bids_tree_has_its_reports(tmp_path):
    root = tmp_path / "ds"
    for number, iqr in (("01", "2.1"), ("02", "4.4")):
        image(root / f"sub-{number}" / "ses-1" / "anat" / f"sub-{number}_ses-1_T1w.nii.gz")
        home = root / "derivatives" / "CAT12.8.2_2170" / f"sub-{number}" / "ses-1" / "anat"
        image(home / f"mwp1sub-{number}_ses-1_T1w.nii")
        image(home / f"mwp2sub-{number}_ses-1_T1w.nii")
        (home / f"cat_sub-{number}_ses-1_T1w.xml").write_text(REPORT.format(tiv=f"14{number}.5", iqr=iqr))
    table(root / "participants.tsv", "participant_id | age", "sub-01 | 30", "sub-02 | 40")
    for source in (root, root / "derivatives" / "CAT12.8.2_2170"):
        scans, unlisted = read_cohort(source, "ds")
        assert [(s.key, s.age, s.extra) for s in scans] == [
            ("ds_sub-01_ses-1", 30.0, {"cat12_iqr": 2.1, "tiv": 1401.5}),
            ("ds_sub-02_ses-1", 40.0, {"cat12_iqr": 4.4, "tiv": 1402.5}),
        ]
        assert unlisted == []


def test_a_byte_of_0_in_one_cell_is_not_taken_for_utf_16(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"path,participant_id,hand\na.nii,1,left\nb.nii,2,ri\0ght\n")
    with pytest.raises(UserError, match=r"has a byte of 0 in line 3; remove it: tr -d '\\000' < '.*t.csv' > new"):
        read_cohort(path)
    path.write_bytes("path,participant_id\na.nii,1\n".encode("utf-16-le"))
    with pytest.raises(UserError, match="iconv -f UTF-16LE"):
        read_cohort(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_that_is_cut_off_in_a_character_is_not_taken_for_latin_1(tmp_path, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes("path,participant_id\na.nii,1\n".encode(encoding)[:-1])
    with pytest.raises(
        UserError, match=f"its mark says {encoding}, but it has no character at byte .* copy it again"
    ) as error:
        read_cohort(path)
    assert "iconv" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,participant_id\n", "people.csv has a header and no rows; add a row for each scan"),
        ("path,participant_id\n.,1\n", "line 2: path='.' means a missing value; every row needs one"),
        ("path,participant_id\na.nii,NA\n", "line 2: participant_id='NA' means a missing value"),
        ("path,participant_id\na,p.0\nb,p-0\n", "'p.0' and 'p-0' both become 'p-0' in the key people_sub-p-0_ses-1"),
        ("path,participant_id,session\na,1,x 1\nb,1,x.1\n", "'x 1' and 'x.1' both become 'x-1' in the key"),
        ("path,participant_id,session,ses\na,1,1,2\n", "the columns session and ses, which all name sessions"),
        ("", "it is empty"), ("\n \n\n", "it is empty"),
    ],
)  # fmt: skip
def test_a_message_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_cohort(tmp_path / "people.csv")
    assert message in str(error.value)
