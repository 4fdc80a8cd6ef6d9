"""Scans that are kept unpacked: the voxels of the shards, whatever kills, damage and full disks do to the file."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage import pieces
from data_pipeline.storage.manifest import Manifest, digest_of
from data_pipeline.storage.remote import Access
from data_pipeline.storage.unpacked import UnpackedScans
from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.run.plan import make_plan
from tests.runs import ROOT

SHAPE = (3, 5, 7)
GENERATOR = np.random.default_rng(0)
VOLUMES = GENERATOR.normal(size=(6, *SHAPE)).astype(np.float16)


def scans_of(folder, **options) -> UnpackedScans:
    return UnpackedScans(path=folder / "a.scans", shape=SHAPE, scans=len(VOLUMES), **options)


@pytest.fixture
def copied(manifest, tmp_path):
    """A copy of the shards that a test may harm, and a manifest that keeps its scans unpacked."""
    shutil.copytree(manifest.root, tmp_path / "copy")
    return Manifest.load(tmp_path / "copy", Access(unpacked=str(tmp_path / "kept")))


def everything(manifest):
    reader = manifest.reader()
    return np.stack([reader.read(row) for row in range(len(manifest.scans))])


def test_a_scan_is_read_from_its_shard_once(manifest, copied):
    expected = everything(manifest)
    np.testing.assert_array_equal(everything(copied), expected)
    for shard in copied.shards:
        (copied.root / shard["name"]).unlink()
    again = everything(copied)
    np.testing.assert_array_equal(again, expected)
    assert again.dtype == np.float16
    for row, one in enumerate(expected):
        np.testing.assert_array_equal(copied.read_volume(row), one)


def test_other_shards_have_another_file(manifest, copied, tmp_path):
    """So a repeated build into the same folder never gives the voxels of the build before."""
    everything(copied)
    content = json.loads((copied.root / "manifest.json").read_text())
    content["settings"]["seed"] += 1
    (copied.root / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(content)}))
    other = Manifest.load(copied.root, copied.access)
    everything(other)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        f"{one.digest[:32]}.scans" for one in (copied, other)
    )


def test_a_limit_bounds_the_disk_and_no_voxel_changes(manifest, copied, tmp_path):
    place = copied.reader().unpacked.place_bytes
    limited = Manifest.load(copied.root, Access(unpacked=str(tmp_path / "few"), unpacked_gb=3.5 * place / 1e9))
    reader = limited.reader()
    assert reader.unpacked.kept == 3
    expected = everything(manifest)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack([reader.read(row) for row in range(len(expected))]), expected)
    assert reader.unpacked.path.stat().st_blocks * 512 <= 3.5 * place
    assert [reader.unpacked.read(row) is not None for row in range(5)] == [True, True, True, False, False]


def test_places_begin_at_pages_and_the_file_has_holes(tmp_path):
    scans = UnpackedScans(path=tmp_path / "b.scans", shape=(40, 40, 40), scans=9)
    assert (scans.place_bytes, scans.kept) == (32 * 4096, 9)  # 128,000 bytes of voxels, and 4
    scans.keep(8, np.ones((40, 40, 40), np.float16))
    assert scans.path.stat().st_blocks * 512 < 2 * scans.place_bytes
    assert scans.read(0) is None
    assert scans.read(8).min() == 1


# Voxels take 210 bytes, with their checksum 214.
@pytest.mark.parametrize("piece", [1, 7, 209, 210, 211, 212, 213, 214, 1000])
def test_damage_in_any_piece_of_a_scan_is_noticed(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(pieces, "PIECE", piece)
    kept = scans_of(tmp_path)
    for row, volume in enumerate(VOLUMES[:3]):
        kept.keep(row, volume)
        np.testing.assert_array_equal(kept.read(row), volume)
    intact = kept.path.read_bytes()
    for position in range(214):
        damaged = bytearray(intact)
        damaged[kept.place_bytes + position] ^= 0x10
        kept.path.write_bytes(damaged)
        found = [kept.read(row) for row in range(3)]
        assert [volume is None for volume in found] == [False, True, False]
    kept.path.write_bytes(intact)
    os.truncate(kept.path, 2 * kept.place_bytes + 213)
    assert kept.read(2) is None
    np.testing.assert_array_equal(kept.read(1), VOLUMES[1])


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["keep", "tear", "flip", "cut", "read"]), st.integers(0, 5), st.integers(0, 300)),
        max_size=25,
    )
)
def test_a_place_gives_its_scan_or_nothing(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("places")
    first, second = scans_of(folder), scans_of(folder)
    intact = set()
    for number, (step, row, byte) in enumerate(steps):
        scans = (first, second)[number % 2]
        size = scans._voxel_bytes + 4
        start = row * scans.place_bytes
        if step == "keep":
            scans.keep(row, VOLUMES[row])
            intact.add(row)
        elif step == "tear":  # the beginning of a writing that a kill has cut off
            with scans.path.open("ab"), scans.path.open("r+b") as stream:
                stream.seek(start)
                stream.write(VOLUMES[(row + 1) % 6].tobytes()[: 1 + byte % 200])
            intact.discard(row)
        elif step == "flip" and row in intact:
            with scans.path.open("r+b") as stream:
                stream.seek(start + byte % size)
                (old,) = stream.read(1)
                stream.seek(start + byte % size)
                stream.write(bytes([old ^ 1]))
            intact.discard(row)
        elif step == "cut" and scans.path.exists():
            os.truncate(scans.path, min(start + byte, scans.path.stat().st_size))
            intact = {kept for kept in intact if kept * scans.place_bytes + size <= scans.path.stat().st_size}
        for kept in range(6):
            found = scans.read(kept)
            assert (found is not None) == (kept in intact)
            assert found is None or np.array_equal(found, VOLUMES[kept])


def _fill(url, kept, started):
    manifest = Manifest.load(url, Access(unpacked=kept))
    reader, generator = manifest.reader(), np.random.default_rng(os.getpid())
    started.set()
    while True:
        reader.read(int(generator.integers(len(manifest.scans))))


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_killed_processes_leave_no_wrong_voxel(manifest, copied, tmp_path, seconds):
    context = multiprocessing.get_context("fork")
    started = [context.Event() for _ in range(3)]
    processes = [
        context.Process(target=_fill, args=(str(copied.root), str(tmp_path / "kept"), event)) for event in started
    ]
    for process, event in zip(processes, started, strict=True):
        process.start()
        assert event.wait(60)
    time.sleep(seconds)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    expected = everything(manifest)
    for _ in range(2):
        np.testing.assert_array_equal(everything(copied), expected)


def test_a_full_disk_is_said_once_and_changes_no_voxel(manifest, copied, tmp_path):
    """The limit of the file's size stands for the disk: the write that crosses it is short, and the next one fails."""
    size = copied.reader().unpacked.place_bytes * 5 // 2
    code = f"""
import numpy as np, resource
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.remote import Access
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
manifest = Manifest.load({str(copied.root)!r}, Access(unpacked={str(tmp_path / "kept")!r}))
plain = Manifest.load({str(copied.root)!r}).reader()
reader = manifest.reader()
for _ in range(2):
    for row in range(len(manifest.scans)):
        assert np.array_equal(reader.read(row), plain.read(row)), row
print([reader.unpacked.read(row) is not None for row in range(4)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[True, True, False, False]\n"
    (line,) = done.stderr.splitlines()
    assert line.endswith(".scans takes no further scan (the disk is full); scans are read from the shards")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_disk_that_fails_is_said_once_and_loses_no_scan(manifest, copied, tmp_path, capsys):
    """Where the file should be is a path that cannot be opened: a link to itself."""
    (tmp_path / "kept").mkdir()
    reader = copied.reader()
    reader.unpacked.path.symlink_to(reader.unpacked.path)
    expected = everything(manifest)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack([reader.read(row) for row in range(len(expected))]), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(".scans cannot be read (Too many levels of symbolic links); scans are read from the shards")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_shards(manifest, copied, workers):
    def batches(source):
        rows = source.rows()
        with TwoViewLoader(source, rows=rows, global_batch=4, workers=workers, augmentation="none") as loader:
            return [next(loader)["views"].clone() for _ in range(2 * len(rows) // 4 + 1)]

    expected, found = batches(manifest), batches(copied)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert copied.reader().unpacked.read(0) is not None


def test_a_folder_that_cannot_be_written_is_named(copied, tmp_path):
    (tmp_path / "file").write_text("")
    access = Access(unpacked=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data.cache_unpacked=.*file cannot be written"):
        Manifest.load(copied.root, access).reader()


def test_a_limit_below_one_scan_is_named(copied, tmp_path):
    access = Access(unpacked=str(tmp_path / "kept"), unpacked_gb=1e-6)
    with pytest.raises(UserError, match=r"^data.cache_unpacked_gb=1e-06 holds no scan: each takes 0\.0"):
        Manifest.load(copied.root, access).reader()


def test_a_run_keeps_its_scans_where_its_recipe_says(manifest, tmp_path):
    given = [f"--data.shards={manifest.root}", f"--run.output={tmp_path}/run", "--batch.global=4"]
    kept = ["--data.cache_unpacked_gb=2", f"--data.cache_unpacked={tmp_path}/kept"]
    plan = make_plan(load_recipe("demo-cpu", [*given, *kept]), 1)
    assert not (tmp_path / "kept").exists()  # a plan writes nothing
    assert plan.manifest.reader().unpacked.path.parent == tmp_path / "kept"
    with pytest.raises(UserError, match=r"^data.cache_unpacked_gb limits data.cache_unpacked, which is not given"):
        make_plan(load_recipe("demo-cpu", [*given, kept[0]]), 1)
    with pytest.raises(UserError, match=r"^data.cache_gb limits data.cache, which is not given"):
        make_plan(load_recipe("demo-cpu", [*given, "--data.cache_gb=1"]), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data.cache_unpacked=.*file/scans cannot be written"):
        make_plan(load_recipe("demo-cpu", [*given, f"--data.cache_unpacked={tmp_path}/file"]), 1)


def test_a_sequential_reader_keeps_no_scans(copied):
    with pytest.raises(
        UserError, match=r"^data.cache_unpacked needs data.reader: index, found stream, which reads whole"
    ):
        TwoViewLoader(copied, rows=copied.rows(), global_batch=4, reader="stream")
