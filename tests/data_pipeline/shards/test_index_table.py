"""Keys of foreign samples and the table beside the shards: entities are read, and rows are found or rejected."""

from __future__ import annotations

import pytest

from data_pipeline.shards.index_table import check_pattern, parse_key, read_people
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("abide_sub-01_ses-2_run-1", ("01", "2", "1", "abide")),
        ("run-1_ses-2_sub-01_dataset-abide", ("01", "2", "1", "abide")),
        ("my-study_sub-01", ("01", None, None, "my-study")),
        ("sub-01/ses-2/sub-01_ses-2_T1w", ("01", "2", None, None)),
        ("subject-01_session-A_study-ixi_desc-gm", ("01", "A", None, "ixi")),
    ],
)
def test_the_entities_of_a_key_may_have_any_order(key, expected):
    entities = parse_key(key)
    assert tuple(entities.get(name) for name in ("participant_id", "session", "run", "dataset")) == expected


def test_a_pattern_reads_keys_of_another_form():
    pattern = r"(?P<dataset>\w+?)\.?(?P<participant_id>\d{5})$"
    assert parse_key("ixi00042", pattern) == {"dataset": "ixi", "participant_id": "00042"}
    with pytest.raises(BadScan, match="names no participant"):
        parse_key("ixi42", pattern)
    for wrong, text in (("(", "is not a regular expression:"), ("(?P<id>.)", r"it needs \(\?P<participant_id>")):
        with pytest.raises(UserError, match=text):
            check_pattern(wrong)


def test_a_row_is_used_only_if_exactly_one_matches():
    rows = ["participant_id study ses age sex iq", "sub-1 a 1 20 F 3", "sub-1 a 2 22 F n/a", "sub-1 b n/a 60 male 4"]
    text = "\n".join(rows).replace(" ", "\t")
    people = read_people(text.encode(), "x/participants.tsv")
    assert people.find({"participant_id": "1", "session": "2", "dataset": "a"})["age"] == 22
    assert people.find({"participant_id": "1", "session": "7", "dataset": "b"}) == {
        "dataset": "b", "age": 60.0, "sex": "M", "iq": 4.0,
    }  # fmt: skip
    for entities, reason in (
        ({"participant_id": "1", "dataset": "a"}, "has 2 different rows in participants.tsv"),
        ({"participant_id": "1", "session": "1"}, "has 2 different rows"),
        ({"participant_id": "1", "dataset": "c"}, "is not in participants.tsv"),
        ({"participant_id": "01"}, "is not in participants.tsv"),
    ):
        with pytest.raises(BadScan, match=reason):
            people.find(entities)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject\tage\n1\t3\n", "has no column participant_id; found: subject, age"),
        ("participant_id\tage\n1\ttwenty\n", "line 2: age='twenty' is not a number of years"),
        ("participant_id\tage\n1\t999\n", "line 2: age='999' is not a number of years in 0..130"),
        ("participant_id\tsex\n1\tF\n2\t1\n", "line 3: sex='1' is a code without a declared meaning"),
        ("participant_id\tiq\n1\t90\n2\t95\n3\thigh\n", "line 4: iq='high' is not a number, but 2 of the column's 3"),
        ("participant_id\tsplit\n1\ttest\n2\tNA\n", "line 3: split='NA' is missing, while other rows have one"),
        ("participant_id\tage\n1\t4_0\n", "line 2: age='4_0' is not a number of years"),
        ("participant_id\tses\tsession_id\n1\t1\t1\n", "has several columns for session"),
    ],
)
def test_an_invalid_table_is_rejected_with_one_line(text, message):
    with pytest.raises(UserError, match=message):
        read_people(text.encode(), "participants.tsv")


def test_marks_of_missing_values_names_of_digits_and_encodings_are_read_as_in_cohorts():
    text = "participant_id\tfamily\tiq\tsite\n1\t007\tNA\tKöln\n2\t7\t100\t.\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        people = read_people(text.encode(encoding), "participants.tsv")
        assert people.find({"participant_id": "1"}) == {"family": "007", "iq": None, "site": "Köln"}
        assert people.find({"participant_id": "2"}) == {"family": "7", "iq": 100.0, "site": None}
    with pytest.raises(UserError, match="iconv -f LATIN1 -t UTF-8 'participants.tsv'"):
        read_people(text.encode("latin-1"), "participants.tsv")


def test_units_and_labels_of_the_json_beside_the_table_are_applied(capsys):
    text = b"participant_id\tage\tsex\tdiagnosis\ttiv\n1\t588\t1\t0\t1400000\n2\tn/a\tF\tAD\tn/a\n"
    sidecar = b"""{"age": {"Units": "months"}, "sex": {"Levels": {"1": "male", "F": "femme"}}, "tiv": {"Units": "mm3"},
                   "diagnosis": {"Levels": {"0": "control"}}}"""
    people = read_people(text, "d/participants.tsv", sidecar)
    assert people.find({"participant_id": "1"}) == {"age": 49.0, "sex": "M", "diagnosis": "control", "tiv": 1400.0}
    assert people.find({"participant_id": "2"}) == {"age": None, "sex": "F", "diagnosis": "AD", "tiv": None}
    with pytest.raises(UserError, match="d/participants.json: age: Units='moons' is not a known unit"):
        read_people(text, "d/participants.tsv", sidecar.replace(b"months", b"moons"))
    with pytest.raises(UserError, match="line 2: age='588' is not a number of years in 0..130"):
        read_people(text.replace(b"\t1\t", b"\tM\t"), "d/participants.tsv", b"[1]")
    assert "d/participants.json is ignored, it must hold keys and values, found list" in capsys.readouterr().err


def test_declared_rules_hold_for_an_index_too(tmp_path, capsys):
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "columns: {participant_id: code, age: age_months, sex: gender, iq: iq}\nunits: {age: months}\ncap: {age: 89}\n"
        "values: {sex: {1: M, 2: F}, cohort: a}\nmissing: {iq: [999]}\n"
    )
    text = b"code\tage_months\tgender\tiq\tspare\nsub-1\t588\t1\t999\tx\nsub-2\t1200\t2\t101\ty\n"
    people = read_people(text, "participants.tsv", rules=rules)
    assert people.find({"participant_id": "1"}) == {"age": 49.0, "sex": "M", "iq": None, "cohort": "a"}
    assert people.find({"participant_id": "2"}) == {"age": 89.0, "sex": "F", "iq": 101.0, "cohort": "a"}
    rules.write_text("values: {gender: {1: M}}")
    with pytest.raises(UserError, match="values.gender: .* has no column 'gender'"):
        read_people(b"participant_id\tage\n1\t20\n", "participants.tsv", rules=rules)
    months = "participant_id\tage\n" + "".join(f"{n}\t{101 + n}\n" for n in range(20))
    read_people(months.encode(), "participants.tsv")
    assert "ages are read as years, but look like months (20 of 20 are above 100)" in capsys.readouterr().err
