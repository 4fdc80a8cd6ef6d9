"""The cache of remote shards: each shard is downloaded once by many processes, complete or not at all, within the limit."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage import remote
from data_pipeline.storage.cache import ShardCache
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
from tests.servers import range_server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def server(manifest):
    with range_server(manifest.root) as started:
        yield started


def cached(server, folder, **options) -> Manifest:
    return Manifest.load(server.url, Access(cache=str(folder), first_wait=0.01, timeout=2.0, **options))


def everything(manifest: Manifest) -> list[np.ndarray]:
    reader = manifest.reader()
    return [reader.read(row) for row in range(len(manifest.scans))]


def test_each_shard_is_downloaded_once_and_reads_work_without_the_server(manifest, server, tmp_path):
    remote_manifest = cached(server, tmp_path / "cache")
    first = everything(remote_manifest)
    for row in manifest.shards:
        assert server.sent[row["name"]] == row["bytes"]
        kept = (tmp_path / "cache" / f"{row['sha256']}.tar").read_bytes()
        assert hashlib.sha256(kept).hexdigest() == row["sha256"]
    server.stop()
    for again in (everything(remote_manifest), everything(manifest)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("how", ["fail", "cut", "short", "corrupt", "drop"])
def test_a_shard_that_arrives_damaged_is_downloaded_again(manifest, server, tmp_path, how, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 20_000)  # several blocks per shard, each with its own retries
    remote_manifest = cached(server, tmp_path / "cache")
    server.break_next(3, how)
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    shard = manifest.shards[int(manifest.scans.at[7, "shard"])]
    assert [p.name for p in (tmp_path / "cache").glob("*.tar")] == [f"{shard['sha256']}.tar"]


def test_a_failed_download_names_the_shard_and_leaves_no_file(manifest, server, tmp_path):
    remote_manifest = cached(server, tmp_path / "cache", retries=1)
    server.break_next(2, "corrupt")
    scan = manifest.scans.loc[7]
    shard = manifest.shards[int(scan["shard"])]["name"]
    text = f"shard {shard}, scan {scan['key']}, offset {scan['offset']} in .*: attempt 2 of 2 failed: .*SHA-256"
    with pytest.raises(OSError, match=text):
        remote_manifest.read_volume(7)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".tar", ".part")]
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))  # the next read starts again


def test_the_cache_works_with_a_server_without_range_requests(manifest, server, tmp_path):
    remote_manifest = cached(server, tmp_path / "cache")
    server.ranges = False
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))


FILL = """
import sys, hashlib
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
from data_pipeline.storage import remote
remote.BLOCK = 5000
manifest = Manifest.load(sys.argv[1], Access(cache=sys.argv[2]))
reader, digest = manifest.reader(), hashlib.sha256()
print("loaded", flush=True)
sys.stdin.readline()
for row in range(len(manifest.scans)):
    digest.update(reader.read(row).tobytes())
print(digest.hexdigest(), flush=True)
"""


def start_filling(server, folder) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL, server.url, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_fill_one_cache_download_each_shard_once(manifest, server, tmp_path):
    processes = [start_filling(server, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "loaded\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = [process.communicate(timeout=60)[0].strip() for process in processes]
    digest = hashlib.sha256()
    for volume in everything(manifest):
        digest.update(volume.tobytes())
    assert sums == [digest.hexdigest()] * 3
    assert {row["name"]: server.sent[row["name"]] for row in manifest.shards} == {
        row["name"]: row["bytes"] for row in manifest.shards
    }


def test_a_killed_download_blocks_no_process_and_its_part_is_removed(manifest, server, tmp_path):
    process = start_filling(server, tmp_path / "cache")
    assert process.stdout.readline() == "loaded\n"
    server.break_next(1, "hang")
    process.stdin.write("go\n")
    process.stdin.flush()
    limit = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("*.part")):
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = (tmp_path / "cache").glob("*.part")
    other = next(
        row for row in range(48) if manifest.shards[int(manifest.scans.at[row, "shard"])]["sha256"] != part.stem
    )
    size = sum(int(row["bytes"]) for row in manifest.shards)
    remote_manifest = cached(server, tmp_path / "cache", cache_gb=size / 1e9)
    assert np.array_equal(remote_manifest.read_volume(other), manifest.read_volume(other))
    assert not part.exists()
    assert all(np.array_equal(a, b) for a, b in zip(everything(remote_manifest), everything(manifest), strict=True))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(manifest.shards)


def test_a_damaged_copy_on_the_local_disk_is_replaced(manifest, server, tmp_path):
    remote_manifest = cached(server, tmp_path / "cache")
    everything(remote_manifest)
    shard = manifest.shards[int(manifest.scans.at[7, "shard"])]
    path = tmp_path / "cache" / f"{shard['sha256']}.tar"
    content = bytearray(path.read_bytes())
    content[int(manifest.scans.at[7, "offset"]) + 30] ^= 1
    path.write_bytes(content)
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]


def test_shards_that_do_not_fit_are_read_by_range_and_none_is_downloaded_twice(manifest, server, tmp_path):
    sizes = sorted(int(row["bytes"]) for row in manifest.shards)
    remote_manifest = cached(server, tmp_path / "cache", cache_gb=sum(sizes[:3]) / 1e9)
    for _ in range(3):
        assert all(np.array_equal(a, b) for a, b in zip(everything(remote_manifest), everything(manifest), strict=True))
    kept = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert 2 <= len(kept) <= 3
    for number, row in enumerate(manifest.shards):
        one_by_one = 3 * int(manifest.scans["size"][manifest.scans["shard"] == number].sum())
        assert server.sent[row["name"]] == (row["bytes"] if row["sha256"] in kept else one_by_one)


def fill(content: bytes):
    return lambda part: part.write(content)


def test_the_least_recently_used_shards_of_other_data_sets_are_removed(tmp_path):
    cache = ShardCache(tmp_path, limit=300)
    for age, name in enumerate("abc"):
        path = cache.fetch(name, 100, {name}, fill(b"x" * 100))
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.fetch("a", 100, {"a"}, fill(b"")) == tmp_path / "a.tar"  # used just now, so b is the oldest
    cache.fetch("d", 100, {"d"}, fill(b"y" * 100))
    assert sorted(path.stem for path in tmp_path.glob("*.tar")) == ["a", "c", "d"]
    assert cache.fetch("e", 200, {"a", "c", "d", "e"}, fill(b"z" * 200)) is None
    assert cache.fetch("f", 301, {"f"}, fill(b"z" * 301)) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=25), st.integers(1, 400))
def test_the_cache_never_holds_more_than_its_limit(tmp_path_factory, fetches, limit):
    folder = tmp_path_factory.mktemp("cache")
    cache = ShardCache(folder, limit)
    for number, data_set in fetches:
        size = 40 * (number + 1)
        keep = {f"{data_set}-{n}" for n in range(6)}
        path = cache.fetch(f"{data_set}-{number}", size, keep, fill(bytes([number]) * size))
        assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= limit
        assert path is None or path.read_bytes() == bytes([number]) * size
        assert path is not None or size > limit - sum(
            (folder / f"{k}.tar").exists() * 40 * (int(k[2]) + 1) for k in keep
        )


def test_with_a_full_disk_scans_are_read_by_range(manifest, server, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    remote_manifest = cached(server, tmp_path / "cache")
    assert np.array_equal(remote_manifest.read_volume(7), manifest.read_volume(7))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".tar", ".part")]


@pytest.mark.parametrize("cache", [False, True])
def test_reader_processes_give_the_same_batches_from_http_as_from_disk(manifest, server, tmp_path, cache):
    remote_manifest = (
        cached(server, tmp_path / "cache") if cache else Manifest.load(server.url, Access(first_wait=0.01))
    )
    server.break_next(3, "fail")
    loaders = [
        TwoViewLoader(data, rows=manifest.rows(), global_batch=6, workers=workers)
        for data, workers in ((remote_manifest, 2), (manifest, 0))
    ]
    try:
        for _ in range(3):
            batch, expected = (next(loader) for loader in loaders)
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
    finally:
        for loader in loaders:
            loader.close()
    assert server.requests["scans.parquet"] == 1
