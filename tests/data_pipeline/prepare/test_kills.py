"""SIGKILL to ``yaware cohort prepare`` and to its Ray workers at random moments: the derivative is the same in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest

from tests.data_pipeline.prepare.phantoms import SMALL_OPTIONS, write_small_cohort
from tests.ray_head import head_node
from tests.runs import ROOT

SECONDS = 300.0  # after which a run is stuck
APART = 3  # scans that are done between two kills of workers


@pytest.fixture(scope="module")
def cohort_for(tmp_path_factory):
    """A function of the number of kills: the raw cohort, with more scans than are done between them, and what becomes of it."""

    @cache
    def made(kills):
        raw = write_small_cohort(tmp_path_factory.mktemp("raw") / "small", participants=4 * kills)
        out = tmp_path_factory.mktemp("whole") / "out"
        assert start(raw, out, "--workers", "1").wait(SECONDS) == 0
        return raw, contents(out)

    return made


def start(raw: Path, out: Path, *options: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start the command; its output goes to a file beside ``out``."""
    command = [sys.executable, "-m", "infra.cli", "cohort", "prepare", str(raw), str(out), *SMALL_OPTIONS, *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with out.with_name("log.txt").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT), **variables}, stdout=log, stderr=log
        )


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a derivative but the timings."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "timings.tsv")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def records(out: Path) -> int:
    """How many scans are done."""
    return len(list(out.glob(".prepare/*.json")))


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.jobs), pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_command_continues_to_the_same_bytes(cohort_for, tmp_path, kills):
    raw, undisturbed = cohort_for(kills)
    out, chance, done, killed = tmp_path / "out", random.Random(kills), [], 0
    for _ in range(kills):
        running = start(raw, out, "--workers", "1")
        limit = time.monotonic() + SECONDS
        # It is killed somewhere in the scan after the one that is done next, or in the first.
        target = records(out) + chance.choice((0, 1))
        while running.poll() is None and records(out) < target and time.monotonic() < limit:
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            running.wait(chance.uniform(0.0, 2.0))
        killed += running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        done.append(records(out))
    assert killed == kills
    assert done == sorted(done), "no scan is lost by a kill"
    assert start(raw, out, "--workers", "1").wait(SECONDS) == 0, out.with_name("log.txt").read_text()[-3000:]
    assert contents(out) == undisturbed


@pytest.mark.distributed
@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.jobs), pytest.param(10, marks=pytest.mark.slow)])
def test_killed_workers_of_a_ray_cluster_are_replaced(cohort_for, tmp_path, kills):
    raw, undisturbed = cohort_for(kills)
    out, chance, killed, last = tmp_path / "out", random.Random(kills), 0, -APART
    with head_node(cpus=2) as head:
        running = start(raw, out, **head.environment)
        limit = time.monotonic() + SECONDS
        while running.poll() is None and time.monotonic() < limit:
            workers = head.workers("prepare_one")
            # Ray gives a task up after four lost workers. A lost scan is in a new worker, so that the oldest is killed.
            if workers and killed < kills and records(out) >= last + APART:
                time.sleep(chance.uniform(0.0, 0.7))
                with suppress(psutil.NoSuchProcess):
                    min(workers, key=psutil.Process.create_time).kill()
                    killed, last = killed + 1, records(out)
            time.sleep(0.05)
        assert running.poll() == 0, out.with_name("log.txt").read_text()[-3000:]
    assert killed == kills
    assert contents(out) == undisturbed
