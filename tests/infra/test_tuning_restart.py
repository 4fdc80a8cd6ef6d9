"""A driver that is killed in mid-search is started again, and no trial that had finished runs a second time."""

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
from tests.infra.test_tuning_restart import one_grid, one_search
folder = Path(sys.argv[1])
common = dict(data={{"folder": str(folder)}}, storage=folder / "storage", concurrency=1)
with ray_cluster.session(2):
    if sys.argv[2] == "grid":
        found = tuning.tune_grid(one_grid, [{{"x": n}} for n in range({SAMPLES})], name="grid", **common)
        print("RESULT", sorted(row["y"] for row in found))
    else:
        space = {{"x": ("uniform", 0.0, 1.0)}}
        found = tuning.tune_search(one_search, space, samples={SAMPLES}, name="search", seed=0, halving=2, **common)
        print("RESULT", len(found), all(len(row["scores"]) >= 1 for row in found))
"""


def note(data, word, point):
    with (Path(data["folder"]) / "log").open("a") as stream:
        stream.write(f"{word} {point['x']:.12f}\n")


def one_grid(point, data):
    note(data, "began", point)
    time.sleep(0.5)
    note(data, "ended", point)
    return {"y": 2 * point["x"]}


def one_search(point, data):
    note(data, "began", point)
    for epoch in range(3):
        time.sleep(0.2)
        yield {"score": point["x"] * (1 + epoch)}
    note(data, "ended", point)


def entries(folder, word):
    log = folder / "log"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [line.split()[1] for line in lines if line.startswith(word)]


def start(folder, kind):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), kind], cwd=ROOT, env={**os.environ}, text=True,
        stdout=subprocess.PIPE, stderr=(folder / f"{kind}.err").open("a"),
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [pytest.param("grid", marks=pytest.mark.slow), "search"])
def test_killed_in_mid_search(tmp_path, kind):
    driver = start(tmp_path, kind)
    limit = time.monotonic() + 200
    while len(entries(tmp_path, "ended")) < 2:
        assert driver.poll() is None, (tmp_path / f"{kind}.err").read_text()[-3000:]
        assert time.monotonic() < limit, "the search never came so far"
        time.sleep(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(family, timeout=60)  # Ray's own processes end with their driver
    done = set(entries(tmp_path, "ended"))
    assert 2 <= len(done) < SAMPLES, "killed too late to show anything"
    second = start(tmp_path, kind)
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 0, (tmp_path / f"{kind}.err").read_text()[-3000:]
    began = Counter(entries(tmp_path, "began"))
    assert all(began[point] == 1 for point in done)
    assert len(began) >= SAMPLES
    expected = f"{[2 * n for n in range(SAMPLES)]}" if kind == "grid" else f"{SAMPLES} True"
    assert printed.strip().endswith(f"RESULT {expected}")
