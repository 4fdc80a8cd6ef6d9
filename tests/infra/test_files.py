"""Atomic writes and digests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from infra.files import atomic_write, sha256_of, write_json
from tests.runs import ROOT


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"b": 1, "a": 2})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic_write(path, "w") as stream:
        stream.write("half")
        raise RuntimeError
    assert path.read_bytes() == before == b'{\n "a": 2,\n "b": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


WRITE = """
import os, signal, sys, time
from infra.files import atomic_write
with atomic_write(sys.argv[1] + "/table.csv", "w") as stream:
    print("half", file=stream, flush=True)
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_write_left_goes_with_the_next_process_that_writes_there(tmp_path):
    command = [sys.executable, "-c", WRITE, tmp_path]
    writing = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writing.stdout.readline() == b"begun\n"
    mine = tmp_path / ".table.csv.x.tmp"  # of another program
    mine.write_text("")
    next_process(tmp_path)
    assert len(list(tmp_path.glob(".table.csv.*.yaware.tmp"))) == 1, "its process still writes it"
    writing.kill()
    writing.communicate()
    assert len(list(tmp_path.glob(".table.csv.*.yaware.tmp"))) == 1
    next_process(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "other.json"]


def test_what_another_host_is_writing_stays(tmp_path):
    others = tmp_path / ".table.csv.x.0123abcd.yaware.tmp"  # not locked, as seen from here
    others.write_text("")
    next_process(tmp_path)
    assert others.exists()


def next_process(folder):
    code = "import sys; from infra.files import write_json; write_json(sys.argv[1] + '/other.json', 1)"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True)


def test_a_file_that_is_written_while_others_clean_is_whole(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "a", "w") as stream:
        monkeypatch.setattr("infra.files._cleaned", set())
        write_json(tmp_path / "b", 1)
        stream.write("whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
