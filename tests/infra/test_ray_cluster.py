"""Ray tasks and Ray Tune trials, on a local cluster that this file starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info

from infra import ray_cluster, tuning
from infra.errors import UserError
from infra.internals import LibraryChanged
from infra.search_place import searching
from tests.listening import reachable


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_cluster.session(2):
        yield


def square(n):
    return n * n, os.environ["OMP_NUM_THREADS"]


def fail_on_three(n):
    if n == 3:
        raise ValueError("three is not allowed")
    return n


def die_once(path):
    if not Path(path).exists():
        Path(path).touch()
        os._exit(1)
    return "second attempt"


def trial(point, data):
    if point.get("fail"):
        raise ValueError("intended failure")
    with (Path(data["log"]) / str(point["c"])).open("a") as stream:
        stream.write("ran\n")
    return {"c": point["c"], "scores": data["base"] * point["c"]}


def test_tasks_yield_their_index_and_run_with_one_thread():
    done = dict(ray_cluster.map_unordered(square, [(n,) for n in range(10)], in_flight=3))
    assert done == {n: (n * n, "1") for n in range(10)}


def test_a_local_cluster_listens_on_loopback_only():
    list(ray_cluster.map_unordered(square, [(1,)], in_flight=1))  # a worker has started
    assert not reachable([psutil.Process(), *psutil.Process().children(recursive=True)])
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ  # other clusters are as before


@pytest.mark.parametrize("name", ["ENABLE_RAY_CLUSTER", "ENABLE_RAY_CLUSTERS_ENV_VAR"])
def test_a_ray_without_the_switch_of_loopback_starts_no_cluster(monkeypatch, name):
    ray = ray_cluster.import_ray()
    monkeypatch.delattr(ray._private.ray_constants, name)
    before = dict(os.environ)
    with (
        pytest.raises(LibraryChanged, match=f"ray .* ray._private.ray_constants has no attribute '{name}'"),
        ray_cluster._on_loopback(ray),
    ):
        pytest.fail("the block ran, so a cluster would have started")
    assert not hasattr(ray._private.ray_constants, name)
    assert dict(os.environ) == before


def test_an_exception_of_a_task_is_raised_in_the_caller():
    with pytest.raises(ValueError, match="three is not allowed"):
        list(ray_cluster.map_unordered(fail_on_three, [(n,) for n in range(5)], in_flight=2))


def test_a_task_whose_worker_dies_runs_again(tmp_path):
    assert list(ray_cluster.map_unordered(die_once, [(str(tmp_path / "mark"),)], in_flight=1)) == [
        (0, "second attempt")
    ]


def test_trials_return_arrays_in_the_order_of_the_points_and_run_once(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    points = [{"c": c} for c in (3, 1, 2)]
    data = {"base": np.arange(4.0), "log": str(log)}
    for _ in range(2):  # the second call reads the results of the first
        results = tuning.tune_grid(trial, points, data=data, storage=tmp_path, name="search")
        assert [r["c"] for r in results] == [3, 1, 2]
        assert np.array_equal(results[2]["scores"], np.arange(4.0) * 2)
    assert {p.name: p.read_text() for p in log.iterdir()} == {"1": "ran\n", "2": "ran\n", "3": "ran\n"}


def test_a_failing_trial_raises_its_cause(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 trials failed.*intended failure"):
        tuning.tune_grid(
            trial,
            [{"c": 1}, {"c": 2, "fail": True}],
            data={"base": 1.0, "log": str(tmp_path)},
            storage=tmp_path,
            name="bad",
        )


def test_an_inner_session_uses_the_outer_cluster():
    with ray_cluster.session(1) as ray:
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_an_address_without_a_cluster_raises_a_user_error(tmp_path):
    code = "from infra import ray_cluster\nwith ray_cluster.session(): pass"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers" in out.stderr
    assert UserError.__name__ in out.stderr


def die_always():
    os._exit(1)


def test_a_task_that_kills_every_worker_raises_a_user_error():
    with pytest.raises(UserError, match="a Ray worker died at every attempt of the same task"):
        list(ray_cluster.map_unordered(die_always, [()], in_flight=1, retries=1))


def threads_and_product(point, data):
    matrix = np.random.default_rng(point["seed"]).normal(size=(300, 300))
    time.sleep(point.get("sleep", 0))
    return {"process": os.getpid(), "product": matrix @ matrix.T @ data["vector"]}


@pytest.fixture
def no_cluster(monkeypatch):
    """Let the code believe that no cluster has been started, as in a new process."""
    monkeypatch.setattr(ray_cluster, "has_cluster", lambda: False)


def test_a_small_search_runs_here_with_the_results_of_ray(tmp_path, no_cluster):
    points, data = [{"seed": n} for n in range(4)], {"vector": np.linspace(0, 1, 300)}
    common = {"data": data, "storage": tmp_path}
    here = tuning.tune_grid(threads_and_product, points, name="here", in_process=True, **common)
    in_ray = tuning.tune_grid(threads_and_product, points, name="ray", **common)
    assert {row["process"] for row in here} == {os.getpid()}
    assert os.getpid() not in {row["process"] for row in in_ray}
    for ours, theirs in zip(here, in_ray, strict=True):
        assert np.array_equal(ours["product"], theirs["product"])


def test_a_search_that_takes_longer_than_a_start_of_ray_is_handed_over(tmp_path, no_cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "START_SECONDS", 0.5)
    points, data = [{"seed": n, "sleep": 0.2} for n in range(6)], {"vector": np.ones(300)}
    rows = tuning.tune_grid(threads_and_product, points, data=data, storage=tmp_path, name="handed", in_process=True)
    assert [row["process"] == os.getpid() for row in rows] == [True] + [False] * 5


def process_when_two_are_as_far(point, data):
    """Return the number of this process; in each of its first two trials wait until another one has begun as many."""
    folder, limit, own = Path(data["folder"]), time.monotonic() + 240, str(os.getpid())
    (folder / f"{own}-{point['seed'] % 8}").touch()

    def trials():
        return Counter(path.name.partition("-")[0] for path in folder.iterdir())

    needed = min(2, trials()[own])
    while sum(begun >= needed for begun in trials().values()) < 2:
        assert time.monotonic() < limit, f"no second process has begun {needed} trials"
        time.sleep(0.05)
    return {"process": os.getpid()}


def test_short_points_share_trials_in_every_worker_and_a_point_that_fails_loses_no_other(
    tmp_path, no_cluster, monkeypatch
):
    monkeypatch.setattr(ray_cluster, "START_SECONDS", 0.0)
    folder = tmp_path / "processes"
    folder.mkdir()
    points, data = [{"seed": n} for n in range(40)], {"folder": str(folder)}
    with searching("ray"):
        rows = tuning.tune_grid(
            process_when_two_are_as_far, points, data=data, storage=tmp_path, name="short", in_process=True
        )
    assert [row["seed"] for row in rows] == list(range(40))
    assert len(list((tmp_path / "short-8").glob("GridTrial_*"))) == 8  # four trials for each of the two CPUs
    for first in range(8):  # the five points of a trial run in one process
        assert len({row["process"] for row in rows[first::8]}) == 1
    assert max(Counter(row["process"] for row in rows).values()) <= 30  # two trials at least are another's
    log = tmp_path / "log"
    log.mkdir()
    again = {"data": {"base": 1.0, "log": str(log)}, "storage": tmp_path, "name": "failing", "in_process": True}
    with searching("ray"):
        with pytest.raises(RuntimeError, match=r"(?s)failing-8: 1 of 8 trials failed.*intended failure"):
            tuning.tune_grid(trial, [{"c": c, "fail": c == 11} for c in range(20)], **again)
        assert {int(p.name) for p in log.iterdir()} == {*range(20)} - {11}
        tuning.tune_grid(trial, [{"c": c} for c in range(20)], **again)
    assert {int(p.name): p.read_text() for p in log.iterdir()} == dict.fromkeys(range(20), "ran\n")


def test_the_place_of_a_search_can_be_chosen(tmp_path, no_cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "START_SECONDS", 0.0)
    points, data = [{"seed": n} for n in range(3)], {"vector": np.linspace(0, 1, 300)}
    found = {}
    for place in ("here", "ray"):
        with searching(place):
            found[place] = tuning.tune_grid(
                threads_and_product, points, data=data, storage=tmp_path, name=place, in_process=True
            )
    assert {row["process"] for row in found["here"]} == {os.getpid()}
    assert os.getpid() not in {row["process"] for row in found["ray"]}
    for ours, theirs in zip(found["here"], found["ray"], strict=True):
        assert np.array_equal(ours["product"], theirs["product"])
    with pytest.raises(UserError, match="search='there' is not known; allowed: auto, ray, here"), searching("there"):
        pass


def test_a_search_that_was_killed_here_goes_on_with_its_missing_points(tmp_path, no_cluster):
    log = tmp_path / "log"
    log.mkdir()
    data = {"base": 1.0, "log": str(log)}
    common = {"data": data, "storage": tmp_path, "name": "search", "in_process": True}
    with pytest.raises(RuntimeError, match="search: a trial failed: intended failure"):
        tuning.tune_grid(trial, [{"c": 1}, {"c": 2}, {"c": 3, "fail": True}], **common)
    tuning.tune_grid(trial, [{"c": 1}, {"c": 2}, {"c": 3}], **common)
    assert {p.name: p.read_text() for p in log.iterdir()} == {"1": "ran\n", "2": "ran\n", "3": "ran\n"}


def test_tasks_run_here_in_order_and_with_one_thread():
    def threads(n):
        return n, [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    assert list(ray_cluster.map_unordered(threads, [(n,) for n in range(3)], in_flight=1, in_process=True)) == [
        (n, (n, [1] * len(threads(n)[1]))) for n in range(3)
    ]


def test_a_cluster_on_demand_starts_at_the_first_need_and_ends_with_the_block():
    code = """
from infra import ray_cluster
import sys
assert ray_cluster.is_small(1, None) and not ray_cluster.is_small(1, 2)
with ray_cluster.session_on_demand(1):
    assert "ray" not in sys.modules
    with ray_cluster.session_on_demand(2):
        assert ray_cluster.connect().cluster_resources()["CPU"] == 1
    assert ray_cluster.has_cluster() and not ray_cluster.is_small(1, None)
assert not ray_cluster.has_cluster()
with ray_cluster.session_on_demand():
    pass
print("ok")
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "ok\n", done.stderr[-2000:]


@pytest.mark.jobs
def test_a_session_leaves_the_process_as_it_was():
    script = """
import os, signal, sys
from os.path import basename
from infra import ray_cluster
def niceness():
    return os.nice(0)
def writer_without_torch():
    from data_pipeline.shards.tar import tar_writer
    tar_writer()
    return ray_cluster.is_worker(), "torch" in sys.modules
def state():
    return dict(os.environ), str(signal.getsignal(signal.SIGTERM)), sys.excepthook
before = state()
for _ in range(2):
    with ray_cluster.session(1):
        assert list(ray_cluster.map_unordered(basename, [("a/b",)], in_flight=1)) == [(0, "b")]
        assert list(ray_cluster.map_unordered(niceness, [()], in_flight=1)) == [(0, niceness())]  # no worker starves
        assert list(ray_cluster.map_unordered(writer_without_torch, [()], in_flight=1)) == [(0, (True, False))]
    assert not ray_cluster.is_worker()
    for found, expected in zip(state(), before):
        assert found == expected, (found, expected)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
