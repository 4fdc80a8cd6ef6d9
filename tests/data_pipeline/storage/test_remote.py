"""Shards on a web server and in an S3 store: the same scans, retries after failures, and errors that name what failed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data_pipeline.storage import remote
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access, ReadFailed, join, with_retries
from infra import cli
from infra.errors import UserError
from tests.servers import range_server, s3_server

QUICK = Access(first_wait=0.01)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep copies of remote manifests in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def server(manifest):
    with range_server(manifest.root) as started:
        yield started


@pytest.fixture(scope="module")
def s3(manifest, tmp_path_factory):
    """The environment variables of an S3 server with the shards in s3://scans/tiny."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        store = remote.filesystem("s3://scans", Access())
        store.mkdir("scans")
        for path in manifest.root.iterdir():
            if path.is_file():
                store.put_file(str(path), f"scans/tiny/{path.name}")
        yield environment


def assert_same(remote_manifest: Manifest, manifest: Manifest, rows=(0, 13, 47)) -> None:
    assert remote_manifest.digest == manifest.digest
    assert remote_manifest.scans.equals(manifest.scans)
    for row in rows:
        assert np.array_equal(remote_manifest.read_volume(row), manifest.read_volume(row))


def test_http_gives_the_same_scans_as_the_disk_with_one_range_each(manifest, server):
    remote_manifest = Manifest.load(server.url, QUICK)
    assert_same(remote_manifest, manifest)
    for row in (0, 13, 47):
        name = manifest.shards[int(manifest.scans.at[row, "shard"])]["name"]
        assert server.sent[name] == manifest.scans.at[row, "size"]
    assert sum(server.sent[row["name"]] for row in manifest.shards) == manifest.scans["size"].iloc[[0, 13, 47]].sum()


def test_s3_gives_the_same_scans_as_the_disk(manifest, s3, tmp_path):
    assert_same(Manifest.load("s3://scans/tiny", QUICK), manifest)
    assert_same(Manifest.load("s3://scans/tiny/", Access(cache=str(tmp_path / "cache"))), manifest)


def test_a_missing_s3_shard_is_reported_at_the_first_attempt(manifest, s3):
    remote_manifest = Manifest.load("s3://scans/tiny", QUICK)
    remote_manifest.shards[0]["name"] = "gone.tar"
    row = int(manifest.scans.index[manifest.scans["shard"] == 0][0])
    with pytest.raises(OSError, match=r"shard gone.tar, scan .*offset \d+ in s3://scans/tiny/gone.tar: attempt 1 of 5"):
        remote_manifest.read_volume(row)


def test_the_commands_accept_an_s3_url(manifest, s3, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["shards", "info", "s3://scans/tiny"]) == 0
    assert manifest.digest in capsys.readouterr().out
    assert cli.run(["shards", "verify", "s3://scans/tiny"]) == 0
    assert "0 problems" in capsys.readouterr().out
    assert cli.run(["shards", "preview", "s3://scans/tiny", "--scans", "1"]) == 0
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert cli.run(["shards", "info", "s3://scans/none"]) == 2
    assert re.search(r"s3://scans/none/manifest.json: attempt 1 of 5 failed", capsys.readouterr().err)


@pytest.mark.parametrize("how", ["fail", "cut", "short", "corrupt", "drop"])
def test_a_failed_read_is_repeated_until_it_succeeds(manifest, server, how):
    remote_manifest = Manifest.load(server.url, QUICK)
    server.break_next(4, how)
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    assert server.requests[manifest.shards[int(manifest.scans.at[7, "shard"])]["name"]] == 5


def test_a_hanging_request_is_repeated_after_the_timeout(manifest, server):
    # three seconds: on busy cores an answer may take longer than one
    remote_manifest = Manifest.load(server.url, Access(timeout=3, first_wait=0.01))
    server.break_next(1, "hang")
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    assert server.requests[manifest.shards[int(manifest.scans.at[7, "shard"])]["name"]] == 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fail", "503"),
        ("short", "is truncated"),
        ("cut", "ClientPayloadError"),
        ("corrupt", "fails its checksum"),
        ("drop", "Disconnected"),
    ],
)
def test_a_read_that_fails_for_good_names_shard_scan_offset_and_attempt(manifest, server, how, reason):
    remote_manifest = Manifest.load(server.url, Access(retries=2, first_wait=0.01))
    server.break_next(3 if how != "drop" else 6, how)  # aiohttp itself repeats a request on a dropped connection
    scan = manifest.scans.loc[7]
    shard = manifest.shards[int(scan["shard"])]["name"]
    with pytest.raises(OSError, match=reason) as caught:
        remote_manifest.read_volume(7)
    text = f"shard {shard}, scan {scan['key']}, offset {scan['offset']} in {server.url}/{shard}: attempt 3 of 3 failed"
    assert text in str(caught.value)
    assert server.requests["scans.parquet"] == 1  # the key comes from the local copy


def test_a_refused_request_is_not_repeated(manifest, server):
    remote_manifest = Manifest.load(server.url, QUICK)
    remote_manifest.shards[0]["name"] = "gone.tar"
    row = int(manifest.scans.index[manifest.scans["shard"] == 0][0])
    with pytest.raises(OSError, match="attempt 1 of 5 failed: FileNotFoundError"):
        remote_manifest.read_volume(row)
    assert server.requests["gone.tar"] == 1


def test_a_server_without_range_requests_is_reported(manifest, server):
    remote_manifest = Manifest.load(server.url, Access(retries=0))
    server.ranges = False
    with pytest.raises(OSError, match="the server does not support range requests"):
        remote_manifest.read_volume(7)


def test_waiting_times_double_with_jitter_up_to_half_a_minute(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def never() -> None:
        raise ConnectionResetError("reset")

    with pytest.raises(ReadFailed, match="x: attempt 11 of 11 failed: ConnectionResetError: reset"):
        with_retries(never, lambda: "x", Access(retries=10))
    for number, wait in enumerate(waits):
        assert 0.5 <= wait / min(30.0, 0.5 * 2**number) <= 1.5
    assert len(set(waits)) == 10


def test_a_damaged_manifest_is_downloaded_again_and_then_rejected(manifest, server):
    server.break_next(1, "corrupt", "manifest.json")
    server.break_next(1, "corrupt", "scans.parquet")
    assert_same(Manifest.load(server.url, QUICK), manifest)
    assert (server.requests["manifest.json"], server.requests["scans.parquet"]) == (2, 2)
    server.break_next(2, "corrupt", "manifest.json")
    with pytest.raises(UserError, match=r"http://.*/manifest.json (was edited|is not valid JSON|has format)"):
        Manifest.load(server.url, Access(retries=1, first_wait=0.01))


def test_the_table_is_downloaded_once_and_again_if_its_copy_is_damaged(manifest, server, tmp_path):
    for _ in range(3):
        remote_manifest = Manifest.load(server.url, QUICK)
    assert (server.requests["manifest.json"], server.requests["scans.parquet"]) == (3, 1)
    (remote_manifest.root / "scans.parquet").write_bytes(b"PAR1")
    assert_same(Manifest.load(server.url, QUICK), manifest)
    assert server.requests["scans.parquet"] == 2


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nowhere://x/y", r"nowhere://x/y/manifest.json: .*; use a path, s3://, http:// or https://"),
        ("gs://x/y", r"gs://x/y/manifest.json: .*pip install 'yaware\[remote\]'"),
        ("http://127.0.0.1:9/x", r"shards http://127.0.0.1:9/x cannot be read: .*attempt 2 of 2"),
    ],
)
def test_an_unreadable_url_is_rejected_with_one_line(url, text):
    with pytest.raises(UserError, match=text) as caught:
        Manifest.load(url, Access(retries=1, first_wait=0.01))
    assert "\n" not in str(caught.value)


def test_verify_finds_damage_in_remote_shards(manifest, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(manifest.root, copy)
    with range_server(copy) as server:
        names = [row["name"] for row in manifest.shards]
        content = bytearray((copy / names[0]).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / names[0]).write_bytes(content)
        (copy / names[1]).write_bytes((copy / names[1]).read_bytes()[:-512])
        (copy / names[2]).unlink()
        assert cli.run(["shards", "verify", server.url]) == 1
    printed = capsys.readouterr().out
    assert f"{names[0]}: damaged: content differs" in printed
    assert re.search(rf"{names[1]}: \d+ bytes, the manifest says \d+", printed)
    assert f"{names[2]}: missing" in printed
    assert "3 problems" in printed


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("/data/m", "a.tar", "/data/m/a.tar"),
        ("/data/m", ".", "/data/m"),
        ("/data/m", "/else/a.tar", "/else/a.tar"),
        ("/data/m", "s3://b/a.tar", "s3://b/a.tar"),
        ("s3://b/m/", "a.tar", "s3://b/m/a.tar"),
        ("s3://b/m", "../tars", "s3://b/tars"),
        ("http://h:1/m", ".", "http://h:1/m"),
    ],
)
def test_names_are_joined_to_folders_and_urls(folder, name, expected):
    assert join(folder, name) == expected
