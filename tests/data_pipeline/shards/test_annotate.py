"""A proxy that arrives later: new columns, unchanged shards."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

from data_pipeline.shards.annotate import annotate_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from infra import cli


@pytest.fixture
def built(manifest, tmp_path):
    shutil.copytree(manifest.root, tmp_path / "shards")
    return Manifest.load(tmp_path / "shards")


def write(path, rows, separator="\t"):
    path.write_text("\n".join(separator.join(row) for row in rows) + "\n")
    return path


def test_numbers_and_texts_are_added_by_participant(built, tmp_path, capsys):
    people = sorted(set(built.scans["participant_id"]))
    rows = [("participant_id", "iq", "hand")] + [
        (f"sub-{p}", str(90 + n), "LR"[n % 2]) for n, p in enumerate(people[1:])
    ]
    rows[3] = (rows[3][0], "n/a", "")
    table = write(tmp_path / "later.tsv", rows)
    tars = {path.name: path.read_bytes() for path in built.root.glob("*.tar")}
    assert cli.run(["shards", "annotate", str(built.root), str(table)]) == 0
    after = Manifest.load(built.root)
    assert f"iq: {after.scans['iq'].notna().sum()} of {len(after.scans)} scans have a value" in capsys.readouterr().out
    expected = {person: 90.0 + n for n, person in enumerate(people[1:]) if n != 2}
    for person, iq in zip(after.scans["participant_id"], after.scans["iq"], strict=True):
        assert iq == expected[person] if person in expected else np.isnan(iq)
    assert np.array_equal(after.proxies(["iq"])[:, 0], after.scans["iq"].to_numpy(np.float32), equal_nan=True)
    assert set(after.scans["hand"].dropna()) == {"L", "R"}
    pd.testing.assert_frame_equal(after.scans[built.scans.columns], built.scans)
    assert {path.name: path.read_bytes() for path in built.root.glob("*.tar")} == tars
    assert after.digest != built.digest
    assert find_problems(after) == {}


def test_values_of_a_session_are_added_to_its_scans(built, tmp_path):
    scans = built.scans[["participant_id", "session"]].drop_duplicates()
    rows = [("participant_id", "session", "weight")]
    rows += [(p, f"ses-{s}", str(50 + n)) for n, (p, s) in enumerate(scans.itertuples(index=False))]
    after, counts = annotate_shards(built.root, write(tmp_path / "w.csv", rows, ","))
    assert counts == {"weight": len(after.scans)}
    expected = {(p, s): 50.0 + n for n, (p, s) in enumerate(scans.itertuples(index=False))}
    weights = after.scans.set_index(["participant_id", "session"])["weight"]
    assert all(weights.loc[[pair]].eq(value).all() for pair, value in expected.items())


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([("id", "iq"), ("1", "2")], [], "has no column participant_id; found: id, iq"),
        ([("participant_id", "iq"), ("000", "2"), ("sub-000", "3")], [], "line 3: participant_id '000' appears twice"),
        ([("participant_id", "age"), ("000", "2")], [], "has a column 'age' already; give --replace"),
        ([("participant_id", "split"), ("000", "x")], [], "column 'split' is written by the build"),
        ([("participant_id", "iq"), ("000", "2")], ["--columns", "qi"], "has no column 'qi' (did you mean 'iq'?)"),
        ([("participant_id", "iq"), ("nobody", "2")], [], "no row matches a scan"),
        (
            [("participant_id", "iq"), ("000", "2"), ("001", "x"), ("002", "NA")],
            [],
            "values are; correct it, or declare `missing: {iq: [x]}` or",
        ),
        ([("participant_id", "age"), ("000", "200")], ["--replace"], "line 2: age='200' is not a number of years"),
    ],
)
def test_an_invalid_table_is_rejected_with_one_line_and_changes_nothing(built, tmp_path, capsys, rows, options, text):
    table = write(tmp_path / "t.tsv", rows)
    assert cli.run(["shards", "annotate", str(built.root), str(table), *options]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert Manifest.load(built.root).digest == built.digest


def test_an_existing_column_is_replaced_on_request(built, tmp_path):
    people = sorted(set(built.scans["participant_id"]))
    table = write(tmp_path / "t.tsv", [("participant_id", "age"), *((p, "33") for p in people)])
    after, _ = annotate_shards(built.root, table, replace=True)
    assert set(after.scans["age"]) == {33.0}


def test_names_of_digits_keep_their_text_and_marks_are_missing(built, tmp_path):
    people = sorted(set(built.scans["participant_id"]))
    rows = [
        ("participant_id", "family", "iq"),
        (people[0], "007", "NA"),
        (people[1], "7", "100"),
        (people[2], ".", "101"),
    ]
    table = tmp_path / "t.tsv"
    table.write_text("\n".join("\t".join(row) for row in rows), encoding="utf-16")
    after, counts = annotate_shards(built.root, table)
    families = after.scans.drop_duplicates("participant_id").set_index("participant_id")["family"]
    assert [families[person] for person in people[:2]] == ["007", "7"]
    assert families[people[2:]].isna().all()
    assert counts == {"family": 4, "iq": 4}


def test_ages_in_months_are_stored_in_years(built, tmp_path):
    people = sorted(set(built.scans["participant_id"]))
    table = write(tmp_path / "t.tsv", [("participant_id", "age"), *((p, "588") for p in people)])
    (tmp_path / "t.json").write_text('{"age": {"Units": "months"}}')
    after, _ = annotate_shards(built.root, table, replace=True)
    assert set(after.scans["age"]) == {49.0}


def people_of(built):
    return sorted(set(built.scans["participant_id"]))


def test_cells_are_read_as_a_build_reads_them(built, tmp_path):
    people = people_of(built)
    (tmp_path / "t.json").write_text(
        '{"group": {"Levels": {"0": "control", "1": "lithium"}}, "Age": {"unit": "months"}}'
    )
    rows = [(p, str(n % 2), ("male", "f")[n % 2], "1080") for n, p in enumerate(people)]
    table = write(tmp_path / "t.tsv", [("Participant_ID", "group", "SEX", "AGE"), *rows])
    after, _ = annotate_shards(built.root, table, replace=True)
    scans = after.scans.drop_duplicates("participant_id").set_index("participant_id").loc[people]
    assert scans["group"].tolist()[:2] == ["control", "lithium"]
    assert scans["sex"].tolist()[:2] == ["M", "F"]
    assert set(scans["age"]) == {90.0}


def test_rules_of_a_file_are_applied_and_asked_for(built, tmp_path, capsys):
    people = people_of(built)
    table = write(tmp_path / "t.tsv", [("id", "age", "sex"), *((p, "89+", "12"[n % 2]) for n, p in enumerate(people))])
    rules = tmp_path / "rules.yaml"
    rules.write_text("columns: {participant_id: id, age: age, sex: sex}\ncap: 89\nvalues: {sex: {1: M, 2: F}}")
    command = ["shards", "annotate", str(built.root), str(table), "--replace"]
    assert cli.run([*command, "--rules", str(rules)]) == 0
    scans = Manifest.load(built.root).scans
    assert (set(scans["age"]), set(scans["sex"])) == ({89.0}, {"F", "M"})
    write(table, [("participant_id", "age", "sex"), (people[0], "89+", "1")])
    capsys.readouterr()
    assert cli.run([*command, "--columns", "sex"]) == 2  # the wrong age is in a column that is not added
    assert "line 2: sex='1' is a code without a declared meaning" in (error := capsys.readouterr().err)
    assert "in a YAML file given with --rules" in error
    assert cli.run([*command, "--columns", "age"]) == 2
    assert "age='89+' is a lower bound" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([("participant_id", "iq")], "has a header and no rows"),
        ([("participant_id", "session", "session_id", "iq"), ("000", "1", "1", "3")], "the columns session and session_id"),
        ([("participant_id", "Split"), ("000", "test")], "column 'split' is written by the build"),
        ([("participant_id", "iq"), ("000", '"3'), ("001", '4"')], "the quote that opens on line 2"),
        ([("participant_id", "age"), ("000", "twenty")], "line 2: age='twenty' is not a number of years in 0..130"),
    ],
)  # fmt: skip
def test_more_invalid_tables_are_one_line(built, tmp_path, capsys, rows, text):
    assert cli.run(["shards", "annotate", str(built.root), str(write(tmp_path / "t.tsv", rows)), "--replace"]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
