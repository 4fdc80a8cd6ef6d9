"""Ray tasks and Ray Tune trials, on a local cluster that this file starts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from infra import ray_cluster, tuning
from infra.errors import UserError


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
    import subprocess
    import sys

    code = "from infra import ray_cluster\nwith ray_cluster.session(): pass"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers" in out.stderr
    assert UserError.__name__ in out.stderr


def die_always():
    os._exit(1)


def test_a_task_that_kills_every_worker_raises_a_user_error():
    with pytest.raises(UserError, match="a Ray worker died at every attempt of the same task"):
        list(ray_cluster.map_unordered(die_always, [()], in_flight=1, retries=1))
