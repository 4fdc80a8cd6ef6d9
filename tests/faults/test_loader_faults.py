"""Reader processes are killed at random moments: the batches stay the same, or the run ends promptly with one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.loading.order import global_batch
from data_pipeline.loading.reader_processes import ReaderProcesses
from data_pipeline.storage.manifest import Manifest
from infra.errors import LoaderError
from tests.faults.rank_process import Fault, run_ranks
from tests.readers import reader_pids
from tests.runs import ROOT, losses, pretrain_command, run

STEPS = 40


def loader_of(shards, **options):
    manifest = Manifest.load(shards)
    return TwoViewLoader(manifest, rows=manifest.rows(), global_batch=6, **options)


@pytest.fixture(scope="module")
def undisturbed(shards):
    loader = loader_of(shards)
    batches = [next(loader) for _ in range(STEPS)]
    loader.close()
    return batches


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.jobs)])
def test_killing_reader_processes_at_random_moments_changes_no_batch(shards, undisturbed, capfd, seed):
    loader, chance = loader_of(shards, workers=2, prefetch=2), random.Random(seed)
    next_kill, kills = threading.Event(), []

    def kill_now_and_then():
        while not next_kill.wait(chance.uniform(0.0, 0.05)):
            if len(kills) < 6 and chance.random() < 0.3:
                pid = chance.choice(reader_pids(loader))
                try:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(pid)
                except ProcessLookupError:
                    pass
                next_kill.wait(chance.uniform(0.5, 1.5))  # so that the new process is in the middle of a step

    batches = [next(loader)]
    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        while len(batches) < STEPS or (len(kills) < 2 and len(batches) < 4000):
            batch = next(loader)
            if len(batches) < STEPS:
                batches.append(batch)
    finally:
        next_kill.set()
        killer.join()
        loader.close()
    assert len(kills) >= 2
    for batch, expected in zip(batches, undisturbed, strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert "a reader process was lost (by signal SIGKILL) and is started again" in capfd.readouterr().err


def test_killing_all_reader_processes_at_once_changes_no_batch(shards, undisturbed):
    loader = loader_of(shards, workers=2, prefetch=1)
    for step in range(6):
        batch = next(loader)
        assert torch.equal(batch["views"], undisturbed[step]["views"])
        if step in (0, 3):
            for pid in reader_pids(loader):
                os.kill(pid, signal.SIGKILL)
    loader.close()


def test_reader_processes_that_keep_dying_end_the_run_promptly_with_one_line(shards):
    loader = loader_of(shards, workers=1)
    next(loader)
    stop = threading.Event()

    def keep_killing():
        while not stop.wait(0.01):
            for pid in reader_pids(loader):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=keep_killing)
    killer.start()
    started = time.monotonic()
    try:
        with pytest.raises(
            LoaderError, match=r"reader processes died 4 times at one batch \(the last by signal SIGKILL\)"
        ):
            for _ in range(20):
                next(loader)
    finally:
        stop.set()
        killer.join()
        loader.close()
    assert time.monotonic() - started < 30


def test_a_new_loader_continues_where_a_failed_one_stopped(shards, undisturbed):
    loader = loader_of(shards, workers=2)
    for _ in range(5):
        next(loader)
    for pid in reader_pids(loader):
        os.kill(pid, signal.SIGKILL)
    state = loader.state_dict()
    loader.close()
    again = loader_of(shards)
    again.load_state_dict(state)
    assert torch.equal(next(again)["views"], undisturbed[5]["views"])
    again.close()


@pytest.mark.parametrize("started", [True, False], ids=["while they read", "while they start"])
def test_signals_to_a_whole_job_reach_no_reader_process(shards, undisturbed, capfd, monkeypatch, started):
    """SLURM and a terminal send SIGTERM, SIGUSR1 and SIGINT to all processes of a job; the trainer alone handles them."""

    def send_to(pid):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)

    def started_reader(*arguments, start=ReaderProcesses._start):
        reader = start(*arguments)
        send_to(reader.process.pid)
        return reader

    if not started:
        monkeypatch.setattr(ReaderProcesses, "_start", started_reader)
    loader = loader_of(shards, workers=2, prefetch=1)
    batches = [next(loader)]
    for pid in reader_pids(loader):
        send_to(pid)
    batches += [next(loader) for _ in range(5)]
    for batch, expected in zip(batches, undisturbed, strict=False):
        assert torch.equal(batch["views"], expected["views"])
    loader.close()
    assert "a reader process was lost" not in capfd.readouterr().err


def test_reader_processes_end_when_the_training_process_is_killed(shards):
    code = (
        "import sys, time; from data_pipeline import Manifest, TwoViewLoader; m = Manifest.load(sys.argv[1])\n"
        "l = TwoViewLoader(m, rows=m.rows(), global_batch=6, workers=2); next(l)\n"
        "print(*l._readers.pids, flush=True); time.sleep(100)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(shards)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        readers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        assert len(readers) == 2
    finally:
        trainer.kill()
        trainer.wait()
    gone, alive = psutil.wait_procs(readers, timeout=10)
    for process in alive:
        process.kill()
    assert len(gone) == 2


@pytest.fixture
def damage(shards, tmp_path):
    """``damage(rows)`` returns a copy of the shards in which one bit of each of these scans is wrong."""

    def copy(rows):
        folder = tmp_path / "damaged"
        shutil.copytree(shards, folder)
        manifest = Manifest.load(folder)
        for row in rows:
            scan = manifest.scans.iloc[row]
            path = folder / manifest.shards[int(scan["shard"])]["name"]
            content = bytearray(path.read_bytes())
            content[int(scan["offset"]) + 50] ^= 1
            path.write_bytes(content)
        return folder

    return copy


@pytest.mark.jobs
@pytest.mark.distributed
def test_a_run_continues_after_a_damaged_scan_and_reports_it(shards, damage, tmp_path):
    candidates = Manifest.load(shards).rows(split="pretrain")
    first_batch, _ = global_batch(len(candidates), seed=0, step=0, batch=8)
    folder = damage([int(candidates[first_batch[0]])])  # rank 0, which writes metrics.jsonl, reads it in the first step
    output = tmp_path / "run"
    printed = run_ranks(pretrain_command(folder, output, 12, "--data.workers=1"), tmp_path)
    assert "fails its checksum; run `yaware shards verify" in printed
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["wait_seconds"] / row["seconds"] == pytest.approx(row["data_stall"]) for row in rows)
    assert all(row["data_stall"] <= 1 for row in rows)
    assert [row["bad_scans"] for row in rows] == [1] * 12
    assert "stall" in printed


@pytest.mark.jobs
@pytest.mark.distributed
def test_a_run_on_damaged_shards_ends_with_one_line(damage, tmp_path):
    folder = damage(range(72))
    done = run(pretrain_command(folder, tmp_path / "run", 12), tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("yaware: error: ")]
    assert errors
    assert all("cannot be read" in line for line in errors)
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("reader", [pytest.param("stream", marks=pytest.mark.jobs), "dali"])
def test_a_killed_run_with_a_sequential_reader_resumes_exactly(shards, tmp_path, reader):
    more = [f"--data.reader={reader}", "--data.buffer=8"]
    run_ranks(pretrain_command(shards, tmp_path / "whole", 10, *more), tmp_path / "logs")
    command = pretrain_command(shards, tmp_path / "killed", 10, *more)
    run_ranks(command, tmp_path / "logs", fault=Fault(0, "the forward pass of step 7"))
    assert 6 <= len(losses(tmp_path / "killed")) < 10, "the run was not killed in its eighth step"
    assert "resuming after step" in run_ranks(command, tmp_path / "resumed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
