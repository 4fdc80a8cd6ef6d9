"""What stands beside the cells: sidecars in any case, labels as written, units in names, rows and scans without each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from data_pipeline.cohort.cells import as_yaml
from data_pipeline.cohort.read import read_cohort, read_with_changes
from data_pipeline.shards.build import build_shards
from infra.errors import UserError
from tests.cohorts import write_cohort
from tests.data_pipeline.cohort.test_cohort import cat12, openbhb, table
from tests.data_pipeline.cohort.test_declarations import read_table, refusal


def describe(tmp_path: Path, content: object) -> None:
    (tmp_path / "people.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "content",
    [
        {"Age": {"Units": "months"}}, {"age": {"units": "months"}}, {"age": {"Unit": "months"}},
        {"AGE": {"UNITS": "Months"}}, {"\ufeffage ": {"unit": "mo"}}, {"age": {"Units": "months"}, "Age": {}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", ["age", "Age"])
def test_units_are_read_in_any_case(tmp_path, content, head):
    describe(tmp_path, content)
    assert read_table(tmp_path, head, "588")[0].age == 49.0


def test_two_keys_that_differ_in_case_are_named(tmp_path, capsys):
    describe(tmp_path, {"age": {}, "Age": {"Units": "months"}})
    assert read_table(tmp_path, "age", "49")[0].age == 49.0
    assert "people.json: the keys age, Age are one name; age is read" in capsys.readouterr().err


def test_levels_are_read_in_any_case_and_labels_are_words_as_written(tmp_path):
    describe(tmp_path, {"Drug": {"levels": {"0": "None", "1": {"description": "lithium"}, "2": "NA", "9": "n/a"}}})
    scans = read_table(tmp_path, "drug", *["0", "1", "2", "9", "n/a"])
    assert [scan.extra["drug"] for scan in scans] == ["None", "lithium", "NA", None, None]


def test_codes_without_a_label_are_named_with_their_number(tmp_path, capsys):
    describe(tmp_path, {"diagnosis": {"Levels": {"0": "control", "1": "AD"}}, "iq": {"Levels": {"-9": "n/a"}}})
    scans = read_table(tmp_path, "diagnosis,iq", *["0,-9", "1,100", "2,101", "2,102", "3,103", "MCI,104"])
    assert [scan.extra["diagnosis"] for scan in scans] == ["control", "AD", "2", "2", "3", "MCI"]
    error = capsys.readouterr().err
    assert "people: diagnosis: '2' in 2 cells, '3' in 1 cell has no label in Levels of people.json" in error
    assert error.count("\n") == 1  # iq has no labels


@pytest.mark.parametrize("levels", [["control", "AD"], "0: control", 3])
def test_levels_of_another_form_are_said_not_to_be_read(tmp_path, capsys, levels):
    describe(tmp_path, {"group": {"Levels": levels}})
    assert [scan.extra["group"] for scan in read_table(tmp_path, "group", "0", "1")] == [0.0, 1.0]
    assert "people.json: group: Levels is not read, it must map each code to its label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "unit"),
    [("age_months", "months"), ("age_years", "years"), ("AgeInMonths", "months"), ("age_at_scan", "years"),
     ("Age (days)", "days"), ("scan_age", "years")],
)  # fmt: skip
def test_a_column_that_could_be_the_age_is_named_with_the_line_to_type(tmp_path, capsys, name, unit):
    read_table(tmp_path, f"{name},hand", "49,L", "50,R")
    error = capsys.readouterr().err
    assert f"no column is named age, so no scan has an age; if {name!r} holds it, declare `columns: {{age: " in error
    assert f"`units: {{age: {unit}}}`" in error
    columns = error.partition("`")[2].partition("`")[0]
    (scan, _) = read_table(tmp_path, f"{name},hand", "49,L", "50,R", declare=f"{columns}\nunits: {{age: {unit}}}")
    assert scan.age == pytest.approx(49 / {"years": 1, "months": 12, "days": 365.25}[unit])
    assert scan.extra == {"hand": "L"}


@pytest.mark.parametrize("name", ["stage", "language", "percentage", "average", "age_group", "manager"])
def test_other_columns_are_not_taken_for_ages(tmp_path, capsys, name):
    read_table(tmp_path, name, "old", "young")
    read_table(tmp_path, f"age,{name}", "3,4")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("val", ["participant_id | age\n200 | 60", "participant_id | age"])
def test_each_table_of_openbhb_has_its_own_column_of_sessions(tmp_path, val):
    root = openbhb(tmp_path / "bhb")
    (root / "participants.tsv").unlink()
    rows = ["100 | 2 | 62", "200 | 1 | 60"] if val.endswith("age") else ["100 | 2 | 62"]
    table(root / "train" / "participants.tsv", "participant_id | session | age", *rows)
    table(root / "val" / "participants.tsv", *val.split("\n"))
    scans, (unlisted,) = read_cohort(root)
    assert [(scan.participant_id, scan.age) for scan in scans] == [("200", 60.0)]
    assert unlisted.unlisted.startswith("participants.tsv has no row for ses-1 of the participant, only for ses-2; add")


def test_the_message_names_runs_that_have_rows(tmp_path):
    root = openbhb(tmp_path / "bhb")
    head = "participant_id | run | age"
    table(root / "participants.tsv", head, "100 | 2 | 62", "100 | 3 | 62", "200 | n/a | 60")
    _, (unlisted,) = read_cohort(root)
    assert "no row for ses-1 of the participant, only for ses-1 run-2, ses-1 run-3" in unlisted.unlisted


def test_rows_without_a_scan_and_scans_without_a_row_are_named(tmp_path, capsys):
    cohort = write_cohort(tmp_path / "c", participants=4)
    path = cohort / "participants.tsv"
    path.write_text(path.read_text().replace("sub-001\t", "sub-x\t") + "sub-y\t30\tF\ta\tcontrol\t1400\n")
    found = read_with_changes(cohort)
    assert found.without_scan == ["participants.tsv line 3: sub-x", "participants.tsv line 6: sub-y"]
    assert [scan.participant_id for scan in found.unlisted] == ["001"]
    build_shards(cohort, tmp_path / "out")
    assert (
        "2 rows of the tables have no scan that can be read, for example participants.tsv line 3"
        in capsys.readouterr().err
    )
    page = (tmp_path / "out" / "columns.html").read_text()
    assert "<td>rows of tables without a scan</td><td>2</td>" in page
    assert "<td>scans without a row</td><td>1</td>" in page
    (tmp_path / "key").write_bytes(b"k" * 16)
    hidden = read_with_changes(cohort, key_file=tmp_path / "key").without_scan
    assert hidden == ["participants.tsv line 3", "participants.tsv line 6"]


@pytest.mark.parametrize("layout", ["bids", "cat12", "openbhb"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, layout):
    write = {"bids": lambda root: write_cohort(root, participants=3), "cat12": cat12, "openbhb": openbhb}[layout]
    place = {"bids": "sub-001/ses-1", "cat12": "siteB/deep", "openbhb": "val/derivatives/sub-200"}[layout]
    root, scandir = write(tmp_path / "ds"), os.scandir

    def refuse(path="."):
        if str(path) == str(root / place):  # root may read every folder, so permissions cannot be tested as root
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{place} cannot be read: Permission denied; change its permissions"):
        read_cohort(root, layout=layout)


@pytest.mark.parametrize(
    "text", ["23,5", "a: b", "[x", "it's", "-", "#1", "'", "- x", "{", "ä", "x y", "a\\b", "999", "-9", "?", "*a"]
)
def test_texts_in_advice_are_one_yaml_value_that_reads_as_the_text(tmp_path, text):
    assert yaml.load(f"missing: {{iq: [{as_yaml(text)}]}}", yaml.BaseLoader) == {"missing": {"iq": [text]}}


def test_the_advice_for_a_decimal_comma_is_a_decimal_point(tmp_path):
    message = refusal(tmp_path, "age", '"23,5"', "23", "5")
    assert "age='23,5' is not a number of years in 0..130; write decimal points: 23.5" in message
    assert "missing" not in message
    assert "`missing: {age: ['2 years']}`" in refusal(tmp_path, "age", "2 years")
    message = refusal(tmp_path, "iq", '"23,5"', "23", "5")
    assert "write decimal points" in message
    assert "missing" not in message
