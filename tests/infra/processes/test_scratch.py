"""Temporary folders: removed at the end of their block, and after a kill by the next one; DALI's files too."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys

import pytest

from infra.errors import UserError
from infra.processes.scratch import PREFIX, scratch_folder
from tests.runs import ROOT, environment

KEEP_ONE = (
    "from infra.processes.scratch import scratch_folder\nwith scratch_folder('x') as f: print(f, flush=True); input()"
)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Make a folder TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def store(tmp_path_factory):
    """The folder of the MLflow store of processes."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def other(temporary, store):
    """Another process that holds a scratch folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP_ONE], cwd=ROOT, env=environment(store), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process, temporary / process.stdout.readline().strip().rpartition("/")[2]
    process.kill()
    process.communicate()


def test_a_folder_is_private_and_ends_with_its_block(temporary):
    with scratch_folder("x") as folder, scratch_folder("x") as second:
        assert folder.parent == second.parent == temporary
        assert folder.name.startswith(f"{PREFIX}x-")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "deep").mkdir()
    assert not list(temporary.iterdir())


def test_the_next_folder_removes_what_a_killed_process_has_left(temporary, other):
    process, folder = other
    (folder / "voxels").write_bytes(b"many")
    with scratch_folder("y"):
        assert (folder / "voxels").exists(), "its process still runs"
    process.send_signal(signal.SIGKILL)
    process.wait()
    stranger = temporary / f"{PREFIX}someone"
    stranger.symlink_to("/")
    assert folder.exists()
    with scratch_folder("y"):
        assert not folder.exists()
    assert list(temporary.iterdir()) == [stranger]


def test_without_locks_nothing_of_others_is_removed(temporary, other, monkeypatch):
    process, folder = other
    process.kill()
    process.wait()

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with scratch_folder("y") as mine:
        assert folder.exists()
    assert not mine.exists()


def test_no_temporary_folder_is_one_line(temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "none"))
    with pytest.raises(UserError, match="TMPDIR: no temporary folder can be written .*set TMPDIR to one that can"):
        scratch_folder("x").__enter__()


DALI = """
import os, sys
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage.manifest import Manifest
manifest = Manifest.load(sys.argv[1])
loader = TwoViewLoader(manifest, rows=manifest.rows(), global_batch=4, seed=0, augmentation="default", proxies=["age"])
assert next(loader)["views"].std() > 0
print(any(name.startswith("__autograph_generated_file") for name in sys.modules), flush=True)
os._exit(7)
"""


def test_dali_leaves_no_files_in_a_process_that_ends_at_once(temporary, store, shards):
    done = subprocess.run(
        [sys.executable, "-c", DALI, str(shards)], cwd=ROOT, env=environment(store), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (7, "True\n"), done.stderr[-2000:]
    assert not list(temporary.iterdir())
