"""Nobody whom a table declares as test is in pretrain, however the table is written; or the message names the cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline.cohort.read import read_cohort
from data_pipeline.cohort.split import parse_splits
from infra.errors import UserError
from tests.data_pipeline.cohort.test_cohort import image, table
from tests.data_pipeline.cohort.test_declarations import read_table, refusal

SPLITS = ["test", "test", "pretrain", "monitor"]


def splits_of(scans) -> list[str]:
    return [scan.extra["split"] for scan in sorted(scans, key=lambda scan: scan.participant_id)]


def bids(root: Path, head: str, *rows: str, sessions: tuple[str, ...] = ("1",), people: int = 2) -> Path:
    """A BIDS folder of grey-matter maps with a participants.tsv."""
    for person in range(1, people + 1):
        for session in sessions:
            name = f"sub-0{person}_ses-{session}_desc-mwp1_probseg.nii.gz"
            image(root / f"sub-0{person}" / f"ses-{session}" / "anat" / name)
    table(root / "participants.tsv", head, *rows)
    return root


@pytest.mark.parametrize(
    "name", ["Split", "SPLIT", "\ufeffsplit", " split", "split\u200b", "\u00a0Split ", "ｓｐｌｉｔ"]
)
def test_the_column_split_is_found_in_any_case_and_with_marks_around_it(tmp_path, capsys, name):
    assert splits_of(read_table(tmp_path, name, *SPLITS)) == SPLITS
    assert (
        splits_of(read_table(tmp_path, f"{name},AGE", *(f"{s},3" for s in SPLITS), declare="columns: {age: AGE}"))
        == SPLITS
    )
    assert capsys.readouterr().err == ""


def test_known_columns_are_found_in_any_case(tmp_path):
    head = "Participant_ID | Session_ID | Age | SEX | Site | Diagnosis | Hand"
    rows = [
        "sub-01 | ses-1 | 30 | f | a | AD | L",
        "sub-01 | ses-2 | 32 | f | a | AD | R",
        "sub-02 | ses-1 | 40 | m | b | n/a | L",
    ]
    scans, unlisted = read_cohort(bids(tmp_path / "ds", head, *rows, sessions=("1", "2")))
    assert [(scan.age, scan.sex, scan.site) for scan in scans] == [(30, "F", "a"), (32, "F", "a"), (40, "M", "b")]
    assert scans[0].extra == {"diagnosis": "AD", "Hand": "L"}
    assert [scan.key for scan in unlisted] == ["ds_sub-02_ses-2"]


def test_declarations_name_known_columns_in_any_case(tmp_path):
    (scan, _) = read_table(
        tmp_path, "Age,SPLIT", "999,test", "30,test", declare="missing: {AGE: [999]}\ncolumns: {Age: age}"
    )
    assert (scan.age != scan.age, scan.extra) == (True, {"split": "test"})
    assert "columns: 'age' and 'Age' are both 'age'; keep one" in refusal(
        tmp_path, "a,b", "1,2", declare="columns: {age: a, Age: b}"
    )


@pytest.mark.parametrize(("first", "second"), [("split", "Split"), ("Age", "AGE"), ("sex", "\ufeffsex")])
def test_two_columns_that_become_equal_are_an_error_that_names_both(tmp_path, first, second):
    message = refusal(tmp_path, f"{first},{second}", "1,1")
    assert f"the columns {first!r} and {second!r} are both {first.lower()!r}; keep one of them" in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("set", ["train", "test", "val"]), ("train_test", ["Train", "TEST"]), ("fold", ["training", "held-out", "training"]),
        ("partition", ["pretrain", "test"]), ("group", ["train", "test", "spare"]), ("is_test", ["0", "1"]),
        ("data split", ["a", "b"]), ("Splits", ["1", "2"]), ("usage", ["test", "other"]), ("x", ["test", "test"]),
    ],
)  # fmt: skip
def test_a_column_that_looks_like_a_split_is_declared_or_left_out(tmp_path, name, values):
    for declare in ("", "columns: {hand: hand}"):
        message = refusal(tmp_path, f"hand,{name}", *(f"L,{value}" for value in values), declare=declare)
        assert f"the column {name!r} (" in message
        assert "looks like a split, but nothing reads it as one; declare `columns: {split: " in message
    advice = message.partition("`columns: {split")[2].partition("`")[0]
    rows = [f"L,{value}" for value in values]
    scans = read_table(tmp_path, f"hand,{name}", *rows, declare=f"columns: {{split{advice}")
    assert len(splits_of(scans)) == len(values)
    assert scans[0].extra["hand"] == "L"  # the advice keeps the other columns
    scans = read_table(tmp_path, f"hand,{name}", *rows, declare=f"columns: {{'{name}': null}}")
    assert scans[0].extra == {"hand": "L"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fold", ["0", "1", "2"]), ("test", ["12", "14", "9"]), ("group", ["control", "patient"]), ("set", ["a", "b"]),
        ("test_score", ["1.5", "2"]), ("condition", ["training", "training"]), ("stage", ["development", "control"]),
    ],
)  # fmt: skip
def test_other_columns_are_columns_like_before(tmp_path, capsys, name, values):
    assert all(set(scan.extra) == {name} for scan in read_table(tmp_path, name, *values))
    assert capsys.readouterr().err == ""


def test_beside_a_split_a_similar_column_is_named(tmp_path, capsys):
    read_table(tmp_path, "split,set", *(f"{split},train" for split in SPLITS[:3]), "pretrain,test")
    assert (
        "the column 'set' (train, test) looks like a split; it is not used, the column 'split' decides"
        in capsys.readouterr().err
    )


def test_a_sessions_table_without_splits_leaves_those_of_the_participants(tmp_path):
    rows = ["sub-01 | pretrain | F", "sub-02 | test | M"]
    root = bids(tmp_path / "ds", "participant_id | split | sex", *rows, sessions=("1", "2"))
    marks = [
        "sub-01 | ses-1 | n/a | n/a",
        "sub-01 | ses-2 |  | n/a",
        "sub-02 | ses-1 | NA | n/a",
        "sub-02 | ses-2 | . | n/a",
    ]
    table(root / "sessions.tsv", "participant_id | session_id | split | sex", *marks)
    scans, _ = read_cohort(root)
    assert [(scan.extra["split"], scan.sex) for scan in scans] == [("pretrain", "F")] * 2 + [("test", "M")] * 2


@pytest.mark.parametrize("place", ["sessions.tsv", "sub-02/sub-02_sessions.tsv"])
@pytest.mark.parametrize("session", ["1", "2"])  # the second has no scan
def test_two_splits_at_two_levels_are_an_error_that_names_both_cells(tmp_path, place, session):
    root = bids(tmp_path / "ds", "participant_id | split", "sub-01 | pretrain", "sub-02 | test")
    table(
        root / place, "participant_id | session_id | Split",
        *(f"sub-02 | ses-{number} | {'pretrain' if number == session else 'test'}" for number in ("1", "2")),
    )  # fmt: skip
    with pytest.raises(UserError) as e:
        read_cohort(root)
    assert re.search(r"sessions.tsv line \d: split='pretrain'", str(e.value))
    assert re.search(r".tsv line \d: split='test'", str(e.value))
    assert "for the same participant; all scans of a participant belong to one split" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_derivative_has_the_splits_of_the_raw_sessions_tables(tmp_path):
    raw = bids(tmp_path / "raw", "participant_id", "sub-01", "sub-02")
    for person in ("01", "02"):
        image(raw / "derivatives" / "cat12" / f"sub-{person}" / "ses-1" / "anat" / f"mwp1sub-{person}_ses-1_T1w.nii")
        table(
            raw / f"sub-{person}" / f"sub-{person}_sessions.tsv", "session_id | split", f"ses-1 | {SPLITS[int(person)]}"
        )
    scans, _ = read_cohort(raw / "derivatives" / "cat12", "raw")
    assert splits_of(scans) == SPLITS[1:3]


def test_a_row_without_a_scan_declares_the_split_of_its_participant(tmp_path):
    head = "participant_id | session | split"
    rows = ["sub-01 | 1 | pretrain", "sub-01 | 2 | test", "sub-02 | 1 | pretrain"]
    with pytest.raises(
        UserError, match=r"line 3: split='test', but .* line 2: split='pretrain' for the same participant"
    ):
        read_cohort(bids(tmp_path / "two", head, *rows))
    scans, _ = read_cohort(bids(tmp_path / "one", head, rows[0].replace("pretrain", "n/a"), *rows[1:]))
    assert splits_of(scans) == ["test", "pretrain"]
    (tmp_path / "c.yaml").write_text("person: [sex]\ndefault: {split: pretrain}")
    scans, _ = read_cohort(
        bids(tmp_path / "none", f"{head} | sex", f"{rows[1]} | F", f"{rows[2]} | M"), columns=tmp_path / "c.yaml"
    )
    assert splits_of(scans) == ["test", "pretrain"]  # the scan of session 1 has no row of its own


@pytest.mark.parametrize("mark", ["\t", ","])
def test_a_stray_quote_does_not_take_the_cells_of_other_rows(tmp_path, mark):
    rows = ['sub-01|"5 foot|test', "sub-02|5 foot|test", 'sub-03|6"|pretrain']
    root = bids(tmp_path / "ds", "participant_id", people=3)
    path = root / "participants.tsv"
    if mark == ",":
        (tmp_path / "c.yaml").write_text("participants: ds/people.csv")
        path = root / "people.csv"
    path.write_text("\n".join(["participant_id|height|split", *rows]).replace("|", mark))
    with pytest.raises(
        UserError, match=r"the quote that opens on line 2 takes in the cells of lines 2 to 4; a cell that"
    ):
        read_cohort(root, columns=tmp_path / "c.yaml" if mark == "," else None)
    path.write_text("\n".join(["participant_id|height|split", 'sub-01|"5\nfoot"|test', *rows[1:2]]).replace("|", mark))
    scans, _ = read_cohort(root, columns=tmp_path / "c.yaml" if mark == "," else None)
    assert [scan.extra["height"] for scan in scans] == ["5\nfoot", "5 foot"]
    path.write_text("\n".join(["participant_id|height|split", rows[1], rows[0]]).replace("|", mark))
    with pytest.raises(
        UserError, match="unexpected end of data, in the record that begins on line 3; a cell that begins"
    ):
        read_cohort(root, columns=tmp_path / "c.yaml" if mark == "," else None)


def test_a_declaration_that_reads_the_split_under_another_name_is_refused(tmp_path, capsys):
    message = refusal(tmp_path, "fold,split", "1,test", "2,pretrain", declare="columns: {fold: split}")
    assert "columns.fold: split reads the tables' column 'split' as 'fold'" in message
    assert "write `columns: {split: fold}`" in message
    scans = read_table(tmp_path, "fold,split", "test,1", "pretrain,2", declare="columns: {split: fold}")
    assert splits_of(scans) == ["test", "pretrain"]
    assert "the split is read from the column 'fold'" in capsys.readouterr().err
    scans = read_table(tmp_path, "fold,split", "test,1", "pretrain,2", declare="columns: {split: fold, old: split}")
    assert [scan.extra["old"] for scan in scans] == [1, 2]
    scans = read_table(tmp_path, "split", "test", "pretrain", declare="columns: {split: null}")
    assert [scan.extra for scan in scans] == [{}, {}]
    assert capsys.readouterr().err == ""
    assert "columns.set: null: no table of people has a column 'set'" in refusal(
        tmp_path, "sex", "F", declare="columns: {set: null}"
    )


@pytest.mark.parametrize(
    "declare",
    [
        "missing: {split: [test]}", "missing: [test]", "values: {split: {test: n/a}}", "values: {split: {test: pretrain}}",
        "missing: {split: [test]}\ndefault: {split: pretrain}", "values: {split: {test: Train}}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("splits", [["test"] * 4, SPLITS])
def test_no_rule_turns_test_into_missing_or_pretrain(tmp_path, declare, splits):
    message = refusal(tmp_path, "split", *splits, declare=declare)
    assert "line 2: split='test' is read as " in message
    assert "by a rule of" in message


def test_a_constant_split_does_not_hide_a_column(tmp_path):
    message = refusal(tmp_path, "split", *SPLITS, declare="values: {split: pretrain}")
    assert "values.split is one split for every scan, but the tables of people have a column 'split'" in message
    assert splits_of(read_table(tmp_path, "age", "3", declare="values: {split: pretrain}")) == ["pretrain"]


def test_names_of_splits_are_compared_without_case_and_blanks(tmp_path, capsys):
    rows = ["Test", "TEST", "test ", "Pre-train", "PRETRAIN", "Monitor", "Down stream", "Train", "VAL"]
    expected = ["test", "test", "test", "pretrain", "pretrain", "monitor", "downstream", "train", "val"]
    assert splits_of(read_table(tmp_path, "split", *rows)) == expected
    assert capsys.readouterr().err == ""
    assert splits_of(read_table(tmp_path, "split", "held-out", "test")) == ["held-out", "test"]
    assert "split 'held-out' is none of pretrain, monitor, downstream, test" in capsys.readouterr().err
    message = refusal(tmp_path, "split", "held-out", "Held-Out")
    assert "split='Held-Out', but other participants have split='held-out'; write both alike" in message
    assert parse_splits("Pretrain=.5,TEST=.5") == {"pretrain": 0.5, "test": 0.5}


def test_blank_lines_before_the_header_are_skipped(tmp_path):
    (tmp_path / "people.csv").write_text("\n ; \n\npath;participant_id;age\n\na.nii;1;30\n")
    assert [scan.age for scan in read_cohort(tmp_path / "people.csv")[0]] == [30]
