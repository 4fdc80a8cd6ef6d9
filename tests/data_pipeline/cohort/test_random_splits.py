"""Cohorts that declare people as test in random ways: nobody of them is in a split that a run trains on, or the build stops.

Headers in any case, columns that look like a split, tables of sessions, rows without a scan, stray quotes, copies of a scan
and rules that rename columns and values are combined at random. The last test undoes each guard and looks for a cohort that
then puts somebody who is declared as test into pretrain: the strategy can find every one of these faults.
"""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from data_pipeline.cohort import table_file, values
from data_pipeline.cohort.cells import folded
from data_pipeline.cohort.read import read_cohort
from data_pipeline.cohort.reading import Reading
from data_pipeline.cohort.split import TRAINED, split_name
from data_pipeline.quality import outliers
from data_pipeline.quality.rules import Outlier, Quality
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.scan_table import describe, scan_table
from infra.errors import UserError

NAMES = ["split"] * 6 + ["Split", "SPLIT", "\ufeffsplit", "split ", "set", "train_test", "Partition"]
TEST, TRAIN = ["test"] * 3 + ["Test", "TEST", " test "], ["pretrain"] * 3 + ["Pretrain", "train"]
RULES = [
    "", "", "", "", "", "columns: {age: age}", "columns: {note: split}", "missing: {split: [test]}", "missing: [test]",
    "values: {split: {test: n/a}}", "values: {split: pretrain}", "values: {split: {test: pretrain}}",
    "default: {split: pretrain}", "default: {split: downstream}",
    "columns: {set: split}", "columns: {split: set}", "person: [sex]",
]  # fmt: skip
NOTES = ["tall"] * 6 + ['"5 foot', '6"', '"7', '"8"']


@st.composite
def people(draw):
    """For each person: the split of each of two sessions, in both tables; the sessions with a scan, and with a row."""
    always = draw(st.booleans())  # everybody is declared everywhere, else some cells are missing
    persons = []
    for _ in range(draw(st.integers(2, 5))):
        usual = TEST if draw(st.booleans()) else TRAIN
        other = TRAIN if usual is TEST else TEST
        rare = st.sampled_from([usual] * 9 + [other]).flatmap(st.sampled_from)
        cells = rare if always else st.one_of(rare, st.sampled_from(["n/a", ""]))
        persons.append({
            "cells": draw(st.tuples(cells, cells)), "sessions": draw(st.tuples(cells, cells)),
            "scans": draw(st.sampled_from([(1,), (2,), (1, 2)])), "notes": draw(st.tuples(*[st.sampled_from(NOTES)] * 2)),
        })  # fmt: skip
    return persons


COHORTS = st.fixed_dictionaries({
    "people": people(), "name": st.sampled_from(NAMES), "rules": st.sampled_from(RULES),
    "rows": st.sampled_from(["person", "session"]), "sessions": st.sampled_from(["", "", "root", "own", "marks"]),
    "notes": st.booleans(),
})  # fmt: skip
COPIES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*TEST, *TRAIN])), min_size=2, max_size=5)


def write(root: Path, cohort) -> set[str]:
    """Write the BIDS folder; return the people whom a cell declares as test."""
    name, by_session, note = cohort["name"], cohort["rows"] == "session", cohort["notes"]
    head = ["participant_id", *(["session"] if by_session else []), *(["note"] if note else []), name, "age", "sex"]
    lines, root_sessions, declared = [head], [["participant_id", "session_id", name]], set()
    for number, person in enumerate(cohort["people"]):
        who = f"sub-p{number}"
        for session in person["scans"]:
            folder = root / who / f"ses-{session}" / "anat"
            folder.mkdir(parents=True)
            (folder / f"{who}_ses-{session}_T1w.nii.gz").touch()
        written = list(person["cells"][: 2 if by_session else 1])
        for session, (cell, text) in enumerate(zip(person["cells"], person["notes"], strict=True), start=1):
            if by_session or session == 1:
                place = [str(session)] if by_session else []
                lines.append([who, *place, *([text] if note else []), cell, "30", "F"])
        own = [[f"ses-{n}", cell] for n, cell in enumerate(person["sessions"], start=1)]
        if cohort["sessions"] == "marks":
            own = [[session, "n/a"] for session, _ in own]
        if cohort["sessions"]:
            written += [cell for _, cell in own]
            root_sessions += [[who, *row] for row in own]
        if cohort["sessions"] == "own":
            save(root / who / f"{who}_sessions.tsv", [["session_id", name], *own])
        if "test" in map(folded, written):
            declared.add(f"p{number}")
    save(root / "participants.tsv", lines)
    if cohort["sessions"] in ("root", "marks"):
        save(root / "sessions.tsv", root_sessions)
    (root / "columns.yaml").write_text(cohort["rules"] or "{}")
    return declared


def save(path: Path, rows) -> None:
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")


def trained_on(cohort) -> set[str]:
    """The people whom a table declares as test and whose scans are in a split that a run trains on."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ds"
        root.mkdir()
        declared = write(root, cohort)
        try:
            scans, _ = read_cohort(root, modality="t1w", columns=root / "columns.yaml")
            rows = [{"key": s.key, "shard": 0, "offset": 0, "size": 1, "crc32c": 0, **describe(s)} for s in scans]
            table = scan_table(rows, {"splits": {"pretrain": 1.0}, "seed": 0})
        except UserError as error:
            event("refused")
            return {"a message of two lines"} if "\n" in str(error) else set()
    event(f"read, {len(declared)} are declared as test")
    return declared & set(table.loc[table["split"].isin(TRAINED), "participant_id"])


def copies_trained_on(rows) -> bool:
    """Whether a scan is trained on that a row of a table of paths declares as test."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(3):
            voxels = np.random.default_rng(number).random((3, 4, 5), dtype=np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / f"{number}.nii")
        lines = [f"{scan}.nii,p{n},{split}" for n, (scan, split) in enumerate(rows)]
        (root / "list.csv").write_text("\n".join(["path,participant_id,split", *lines]))
        try:
            built = build_shards(root / "list.csv", root / "out", quality=Quality(outlier=Outlier(use=False))).scans
        except UserError as error:
            return "have the same voxels" not in str(error)
    trained = built.loc[built["split"].isin(TRAINED), "participant_id"].str.removeprefix("p").astype(int)
    tested = {scan for scan, split in rows if folded(split) == "test"}
    return any(rows[n][0] in tested for n in trained)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(cohort=COHORTS)
def test_nobody_declared_as_test_is_in_pretrain(cohort):
    assert trained_on(cohort) == set()


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(rows=COPIES)
def test_no_copy_of_a_test_scan_is_in_pretrain(rows):
    assert not copies_trained_on(rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=5000, deadline=None, suppress_health_check=QUIET)
@given(cohort=COHORTS)
def test_many_cohorts(cohort):
    assert trained_on(cohort) == set()


def row_by_row(reading: Reading, theirs, texts, cells, rows, people):
    """The splits as each scan's own row has them; the other rows of a participant do not count."""
    return [None if text is None else split_name(text) for text in texts]


def unguarded(reading: Reading, theirs, cell):
    """The split of a cell; rules may turn test into anything."""
    text = reading.recode("split", theirs, cell)
    return None if text is None else split_name(text)


def any_quotes(text, delimiter, kind):
    """The records of a table; a quoted cell may take in other rows."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return ((lines.line_num, row) for row in lines)


UNDONE = {
    "header": [(table_file, "known_name", str.strip), (values, "check_similar_columns", lambda *arguments: None)],
    "similar columns": [(values, "check_similar_columns", lambda *arguments: None)],
    "rows of the person": [(values, "_splits", row_by_row)],
    "quotes": [(table_file, "_records", any_quotes)],
    "rules": [(values, "_declared_split", unguarded)],
    "copies": [(outliers, "_check_splits_of_copies", lambda *arguments: None)],
}
SEARCH = settings(max_examples=3000, deadline=None, derandomize=True, suppress_health_check=QUIET, phases=[Phase.generate],
                  database=None)  # fmt: skip


@pytest.mark.jobs
@pytest.mark.parametrize("guard", UNDONE)
def test_without_a_guard_a_cohort_is_found_that_trains_on_test(monkeypatch, guard):
    for module, name, old in UNDONE[guard]:
        monkeypatch.setattr(module, name, old)
    try:
        if guard == "copies":
            assert find(COPIES, copies_trained_on, settings=SEARCH)
        else:
            assert find(COHORTS, lambda cohort: bool(trained_on(cohort)), settings=SEARCH)
    except NoSuchExample:
        pytest.fail("the strategy does not find what the guard prevents")
