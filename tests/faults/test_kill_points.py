"""A rank is killed by SIGKILL at chosen and random points. After a restart, scans, losses and weights are bit-identical.

One run is killed repeatedly, after each restart at another point. ``FAULT_RUNS=30 pytest -m ''`` makes 30 more random kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from infra.files import sha256_of
from tests.faults.rank_process import Fault, start, wait
from tests.runs import losses
from tests.stores import store_at

WORLD, STEPS, EVERY = 2, 12, 3
# Random points: a phase of the watchdog, and the longest delay of the kill after its beginning, in seconds.
PHASES = {
    "the building of the engine": 0.5, "the loading of the checkpoint": 0.3, "the loading of batch": 0.05,
    "the forward pass": 0.1, "the exchange of embeddings": 0.02, "the gradient reduction": 0.1, "the logging": 0.02,
    "the monitor's look": 0.3, "the writing of the checkpoint": 0.4,
}  # fmt: skip
ONCE = ("the building of the engine", "the loading of the checkpoint")
# Points that a random moment rarely hits: (rank, point, number of its occurrence).
POINTS = [
    (1, "the exchange of embeddings", 1),  # while the other rank waits in a collective, before the first checkpoint
    (1, "in a shard", 0), (0, "before the rename", 0), (0, "before the pointer", 0), (0, "after the pointer", 1),
    (0, "in the cleaning", 0),
]  # fmt: skip
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]


def command_of(shards: Path, folder: Path) -> list[str]:
    given = {
        "data.shards": shards, "run.output": folder / "run", "train.steps": STEPS, "batch.global": 8,
        "encoder.options": "{width: 0.25, norm: group}", "checkpoint.every_steps": EVERY, "checkpoint.keep": 2,
        "monitor.every_epochs": 1, "monitor.split": "downstream", "monitor.max_scans": 20, "monitor.view_scans": 8,
        "train.watchdog_seconds": 30,
        # One store for all runs, because creating its tables takes longer than a run.
        "run.tracking_uri": store_at(shards.parent / "kill-points.db"),
    }  # fmt: skip
    return ["--config", "demo-cpu", *(f"--{key}={value}" for key, value in given.items())]


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert wait(start(command_of(shards, folder), folder, WORLD)) == [0, 0], logs(folder)
    assert len({loss for _, loss in losses(folder / "run")}) == STEPS
    return folder


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank-*.log")))


def metrics(folder: Path) -> list[tuple]:
    """Return step, loss, lr and gradient norm of each step, to the last digit."""
    lines = (folder / "run/metrics.jsonl").read_text().splitlines() if (folder / "run/metrics.jsonl").is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


def scans(folder: Path) -> list[dict[int, list[int]]]:
    """Return the scans of each step, by rank. A repeated step must have the same scans."""
    by_rank = []
    for path in sorted(folder.glob("scans-*.jsonl")):
        seen: dict[int, list[int]] = {}
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            assert seen.setdefault(step, rows) == rows
        by_rank.append(seen)
    return by_rank


def weights(folder: Path) -> str:
    newest = (folder / "run/checkpoints/latest").read_text().strip()
    assert newest == f"step-{STEPS:08d}"
    return sha256_of(folder / "run/checkpoints" / newest / "encoder/model.safetensors")


def kill(shards: Path, folder: Path, fault: Fault, moments: random.Random) -> bool:
    """Run until ``fault`` triggers, then kill the other rank as a launcher would; return whether it triggered."""
    ranks = start(command_of(shards, folder), folder, WORLD, fault)
    victim, other = ranks[fault.rank], ranks[1 - fault.rank]
    limit = time.monotonic() + 150
    while victim.exitcode is None and time.monotonic() < limit:
        time.sleep(0.01)
    if victim.exitcode == -signal.SIGKILL:
        time.sleep(moments.choice([0.0, 0.2]))
        (other.terminate if moments.random() < 0.3 else other.kill)()
        other.join(10)
    status = wait(ranks, 60)
    assert status[fault.rank] in (-signal.SIGKILL, 0), (fault, logs(folder))
    return status[fault.rank] == -signal.SIGKILL


def assert_ends_the_same(shards, folder, uninterrupted):
    assert wait(start(command_of(shards, folder), folder, WORLD)) == [0, 0], logs(folder)
    assert metrics(folder) == metrics(uninterrupted)
    assert scans(folder) == scans(uninterrupted)
    assert weights(folder) == weights(uninterrupted)
    checkpoints = folder / "run/checkpoints"
    assert not [path.name for path in checkpoints.iterdir() if path.name.startswith((".unfinished", "damaged"))]
    assert (checkpoints / "best.json").read_bytes() == (uninterrupted / "run/checkpoints/best.json").read_bytes()


@pytest.mark.jobs
def test_a_run_killed_at_every_point_of_a_checkpoint_and_in_a_collective_ends_the_same(shards, uninterrupted, tmp_path):
    expected = metrics(uninterrupted)
    for rank, point, nth in POINTS:
        assert kill(shards, tmp_path, Fault(rank, point, nth), random.Random(0)), f"{point} was never reached"
        assert metrics(tmp_path) == expected[: len(metrics(tmp_path))], point
    assert_ends_the_same(shards, tmp_path, uninterrupted)


def random_fault(moments: random.Random) -> Fault:
    phase = moments.choice(list(PHASES))
    nth = 0 if phase in ONCE else moments.randrange(3)
    return Fault(moments.randrange(WORLD), phase, nth, moments.uniform(0, PHASES[phase]))


def kill_at_random(shards, folder, uninterrupted, seed: int, kills: int) -> int:
    """Kill a run up to ``kills`` times at random; return how many kills came before its end."""
    moments, hits = random.Random(seed), 0
    for _ in range(kills):
        fault = random_fault(moments)
        hit = kill(shards, folder, fault, moments)
        done = metrics(folder)
        print(f"{fault}: {'hit' if hit else 'not reached'}, {len(done)} steps done", flush=True)
        hits += hit
        assert done == metrics(uninterrupted)[: len(done)], fault
        if len(done) == STEPS:
            break
    assert_ends_the_same(shards, folder, uninterrupted)
    return hits


@pytest.mark.jobs
def test_a_run_killed_at_random_moments_ends_the_same(shards, uninterrupted, tmp_path):
    assert kill_at_random(shards, tmp_path, uninterrupted, seed=1, kills=2)


@pytest.mark.slow
def test_runs_killed_at_many_random_moments_end_the_same(shards, uninterrupted, tmp_path):
    wanted, hits, seed = int(os.environ.get("FAULT_RUNS", "30")), 0, 100
    while hits < wanted:
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        hits += kill_at_random(shards, folder, uninterrupted, seed, min(5, wanted - hits))
        print(f"seed {seed}: {hits} kills so far", flush=True)
        seed += 1
