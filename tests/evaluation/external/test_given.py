"""Tables of features: read as people and programs write them, joined to the scans of shards, or refused with one line."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from evaluation.external.given import check_complete, check_values, copies_of_label, read_tables
from infra import cli
from infra.errors import UserError
from tests.stores import store_at


def manifest_of(scans):
    """A manifest with scans (dataset, participant, session, run), as ``read_tables`` sees it."""
    table = pd.DataFrame(scans, columns=["dataset", "participant_id", "session", "run"])
    keys = [
        f"{dataset}_sub-{participant}_ses-{session}" + (f"_run-{run}" if run else "")
        for dataset, participant, session, run in scans
    ]
    return SimpleNamespace(scans=table.assign(key=keys), settings={})


@pytest.fixture
def manifest():
    """Four participants with one scan each."""
    return manifest_of([("tiny", f"{number:03d}", "1", "") for number in range(4)])


VALUES = np.array([[2.5, 1200.0], [2.25, 1300.5], [2.0, 1250.0], [3.0, 1180.25]])


def write(path, header, rows, separator="\t", encoding="utf-8", end="\n"):
    lines = [separator.join(map(str, row)) for row in [header, *rows]]
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


def rows_of(names, values=VALUES):
    return [[name, *numbers] for name, numbers in zip(names, values, strict=True)]


IDS = ["000", "001", "002", "003"]


@pytest.mark.parametrize(
    ("ending", "header", "names", "separator", "encoding", "end"),
    [
        (".tsv", ["participant_id", "thickness", "volume"], [f"sub-{i}" for i in IDS], "\t", "utf-8", "\n"),
        (".tsv", ["participant_id", "thickness", "volume"], IDS, "\t", "utf-16", "\r\n"),
        (".csv", ["Participant_ID", "thickness", "volume"], IDS, ",", "utf-8-sig", "\r\n"),
        (".csv", ["key", "thickness", "volume"], [f"tiny_sub-{i}_ses-1" for i in IDS], ",", "utf-8", "\n"),
        (".csv", ["names", "lHip", "rHip"], [f"sub-{i}_ses-1_T1w" for i in IDS], ",", "utf-8", "\n"),
        (".csv", ["names", "lHip", "rHip"], [f"/data/label/catROI_sub-{i}_T1w" for i in IDS], ";", "utf-8", "\n"),
        (".txt", ["lh.aparc.thickness", "lh_bankssts_thickness", "eTIV"], [f"sub-{i}" for i in IDS], "\t", "utf-8", "\n"),
        (".table", ["rh.aparc.a2009s.area", "a", "eTIV"], [f"sub-{i}_ses-1" for i in IDS], ",", "utf-8", "\n"),
        (".dat", ["Measure:volume", "Left-Hippocampus", "eTIV"], [f"sub-{i}" for i in IDS], " ", "utf-8", "\n"),
        (".txt", ["Measure:volume", "b", "eTIV"], [f"sub-{i}_ses-1.long.sub-{i}" for i in IDS], ";", "utf-8", "\n"),
    ],
)  # fmt: skip
def test_text_tables_are_joined_whatever_their_rows_are_called(
    tmp_path, manifest, ending, header, names, separator, encoding, end
):
    order = [2, 0, 3, 1]
    rows = rows_of([names[row] for row in order], VALUES[order])
    path = write(tmp_path / f"roi{ending}", header, rows, separator, encoding, end)
    (given,) = read_tables(path, None, manifest)
    assert given.name == "roi"
    assert given.columns == header[1:]
    np.testing.assert_array_equal(given.values, VALUES)
    np.testing.assert_array_equal(given.rows, np.arange(4))
    check_values([given], [], np.arange(4))


def test_parquet_npz_and_dataframes_equal_text(tmp_path, manifest):
    frame = pd.DataFrame({"participant_id": IDS, "thickness": VALUES[:, 0], "volume": VALUES[:, 1]})
    frame.to_parquet(tmp_path / "a.parquet", index=False)
    frame.set_index("participant_id").to_parquet(tmp_path / "indexed.parquet")
    np.savez(
        tmp_path / "a.npz", features=VALUES, participant_id=np.array(IDS), columns=np.array(["thickness", "volume"])
    )
    keyed = frame.assign(key=[f"tiny_sub-{i}_ses-1" for i in IDS]).drop(columns="participant_id")
    sources = [tmp_path / "a.parquet", tmp_path / "indexed.parquet", tmp_path / "a.npz", frame, keyed]
    for source in sources:
        (given,) = read_tables(source, "FreeSurfer", manifest)
        assert given.name == "FreeSurfer"
        assert given.columns == ["thickness", "volume"]
        np.testing.assert_array_equal(given.values, VALUES)
    np.savez(tmp_path / "plain.npz", features=VALUES, key=keyed["key"].to_numpy(str))
    assert read_tables(tmp_path / "plain.npz", None, manifest)[0].columns == ["f0", "f1"]


def test_sessions_runs_and_data_sets_tell_scans_apart(tmp_path):
    scans = [("a", "1", "1", ""), ("a", "1", "2", "1"), ("a", "1", "2", "2"), ("b", "1", "1", "")]
    header = ["dataset", "participant_id", "ses", "run", "x"]
    rows = [
        ["b", "sub-1", "ses-1", "n/a", 4],
        ["a", "sub-1", "ses-2", "run-2", 3],
        ["a", "1", "2", "1", 2],
        ["a", "1", "1", "", 1],
    ]
    (given,) = read_tables(write(tmp_path / "t.tsv", header, rows), None, manifest_of(scans))
    np.testing.assert_array_equal(given.values[:, 0], [1, 2, 3, 4])
    names = [["a_sub-1_ses-1", 1], ["a_sub-1_ses-2_run-1", 2], ["sub-1_ses-2_run-2", 3], ["b_sub-1_ses-1_T1w", 4]]
    (given,) = read_tables(write(tmp_path / "f.txt", ["Measure:volume", "x"], names), None, manifest_of(scans))
    np.testing.assert_array_equal(given.values[:, 0], [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"line 2: participant_id '1' fits 4 scans .*; name its dataset"):
        read_tables(write(tmp_path / "u.tsv", ["participant_id", "x"], [["1", 1]]), None, manifest_of(scans))
    with pytest.raises(UserError, match=r"fits 3 scans of the shards \(a_sub-1_ses-1, .*\); name its session"):
        read_tables(
            write(tmp_path / "u.tsv", ["dataset", "participant_id", "x"], [["a", "1", 1]]), None, manifest_of(scans)
        )


def test_several_tables_are_one_candidate_and_what_they_repeat_is_used_once(tmp_path, manifest, capsys):
    left = write(tmp_path / "lh.txt", ["lh.aparc.thickness", "lh_a", "eTIV"], rows_of(IDS))
    right = write(tmp_path / "rh.txt", ["rh.aparc.thickness", "rh_a", "eTIV"], rows_of(IDS, VALUES + np.array([1, 0])))
    other = write(tmp_path / "Vwm.csv", ["names", "lh_a"], rows_of(IDS, VALUES[:, :1] * 3), ",")
    (given,) = read_tables([left, right, other], "FreeSurfer", manifest)
    assert given.columns == ["lh_a", "eTIV", "rh_a", "lh_a"]
    np.testing.assert_array_equal(given.values, np.column_stack([VALUES, VALUES[:, 0] + 1, VALUES[:, 0] * 3]))
    assert "rh.txt repeats eTIV of an earlier table; used once" in capsys.readouterr().out
    two = read_tables({"left": left, "right": [right]}, None, manifest)
    assert [given.name for given in two] == ["left", "right"]
    assert two[0].digest != two[1].digest


def test_columns_that_are_no_features_are_named(tmp_path, manifest, capsys):
    header = ["participant_id", "site", "Age", "age_at_scan", "scanner", "volume"]
    rows = [[i, f"site{i}", 40, 41, "Prisma", float(i) + 1] for i in IDS]
    (given,) = read_tables(write(tmp_path / "t.tsv", header, rows), None, manifest)
    assert given.columns == ["volume"]
    out = capsys.readouterr().out
    assert "columns that describe people are not used as features: site, age, age_at_scan" in out
    assert "columns that hold text are not used as features: scanner" in out


def test_decimal_commas_are_read_only_where_semicolons_separate_cells(tmp_path, manifest, capsys):
    commas = [[name, f"{a:.2f}".replace(".", ","), f"{b:.2f}".replace(".", ",")] for name, a, b in rows_of(IDS)]
    (given,) = read_tables(write(tmp_path / "german.csv", ["names", "a", "b"], commas, ";"), None, manifest)
    np.testing.assert_array_equal(given.values, VALUES)
    assert "8 decimal commas of a table with semicolons are read as points" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tabs.tsv line 2: a='2,50' is not a number"):
        read_tables(write(tmp_path / "tabs.tsv", ["names", "a", "b"], commas), None, manifest)
    commas[1][2] = "1.300"
    with pytest.raises(UserError, match=r"mixed.csv line 2: a='2,50' is not a number"):
        read_tables(write(tmp_path / "mixed.csv", ["names", "a", "b"], commas, ";"), None, manifest)


HEAD = ["participant_id", "a", "b"]
GOOD = rows_of(IDS)
MALFORMED = {
    "wrong keys": (["key", "a"], [[f"tiny_sub-{i}", 1] for i in IDS], "t.tsv line 2: none of the 4 rows of t.tsv is a scan"),
    "other cohort": (HEAD, rows_of("ABCD"), "none of the 4 rows .* such as participant_id 'A', the shards hold tiny_sub-000"),
    "one stranger": (HEAD, [*GOOD, ["999", 1, 2]], "t.tsv line 6: participant_id '999' is no scan .*--common-scans"),
    "lost zeros": (HEAD, [["1", 1, 2], *GOOD[2:]], "line 2: participant_id '1' is no .* '001', with other zeros in front"),
    "duplicate": (HEAD, [*GOOD, GOOD[0]], "line 6: participant_id '000' is the scan .* again, after t.tsv line 2; keep one"),
    "no id": (HEAD, [["n/a", 1, 2], *GOOD[1:]], "line 2: participant_id is empty"),
    "text among numbers": (HEAD, [["000", "fail", 2], *GOOD[1:]], "line 2: a='fail' is not a number, but 3 of the column's 4"),
    "infinite": (HEAD, [["000", 1, "inf"], *GOOD[1:]], "t.tsv line 2: b='inf' is not a number"),
    "no identity": (["subject", "a"], [[i, 1] for i in IDS], "has no column key or participant_id, and is no table of Free"),
    "only text": (["participant_id", "a"], [[i, "x"] for i in IDS], "t.tsv has no column of numbers beside participant_id"),
    "twice the column": (["participant_id", "a", "a"], GOOD, "column 'a' appears twice"),
    "long row": (HEAD, [["000", 1, 2, 3]], "line 2 has 4 fields, the header has 3"),
    "no rows": (HEAD, [], "t.tsv has a header and no rows"),
    "transposed": (["Measure:volume", *IDS], [["Left-Hippocampus", 1, 2, 3, 4]], "its columns are the scans; .* --transpose"),
    "two session columns": (["participant_id", "ses", "session", "a"], [["000", 1, 1, 2]], "columns ses(sion)? and ses"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_tables_give_one_line(tmp_path, manifest, fault):
    header, rows, message = MALFORMED[fault]
    with pytest.raises(UserError, match=message) as caught:
        read_tables(write(tmp_path / "t.tsv", header, rows), None, manifest)
    assert "\n" not in str(caught.value)


def test_missing_and_infinite_cells_are_named_once_their_scans_are_used(tmp_path, manifest):
    rows = [["000", 1, 2], ["001", "n/a", 2], ["002", 1, 2], ["003", 1, 2]]
    (given,) = read_tables(write(tmp_path / "t.tsv", HEAD, rows), None, manifest)
    with pytest.raises(UserError, match=r"t.tsv line 3: a has no value; every scan needs a number"):
        check_values([given], [], np.arange(4))
    check_values([given], [], np.array([0, 2, 3]))
    second = write(tmp_path / "u.tsv", ["participant_id", "c"], [[i, 1] for i in IDS[:3]] + [["003", ""]])
    (given,) = read_tables([tmp_path / "t.tsv", second], None, manifest)
    with pytest.raises(UserError, match=r"u.tsv line 5: c has no value"):
        check_values([given], [], np.array([0, 2, 3]))
    frame = pd.DataFrame({"participant_id": IDS, "a": [1, 2, 3, np.inf]})
    (given,) = read_tables(frame, None, manifest)
    with pytest.raises(UserError, match=r"the DataFrame row 4: a has an infinite value"):
        check_values([given], [], np.arange(4))


def test_scans_without_a_row_are_counted_and_named(tmp_path, manifest):
    (given,) = read_tables(write(tmp_path / "t.tsv", HEAD, GOOD[:1]), "ROI", manifest)
    message = re.escape(
        "ROI: t.tsv has no features of 3 of the 4 scans of the tasks (tiny_sub-001_ses-1, tiny_sub-002_ses-1, "
    )
    with pytest.raises(UserError, match=message):
        check_complete([given], manifest, np.arange(4))
    check_complete([given], manifest, np.array([0]))


def test_rows_of_other_scans_are_counted_if_they_are_allowed(tmp_path, manifest, capsys):
    path = write(tmp_path / "t.tsv", HEAD, [*GOOD, ["999", 1, 2]])
    (given,) = read_tables(path, None, manifest, common=True)
    np.testing.assert_array_equal(given.rows, np.arange(4))
    assert "1 rows of t.tsv are no scans of the shards and are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 4 rows"):
        read_tables(write(tmp_path / "o.tsv", HEAD, rows_of("ABCD")), None, manifest, common=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1 no", "t.parquet cannot be read as Parquet"),
        ("t.npz", b"PK no", "t.npz cannot be read as arrays"),
        ("t.xlsx", b"PK", r"cannot end in '.xlsx'; allowed: .tsv, .csv, .parquet, .npz"),
        ("t.tsv", b"participant_id\ta\n\xe4\t1\n", "does not know byte 0xe4 of line 2; convert it"),
        ("t.csv", b'participant_id,a\n"1,2\n3,4\n', "unexpected end of data"),
    ],
)
def test_damaged_files_give_one_line(tmp_path, manifest, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tables(tmp_path / name, None, manifest)
    assert "\n" not in str(caught.value)


def test_other_wrong_sources_give_one_line(tmp_path, manifest):
    np.savez(tmp_path / "objects.npz", features=VALUES, key=np.array([{}] * 4, dtype=object))
    np.savez(tmp_path / "long.npz", features=VALUES, key=np.array(IDS[:3]))
    np.savez(tmp_path / "other.npz", values=VALUES)
    for source, message in {
        tmp_path: "is a folder, not a table of features", tmp_path / "absent.tsv": "does not exist",
        tmp_path / "objects.npz": "cannot be read as arrays", tmp_path / "long.npz": r"`key` has shape \(3,\)",
        tmp_path / "other.npz": "has no array `features`",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_tables(source, None, manifest)
    for wrong in ({}, [], {"": "t.tsv"}, {"a": []}):
        with pytest.raises(UserError, match="names no table"):
            read_tables(wrong, None, manifest)
    with pytest.raises(UserError, match="name='x' names a table"):
        read_tables(None, "x", manifest)


def test_pseudonyms_are_hinted_at(tmp_path, manifest):
    manifest.settings["pseudonymised"] = True
    with pytest.raises(UserError, match="the shards hold pseudonyms: name the rows by key"):
        read_tables(write(tmp_path / "t.tsv", HEAD, rows_of("ABCD")), None, manifest)


def test_features_get_mean_0_and_variance_1_and_constants_become_0(tmp_path, manifest):
    rows = [[i, a, 1e-9 * a, 7] for i, a in zip(IDS, VALUES[:, 1], strict=True)]
    (given,) = read_tables(write(tmp_path / "t.tsv", ["participant_id", "a", "tiny", "same"], rows), None, manifest)
    scaled = given.of(np.arange(4))
    np.testing.assert_allclose(scaled[:, 0], (VALUES[:, 1] - VALUES[:, 1].mean()) / VALUES[:, 1].std())
    np.testing.assert_allclose(scaled[:, 1], scaled[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(scaled[:, 2], 0)


def test_a_copy_of_the_label_is_found_in_any_scale():
    ages = np.array([20.0, 35.0, 50.5, 61.0, 44.0])
    classes = np.array([0, 1, 1, 0, 2])
    noise = np.array([0.1, -0.2, 0.3, 0.05, -0.1])
    regression = SimpleNamespace(kind="regression", labels=ages)
    columns = np.column_stack([noise, ages * 12, 100 - ages, ages + noise, np.ones(5)])
    np.testing.assert_array_equal(copies_of_label(columns, regression), [1, 2])
    multiclass = SimpleNamespace(kind="multiclass", labels=classes)
    columns = np.column_stack([noise, np.array([5, 3, 3, 5, 9]), np.array([5, 3, 3, 5, 5]), np.ones(5), classes])
    np.testing.assert_array_equal(copies_of_label(columns, multiclass), [1, 4])


def test_a_table_that_holds_the_label_is_refused(shards):
    from evaluation.tasks.tasks import load_task

    manifest = Manifest.load(shards)
    task = load_task("age", manifest, 2)
    frame = pd.DataFrame(
        {"key": manifest.scans["key"], "alter": manifest.scans["age"], "x": np.arange(len(manifest.scans))}
    )
    given = read_tables(frame, "other", manifest)
    with pytest.raises(UserError, match="column 'alter' of the DataFrame is the label of task age; remove it"):
        check_values(given, [task], task.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate; name checkpoints, a table of features"),
        (
            ["--features", "a/t.tsv", "--features", "b/t.csv"],
            "two tables of features are named 't'; give each a --name",
        ),
        (["--features", "t.tsv", "--name", "A", "--name", "B"], "--name is given 2 times and --features 1 times"),
        (["--features", "absent.tsv"], "absent.tsv does not exist; give a table of features"),
        (
            ["--features", "FILE", "--join"],
            "join puts tables of features beside checkpoints' features; give at least one",
        ),
        (["--features", "FILE", "--protocols", "scratch"], "protocol scratch trains the network of a checkpoint"),
        (["--features", "FILE", "--name", "voxels"], "'voxels' names two candidates; give the table another --name"),
    ],
)
def test_wrong_commands_give_one_line_and_status_2(shards, tmp_path, capsys, arguments, message):
    frame = pd.DataFrame({"key": Manifest.load(shards).scans["key"]})
    frame.assign(x=np.arange(len(frame)) % 5).to_csv(tmp_path / "t.csv", index=False)
    command = [str(tmp_path / "t.csv") if argument == "FILE" else argument for argument in arguments]
    command += ["--shards", str(shards), "--tasks", "age", "--folds", "2", "--storage", str(tmp_path / "work")]
    assert cli.run(["evaluate", *command, "--tracking-uri", store_at(tmp_path / "mlflow.db")]) == 2
    assert message in capsys.readouterr().err
