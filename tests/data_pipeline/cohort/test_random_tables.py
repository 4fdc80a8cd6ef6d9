"""Participants' tables with random blemishes: the manifest says what a table states, or the message names a wrong cell."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from data_pipeline.cohort.read import read_cohort
from data_pipeline.shards.scan_table import describe, scan_table
from infra.errors import UserError

MARKS = ["", "n/a", "N/A", "NA", "NaN", "nan", "null", "None", "."]
UNITS = {"": 1.0, "years": 1.0, "months": 12.0, "weeks": 365.25 / 7, "days": 365.25}
WRONG = object()  # the meaning of a cell that must be refused


def mostly(*usual, rare=()):
    """A strategy of (text, meaning) pairs: a usual one in most cells, a missing mark in some, a rare one in few."""
    plain = st.sampled_from(usual)
    return st.one_of(*[plain] * 120, *[st.sampled_from(MARKS).map(lambda mark: (mark, None))] * 4, *map(st.just, rare))


def number(text):
    return (text, float(text))


AGES = mostly(*(number(str(n)) for n in range(18, 88)), rare=[("89+", 89.0), ("999", WRONG), ("twenty", WRONG)])
SEXES = mostly(("F", "F"), ("male", "M"), ("m", "M"), rare=[("1", "M"), ("3", WRONG)])
SPLITS = mostly(("pretrain", "pretrain"), ("test", "test"), ("downstream", "downstream"))
TIVS = mostly(
    *(number(str(1300 + 7 * n)) for n in range(40)), rare=[("large", WRONG), ("1,4", WRONG), ("14_00", WRONG)]
)
FAMILIES = mostly(("007", "007"), ("7", "7"), ("0010234560", "0010234560"), rare=[("F12", "F12")])
GROUPS = mostly(("1", "AD"), ("0", "control"), ("MCI", "MCI"), ("Köln", "Köln"))
COLUMNS = {"age": AGES, "sex": SEXES, "split": SPLITS, "tiv": TIVS, "family": FAMILIES, "diagnosis": GROUPS}

# Tables in which every cell can be read; the others are mostly refused.
READABLE = COLUMNS | {
    "age": mostly(*(number(str(n)) for n in range(18, 88))),
    "sex": mostly(("F", "F"), ("male", "M"), ("Other", "O")),
    "split": st.sampled_from([("pretrain", "pretrain"), ("test", "test"), ("downstream", "downstream")]),
    "tiv": mostly(*(number(str(1300 + 7 * n)) for n in range(40))),
}


def tables(columns):
    """A strategy of tables: the session of each scan, how its row names the session, and the cells of its row."""
    row = st.tuples(
        st.sampled_from(["", "1", "2", "01"]),
        st.sampled_from(["same", "same", "same", "none", "other"]),
        st.fixed_dictionaries(columns),
    )
    return st.lists(row, min_size=3, max_size=14)


TABLE = st.one_of(tables(COLUMNS), tables(READABLE), tables(READABLE))
DECLARATIONS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(list(UNITS)),
        "cap": st.booleans(),
        "default": st.booleans(),
        "rule": st.booleans(),
        "encoding": st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]),
        "marks": st.booleans(),  # macOS's files beside the scans
        "text": st.booleans(),  # tiv is declared as text
        "columns": st.sampled_from([list(COLUMNS), ["split"], ["age", "split", "tiv"], ["split", "family"]]),
    }
)


def write(root: Path, people, declared) -> list[dict]:
    """Write the BIDS folder; return for every scan: participant, the line of its row or None, and its cells."""
    lines = ["\t".join(["participant_id", "session", *declared["columns"]])]
    scans = []
    for n, (session, row_session, cells) in enumerate(people):
        folder = root / f"sub-p{n}" / (f"ses-{session}" if session else ".") / "anat"
        folder.mkdir(parents=True)
        infix = f"_ses-{session}" if session else ""
        (folder / f"sub-p{n}{infix}_T1w.nii.gz").touch()
        if declared["marks"]:
            (folder / f"._sub-p{n}{infix}_T1w.nii.gz").write_bytes(b"\0\5\26\7")
        written = {"same": session, "none": "n/a", "other": "9"}[row_session]
        lines.append("\t".join([f"sub-p{n}", written, *(cells[name][0] for name in declared["columns"])]))
        # A scan without a session takes the only row of its participant, whatever session that names.
        listed = row_session != "other" or not session
        scans.append({"participant": f"p{n}", "line": n + 2 if listed else None, "cells": cells})
    (root / "participants.tsv").write_text("\n".join(lines) + "\n", encoding=declared["encoding"])
    sidecar = {"age": {"Units": declared["unit"]}, "diagnosis": {"Levels": {"1": "AD", "0": "control"}}}
    (root / "participants.json").write_text(json.dumps(sidecar), encoding="utf-8")
    rules = {"cap": "cap: 89\n", "default": "default: {split: downstream}\n"}
    if "sex" in declared["columns"]:
        rules["rule"] = "values: {sex: {1: M}}\n"
    text = "".join(rule for name, rule in rules.items() if declared[name])
    if declared["text"] and "tiv" in declared["columns"]:
        text += "types: {tiv: text}\n"
    if "age" not in declared["columns"]:
        text = text.replace("cap: 89\n", "")
    (root / "columns.yaml").write_text(text or "{}")
    return scans


def meanings(scans, declared) -> tuple[dict[tuple[str, str], object], set[tuple[int, str]]]:
    """What the table means, written apart from the product: (participant, column) -> value, and the wrong (line, column)."""
    values, wrong = {}, set()
    scans = [scan for scan in scans if scan["line"]]
    for name in declared["columns"]:
        cells = [(scan["participant"], scan["line"], *scan["cells"][name]) for scan in scans]
        known = [cell for cell in cells if cell[3] is not None]
        words = [cell for cell in known if name == "tiv" and cell[3] is WRONG]
        likely = [cell for cell in known if cell not in words or re.fullmatch(r"\d+,\d+", cell[2])]
        as_text = name == "tiv" and (declared["text"] or len(likely) * 2 < len(known) or not likely)
        for participant, line, text, meaning in cells:
            value = meaning
            if name == "age" and isinstance(value, float):
                years = value / UNITS[declared["unit"]]
                bound = text.endswith("+")
                if bound and (not declared["cap"] or years < 89):
                    value = WRONG
                else:
                    value = min(years, 89.0) if declared["cap"] else years
            if name == "age" and text == "999":
                years = 999 / UNITS[declared["unit"]]
                value = WRONG if years > 130 else min(years, 89.0) if declared["cap"] else years
            if name == "sex" and text == "1" and not declared["rule"]:
                value = WRONG
            if name == "split" and value is None:
                value = "downstream" if declared["default"] else WRONG if known else None
            if name == "tiv" and as_text and meaning is not None:
                value = text
            if name == "family" and value is not None and not {c[2] for c in known} & {"007", "0010234560", "F12"}:
                value = float(text)
            values[participant, name] = value
            if value is WRONG:
                wrong.add((line, name))
    return values, wrong


def check(people, declared):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ds"
        root.mkdir()
        scans = write(root, people, declared)
        values, wrong = meanings(scans, declared)
        numbers = [scan["participant"] for scan in scans if scan["line"]]
        try:
            found, unlisted = read_cohort(root, modality="t1w", columns=root / "columns.yaml")
        except UserError as error:
            message = str(error)
            event("refused")
            assert "\n" not in message
            cell = re.search(r"line (\d+): (\w+)=", message)
            if cell:
                line, name = cell.groups()
                assert (int(line), name) in wrong or (name == "family" and mixed_family(scans))
            elif "iconv" in message:
                assert declared["encoding"] == "latin-1"
            else:
                assert "of a listed participant" in message
                assert not numbers
            return
        event("read")
        assert not wrong, wrong
        assert {scan.participant_id for scan in found} == set(numbers)
        assert {scan.participant_id for scan in unlisted} == {scan["participant"] for scan in scans} - set(numbers)
        rows = [{"key": s.key, "shard": 0, "offset": 0, "size": 1, "crc32c": 0, **describe(s)} for s in found]
        manifest = scan_table(rows, {"splits": {"pretrain": 0.9, "downstream": 0.1}, "seed": 0})
        for row in manifest.to_dict("records"):
            for name in declared["columns"]:
                expected, actual = values[row["participant_id"], name], row[name]
                if name == "split" and expected is None:
                    assert actual in ("pretrain", "downstream")
                elif expected is None:
                    assert actual == "" if name == "sex" else pd.isna(actual)
                else:
                    assert actual == (pytest.approx(expected) if isinstance(expected, float) else expected)
            declared_test = scans[int(row["participant_id"][1:])]["cells"]["split"][0] == "test"
            assert not (declared_test and row["split"] == "pretrain")


def mixed_family(scans) -> bool:
    """Whether F12 stands among at least as many numbers, which is refused until the type is declared."""
    texts = [
        text for scan in scans if scan["line"] for text, meaning in [scan["cells"]["family"]] if meaning is not None
    ]
    words = [text for text in texts if text == "F12"]
    return bool(words) and 2 * (len(texts) - len(words)) >= len(texts)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(people=TABLE, declared=DECLARATIONS)
def test_the_manifest_says_what_the_table_states_or_the_message_names_the_cell(people, declared):
    check(people, declared)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
@given(people=TABLE, declared=DECLARATIONS)
def test_many_tables(people, declared):
    check(people, declared)
