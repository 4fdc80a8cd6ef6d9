"""Atomic writes, digests and progress lines."""

from __future__ import annotations

import io

import pytest

from infra.files import atomic_write, sha256_of, write_json
from infra.progress import SECONDS_BETWEEN_LINES, Progress, clock


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"b": 1, "a": 2})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic_write(path, "w") as stream:
        stream.write("half")
        raise RuntimeError
    assert path.read_bytes() == before == b'{\n "a": 2,\n "b": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (185, "3 min 05 s"), (7625, "2 h 07 min")])
def test_clock_formats_seconds(seconds, text):
    assert clock(seconds) == text


def test_progress_lines_show_the_rate_and_the_remaining_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("infra.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    # Resumed at 20 of 100: the rate counts only the work since then.
    with Progress(100, "scans", "building", done=20, stream=stream) as progress:
        for _ in range(40):
            now[0] += 5.0
            progress.advance()
    first, *_ = lines = stream.getvalue().splitlines()
    done = 20 + int(SECONDS_BETWEEN_LINES / 5)
    assert first == f"building: {done}/100 scans, 0.2 scans/s, {clock(5 * (100 - done))} left"
    assert lines[-1] == "building: 60/100 scans, 0.2 scans/s, 3 min 20 s left"


def test_a_log_gets_plain_lines_with_count_and_values():
    stream = io.StringIO()
    with Progress(4, "scans", "building", stream=stream) as progress:
        for _ in range(4):
            progress.advance(quarantined=1)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("building: 4/4 scans, ")
    assert line.endswith(", quarantined 1")
