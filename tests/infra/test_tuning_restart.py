"""A search whose driver was killed continues without running finished trials again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.runs import ROOT

SAMPLES = 6
DRIVER = f"""
import sys
from pathlib import Path
from infra import ray_cluster, tuning
from tests.infra.test_tuning_restart import grid_trial, search_trial
folder = Path(sys.argv[1])
common = dict(data={{"folder": str(folder)}}, storage=folder / "storage", concurrency=1)
with ray_cluster.session(2):
    if sys.argv[2] == "grid":
        results = tuning.tune_grid(grid_trial, [{{"x": n}} for n in range({SAMPLES})], name="grid", **common)
        print("RESULT", sorted(row["y"] for row in results))
    else:
        space = {{"x": ("uniform", 0.0, 1.0)}}
        records = tuning.tune_search(search_trial, space, samples={SAMPLES}, name="search", seed=0, halving=2, **common)
        print("RESULT", len(records), all(len(row["scores"]) >= 1 for row in records))
"""


def log_event(data, event, point):
    with (Path(data["folder"]) / "log").open("a") as stream:
        stream.write(f"{event} {point['x']:.12f}\n")


def grid_trial(point, data):
    log_event(data, "started", point)
    time.sleep(0.5)
    log_event(data, "finished", point)
    return {"y": 2 * point["x"]}


def search_trial(point, data):
    log_event(data, "started", point)
    for epoch in range(3):
        time.sleep(0.2)
        yield {"score": point["x"] * (1 + epoch)}
    log_event(data, "finished", point)


def logged_points(folder, event):
    log = folder / "log"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [line.split()[1] for line in lines if line.startswith(event)]


def start_driver(folder, kind):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), kind], cwd=ROOT, env={**os.environ}, text=True,
        stdout=subprocess.PIPE, stderr=(folder / f"{kind}.err").open("a"),
    )  # fmt: skip


@pytest.mark.jobs
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [pytest.param("grid", marks=pytest.mark.slow), "search"])
def test_a_killed_search_continues_without_repeating_finished_trials(tmp_path, kind):
    driver = start_driver(tmp_path, kind)
    limit = time.monotonic() + 200
    while len(logged_points(tmp_path, "finished")) < 2:
        assert driver.poll() is None, (tmp_path / f"{kind}.err").read_text()[-3000:]
        assert time.monotonic() < limit, "the search did not finish two trials in time"
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    # Most of Ray's processes end with their driver, the others by infra.processes.guard.
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [process.cmdline() for process in alive]
    finished = set(logged_points(tmp_path, "finished"))
    assert 2 <= len(finished) < SAMPLES, "the driver was killed after the search had finished"
    second = start_driver(tmp_path, kind)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, (tmp_path / f"{kind}.err").read_text()[-3000:]
    started = Counter(logged_points(tmp_path, "started"))
    assert all(started[point] == 1 for point in finished)
    assert len(started) >= SAMPLES
    expected = f"{[2 * n for n in range(SAMPLES)]}" if kind == "grid" else f"{SAMPLES} True"
    assert printed.strip().endswith(f"RESULT {expected}")
