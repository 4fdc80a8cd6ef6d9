"""Builds whose workers or drivers are killed end with the bytes of an uninterrupted build."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest

from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from tests.cohorts import write_cohort
from tests.ray_head import head_node
from tests.runs import ROOT

SHAPE = (61, 73, 61)
SCANS, PER_SHARD = 72, 4
SHARDS = SCANS // PER_SHARD
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def big_cohort(tmp_path_factory):
    """Volumes at 3 mm, so that a shard takes some time to write; one of them is damaged."""
    root = write_cohort(tmp_path_factory.mktemp("cohort") / "big", participants=SCANS)
    generator = np.random.default_rng(0)
    for path in sorted(root.glob("sub-*/ses-1/anat/*.nii.gz")):
        voxels = generator.random(SHAPE, dtype=np.float32).round(2)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3, 3, 1])), path)
    path.write_bytes(path.read_bytes()[:5000])
    return root


@pytest.fixture(scope="module")
def head():
    with head_node(cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def whole(big_cohort, head, tmp_path_factory):
    """The files of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    done = subprocess.run(command(big_cohort, out), cwd=ROOT, env=environment(head), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 scans were excluded" in done.stdout
    assert not find_problems(Manifest.load(out))
    return files(out)


def command(cohort: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "infra.cli", "shards", "build", str(cohort), str(out), f"--scans-per-shard={PER_SHARD}",
        "--workers=2",  # in Ray, although the scans are few
    ]  # fmt: skip


def environment(head) -> dict[str, str]:
    return {**os.environ, **head.environment}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(out: Path) -> dict[str, int]:
    """The inodes of the finished shards that have a record."""
    names = [path.name.removeprefix(".unfinished-").removesuffix(".json") for path in out.glob(".unfinished-*.json")]
    return {name: (out / name).stat().st_ino for name in names if (out / name).exists()}


def start_and_wait(cohort, out, env, shards_done, log):
    """Start a build and return its process once ``shards_done`` shards are finished."""
    started = subprocess.Popen(command(cohort, out), cwd=ROOT, env=env, stdout=log, stderr=log)
    limit = time.monotonic() + 120
    while len(finished(out)) < shards_done if out.exists() else True:
        assert started.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < limit, "the build did not finish enough shards in time"
        time.sleep(0.002)
    return started


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def seeds(count: int) -> list:
    """Two seeds run with the whole jobs, the others with the slow tests."""
    return [pytest.param(seed, marks=pytest.mark.jobs if seed < 2 else pytest.mark.slow) for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(12))
def test_a_build_continues_after_its_driver_is_killed(big_cohort, head, whole, tmp_path, seed):
    out, moments = tmp_path / "shards", random.Random(seed)
    kept: dict[str, int] = {}
    with (tmp_path / "log").open("w") as log:
        for shards_done in sorted(moments.sample(range(SHARDS - 6), 2)):
            started = start_and_wait(big_cohort, out, environment(head), shards_done, log)
            time.sleep(moments.uniform(0, 0.03))
            started.kill()
            started.wait()
            if (out / "manifest.json").exists():
                pytest.skip("the build ended before it could be killed")
            # A finished shard is never written again.
            now = finished(out)
            assert kept.items() <= now.items()
            kept = now
    # Started at once, while workers of the dead driver may still be writing.
    done = subprocess.run(command(big_cohort, out), cwd=ROOT, env=environment(head), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    time.sleep(0.5)  # a surviving worker would have renamed its shard by now
    assert files(out) == whole


@pytest.mark.parametrize("seed", seeds(8))
def test_a_build_survives_the_death_of_its_workers(big_cohort, head, whole, tmp_path, seed):
    out, moments = tmp_path / "shards", random.Random(seed)
    killed = 0
    with (tmp_path / "log").open("w+") as log:
        started = start_and_wait(big_cohort, out, environment(head), moments.randrange(3), log)
        while started.poll() is None and killed < 3:
            time.sleep(moments.uniform(0, 0.05))
            workers = head.workers()
            if workers:
                victim = moments.choice(workers)
                try:
                    victim.kill()
                except psutil.NoSuchProcess:
                    continue
                killed += 1
                psutil.wait_procs([victim], timeout=10)
        assert started.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert killed, "no worker process was found"
    assert files(out) == whole


@pytest.mark.jobs
def test_a_killed_driver_with_its_own_cluster_leaves_no_worker_running(big_cohort, whole, tmp_path):
    out = tmp_path / "shards"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        started = start_and_wait(big_cohort, out, env, 2, log)
        working: list[psutil.Process] = []
        limit = time.monotonic() + 10
        while len(working) < 3 and time.monotonic() < limit:  # a worker process is named a moment after its start
            family = {process: name_of(process) for process in psutil.Process(started.pid).children(recursive=True)}
            # A worker is named ray::build_one while it writes a shard and ray::IDLE between two shards.
            names = ("ray::build_one", "ray::IDLE", "raylet", "gcs_server")
            working = [process for process, name in family.items() if name.startswith(names)]
        assert len(working) >= 3, family
        started.kill()
        started.wait()
    try:
        _, alive = psutil.wait_procs(working, timeout=60)
        assert not alive
    finally:  # Ray's agents check only now and then whether their cluster still exists
        for process in family:
            if process.is_running():
                process.kill()
    assert not (out / "manifest.json").exists()
    done = subprocess.run(command(big_cohort, out), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(out) == whole
