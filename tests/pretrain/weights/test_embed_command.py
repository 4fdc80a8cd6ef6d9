"""``yaware embed``: files, folders, tables and shards; unreadable scans; a killed run is continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from infra import cli
from pretrain import Encoder
from pretrain.weights.feature_file import PartialFile
from tests.pretrain.weights.encoders import write_scans, write_small_encoder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def encoder(tmp_path):
    write_small_encoder(tmp_path / "encoder")
    return tmp_path / "encoder"


def read(table):
    return pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table, sep="\t")


@pytest.mark.parametrize("ending", [".tsv", ".parquet"])
def test_files_folders_and_tables_are_embedded_in_their_order(tmp_path, encoder, ending, capsys):
    paths = write_scans(tmp_path / "scans" / "deep", 3) + write_scans(tmp_path / "scans", 2, first=3)
    (tmp_path / "scans" / ".hidden").mkdir()
    (tmp_path / "scans" / ".hidden" / "x.nii").touch()
    (tmp_path / "scans" / "readme.txt").touch()
    (tmp_path / "listed.csv").write_text("path,age\nscans/deep/sub-001_T1w.nii.gz,30\n")
    out = tmp_path / f"features{ending}"
    places = [str(paths[4]), str(tmp_path / "scans"), str(tmp_path / "listed.csv")]
    assert cli.run(["embed", str(encoder), *places, "--out", str(out), "--batch-size", "2"]) == 0
    assert capsys.readouterr().out == f"embed: wrote {out}: 7 scans, 128 features\n"
    table = read(out)
    expected_paths = [paths[4], *paths, paths[1]]
    assert table["path"].tolist() == [str(path) for path in expected_paths]
    expected = Encoder.from_pretrained(encoder).embed(expected_paths, progress=False).to_numpy()
    np.testing.assert_allclose(table.drop(columns="path").to_numpy(), expected, rtol=1e-5, atol=1e-5)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"encoder", "scans", "listed.csv", out.name}


def test_without_out_the_table_is_printed_and_nothing_else(tmp_path, encoder, capsys):
    (path,) = write_scans(tmp_path, 1)
    assert cli.run(["embed", str(encoder), str(path), "--layer", "layer1", "--pooling", "mean", "max"]) == 0
    printed = capsys.readouterr()
    head, row = printed.out.splitlines()
    assert head.split("\t")[:2] == ["path", "f0"]
    assert row.split("\t")[0] == str(path)
    assert printed.err.startswith("embedding: 1/1 scans")


def test_scans_of_shards_are_chosen_by_split_and_query(tmp_path, shards, capsys):
    manifest = Manifest.load(shards)
    write_small_encoder(tmp_path / "encoder", manifest.grid, modality="vbm")
    out = tmp_path / "features.parquet"
    choice = ["--split", "pretrain", "--query", "age > 40", "--out", str(out)]
    assert cli.run(["embed", str(tmp_path / "encoder"), "--shards", str(shards), *choice]) == 0
    rows = manifest.rows(split="pretrain", query="age > 40")
    table = read(out)
    assert table["key"].tolist() == manifest.scans["key"].iloc[rows].tolist()
    expected = Encoder.from_pretrained(tmp_path / "encoder").embed(rows, manifest=manifest, progress=False)
    np.testing.assert_allclose(table.drop(columns="key"), expected, atol=1e-5)


def test_unreadable_scans_are_left_out_and_named_at_the_end(tmp_path, encoder, capsys):
    paths = write_scans(tmp_path, 2)
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    places = [str(path) for path in (paths[0], tmp_path / "broken.nii.gz", tmp_path / "missing.nii", paths[1])]
    out = tmp_path / "features.tsv"
    assert cli.run(["embed", str(encoder), *places, "--out", str(out)]) == 1
    assert read(out)["path"].tolist() == [str(path) for path in paths]
    *_, head, broken, missing = capsys.readouterr().err.splitlines()
    assert head == "embed: 2 of 4 scans cannot be read:"
    assert broken.startswith(f"  {tmp_path}/broken.nii.gz: unreadable: ")
    assert missing.startswith(f"  {tmp_path}/missing.nii: unreadable: ")
    assert cli.run(["embed", str(encoder), places[1], "--out", str(tmp_path / "none.tsv")]) == 1
    assert not [path for path in tmp_path.iterdir() if "none.tsv" in path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.nii", "--out", "features.csv"], "--out=features.csv: the name must end in .tsv or .parquet"),
        ([], "give either files, folders or tables of scans, or --shards; found neither"),
        (["x.nii", "--shards", "y"], "found both"),
        (["x.nii", "--split", "pretrain"], "--split and --query choose scans of --shards, which is not given"),
        (
            ["--shards", "y", "--tiv", "1450", "--no-prepare"],
            "--tiv and --no-prepare describe files, and scans of --shards are prepared and scaled; leave that out",
        ),
        (["{empty}"], "holds no .nii or .nii.gz or .mgz or .npy file; give the folder of the scans"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, encoder, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    assert cli.run(["embed", str(encoder), *(text.format(empty=tmp_path / "empty") for text in arguments)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.jobs
def test_a_killed_run_is_continued_by_the_same_command(tmp_path, encoder):
    paths = write_scans(tmp_path / "scans", 8)
    for number in range(300):
        os.link(paths[number % 8], tmp_path / "scans" / f"copy-{number:03d}.nii.gz")
    out, partial = tmp_path / "features.parquet", tmp_path / ".features.parquet.partial"
    command = [sys.executable, "-m", "infra.cli", "embed", str(encoder), str(tmp_path / "scans"), "--out", str(out)]
    command += ["--batch-size", "4", "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (partial.is_file() and partial.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    before = len(PartialFile(out, {}).path.read_text().splitlines()) - 1
    with partial.open("a") as stream:
        stream.write('{"name": "half a li')  # what a kill in the middle of a write leaves

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert before - 1 <= int(done.stdout.split(" scans, ")[1].split()[0]) <= before
    assert not partial.exists()
    table = read(out)
    expected = Encoder.from_pretrained(encoder).embed(paths, progress=False)
    assert len(table) == 308
    sources = [str(paths[int(name.split("copy-")[1][:3]) % 8]) if "copy-" in name else name for name in table["path"]]
    np.testing.assert_allclose(table.drop(columns="path"), expected.loc[sources], atol=1e-5)


def test_only_features_of_the_same_encoder_options_and_files_are_taken_over(tmp_path, encoder, monkeypatch):
    paths = write_scans(tmp_path, 3)
    out = tmp_path / "features.tsv"
    command = ["embed", str(encoder), *map(str, paths), "--out", str(out)]
    embedded: list[list[int]] = []

    def stopped(*arguments, **options):
        embedded.append(list(arguments[2]))
        yield from ()

    monkeypatch.setattr("pretrain.weights.feature_file.embed_source", stopped)
    header, stamps = killed_run(encoder, out, paths)
    cli.run(command)
    PartialFile(out, header).start(stamps, {})
    write_scans(tmp_path, 1)  # sub-000 is another file now
    os.utime(paths[0], ns=(1, 1))
    cli.run(command)
    PartialFile(out, header).start(stamps, {})
    cli.run([*command, "--layer", "layer1"])
    assert embedded == [[2], [0, 2], [0, 1, 2]]


def killed_run(encoder, out, paths):
    """Leave the partial file of a run that was killed after two of three scans."""
    from infra.files import sha256_of

    header = {"encoder": sha256_of(encoder / "checksums.json"), "layer": None, "pooling": ["mean"]}
    entries = {}
    for path in paths[:2]:
        status = path.stat()
        entries[str(path)] = ([status.st_size, status.st_mtime_ns, None], np.ones(128, np.float32))
    PartialFile(out, header).start(entries, {})
    return header, entries
