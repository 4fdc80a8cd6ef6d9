"""Failures around a run: disk, output folder, tracking store, shards, a loss that is not finite. Each gives one clear line,
overwrites nothing, and the run continues if it can."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.distributed import free_port
from infra.machine import git_tags
from infra.tracking import runs
from pretrain import train
from pretrain.run.checkpoint import verify_checkpoint
from tests.faults.rank_process import start, wait
from tests.runs import losses
from tests.stores import store_at

WORLD, STEPS = 2, 8
pytestmark = pytest.mark.timeout(1200)
BAD_STEPS = (2, 5)


def arguments(shards: Path, output: Path, store: str, **more: object) -> list[str]:
    given = {
        "data.shards": shards, "run.output": output, "train.steps": STEPS, "batch.global": 8, "checkpoint.every_steps": 3,
        "encoder.options": "{width: 0.25, norm: group}", "train.watchdog_seconds": 30, "run.tracking_uri": store,
    }  # fmt: skip
    given |= {name.replace("__", "."): value for name, value in more.items()}
    return ["--config", "demo-cpu", *(f"--{key}={value}" for key, value in given.items())]


@pytest.fixture(scope="module")
def store(shards):
    # Shared with test_kill_points.py: creating the tables takes longer than a run.
    return store_at(shards.parent / "kill-points.db")


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("rank-*.log")))


def error_lines(folder: Path) -> list[str]:
    return [line for line in logs(folder).splitlines() if line.startswith("yaware: error: ")]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_disk_on_rank_1(rank: int) -> None:
    """From the second checkpoint on, the files of rank 1 are truncated."""
    import torch

    save = torch.save

    def full(state: object, target: object, *rest: object, **options: object) -> None:
        save(state, target, *rest, **options)
        if rank == 1 and "step-00000006" in str(target):
            os.truncate(str(target), 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    torch.save = full


@pytest.mark.jobs
@pytest.mark.distributed
def test_a_full_disk_during_a_checkpoint_stops_all_ranks_and_keeps_the_checkpoint_before(shards, store, tmp_path):
    command = arguments(shards, tmp_path / "run", store)
    assert wait(start(command, tmp_path, WORLD, harm=full_disk_on_rank_1)) == [1, 1], logs(tmp_path)
    (line,) = error_lines(tmp_path)
    assert "checkpoint step-00000006 cannot be written to" in line
    assert "rank 1 on " in line
    assert "No space left on device" in line
    assert "step 3 is the last good one; make room or lower checkpoint.keep, then start the same command again" in line
    assert "Traceback" not in logs(tmp_path)
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*step-*")) == ["step-00000003"]
    assert verify_checkpoint(checkpoints / "step-00000003") is None
    interrupted = losses(tmp_path / "run")
    assert wait(start(command, tmp_path, WORLD)) == [0, 0], logs(tmp_path)
    assert "resuming after step 3" in logs(tmp_path)
    assert losses(tmp_path / "run")[: len(interrupted)] == interrupted
    assert verify_checkpoint(checkpoints / f"step-{STEPS:08d}") is None


@pytest.fixture
def small_disk(tmp_path):
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("megabytes", [5, 47, 60, 80])
def test_a_file_system_that_fills_up(shards, store, tmp_path, small_disk, megabytes):
    """A checkpoint has 42 MB: model 8.6, optimiser 12.9 per rank, encoder 8.3."""
    resize = ["mount", "-o", "remount,size={}m", str(small_disk)]
    subprocess.run([word.format(megabytes) for word in resize], check=True)
    command = arguments(shards, small_disk / "run", store, checkpoint__keep=9)
    assert wait(start(command, tmp_path, WORLD)) == [1, 1], logs(tmp_path)
    (line,) = error_lines(tmp_path)
    assert f"cannot be written to {small_disk}" in line
    assert ("there is none yet" if megabytes == 5 else "step 3 is the last good one") in line
    assert "Traceback" not in logs(tmp_path)
    checkpoints = small_disk / "run/checkpoints"
    assert not list(checkpoints.glob(".unfinished*"))
    assert all(verify_checkpoint(folder) is None for folder in checkpoints.glob("step-*"))
    subprocess.run([word.format(400) for word in resize], check=True)
    assert wait(start(command, tmp_path, WORLD)) == [0, 0], logs(tmp_path)
    assert [step for step, _ in losses(small_disk / "run")] == list(range(STEPS))


def test_a_read_only_folder_is_refused_before_the_ranks_start(shards, store, tmp_path, capsys, small_disk):
    (small_disk / "kept").write_text("x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.run(["pretrain", *arguments(shards, small_disk / "runs/new", store)]) == 2
    text = capsys.readouterr().err
    assert f"run.output={small_disk}/runs/new cannot be written: {small_disk} is read-only or no folder" in text
    assert text.count("\n") == 1
    (tmp_path / "file").write_text("x")
    assert cli.run(["pretrain", *arguments(shards, tmp_path / "file/run", store)]) == 2
    assert "is read-only or no folder" in capsys.readouterr().err


def test_shards_that_changed_since_the_run_started_are_refused(shards, store, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"manifest_digest": "0" * 64}))
    before = content(tmp_path)
    assert cli.run(["pretrain", *arguments(shards, tmp_path / "run", store)]) == 2
    text = capsys.readouterr().err
    assert "started on shards with digest 000000000000, data.shards now has" in text
    assert text.count("\n") == 1
    assert content(tmp_path) == before


def test_missing_and_truncated_shards_are_named_before_the_ranks_start(shards, store, tmp_path, capsys):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    first, second = sorted(folder.glob("*.tar"))[:2]
    first.unlink()
    os.truncate(second, 1000)
    assert cli.run(["pretrain", *arguments(folder, tmp_path / "run", store)]) == 2
    text = capsys.readouterr().err
    assert f"{first.name} is missing, {second.name} has 1000 bytes, not " in text
    assert f"yaware shards verify {folder} --repair COHORT" in text
    assert text.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_run_trains_without_its_tracking_store_which_gets_everything_later(shards, store, tmp_path, capsys):
    watched = {"monitor__every_epochs": 1, "monitor__split": "downstream", "monitor__tasks": "[age, sex]",
               "monitor__max_scans": 20, "monitor__view_scans": 8, "monitor__collapse_below": 0.99}  # fmt: skip
    down = arguments(shards, tmp_path / "run", "http://127.0.0.1:9", run__experiment="down", **watched)
    assert wait(start(down, tmp_path, WORLD)) == [0, 0], logs(tmp_path)
    assert logs(tmp_path).count("tracking store http://127.0.0.1:9 does not answer") == 1
    spool = tmp_path / "run/mlflow-spool.jsonl"
    assert spool.is_file()
    assert "pretrain: ALARM after 4 steps: the embeddings of all scans are nearly equal" in logs(tmp_path)
    line = [line for line in logs(tmp_path).splitlines() if line.startswith("pretraining y-aware: 8/8 steps")][-1]
    assert re.search(r"scans/s [\d.]+, loss [\d.]+, lr [\de.-]+, grad norm [\d.]+, stall \d+%, memory [\d.]+ GB$", line)
    later = arguments(shards, tmp_path / "run", store, run__experiment="down", **watched)
    assert cli.run(["pretrain", *later]) == 0
    printed = capsys.readouterr().out
    assert "sent to MLflow the metrics that had been waiting" in printed
    assert "is already complete" in printed
    assert not spool.exists()
    (row,) = runs.runs(store, "down", "pretraining")
    assert row["status"] == "FINISHED"
    assert runs.metric_history(store, row["run_id"], "loss") == losses(tmp_path / "run")
    assert {3, 6, 8} <= {model["step"] for model in runs.checkpoints(store, row["run_id"])}
    assert row["params"]["loss.name"] == "y-aware"
    expected = {"memory_gb", "system/cpu_utilization_percentage", "monitor/uniformity", "monitor/sex_balanced_accuracy"}
    assert expected <= row["metrics"].keys()
    assert row["tags"]["yaware.collapse"].startswith("after 8 steps: the embeddings")
    assert row["tags"]["yaware.manifest_digest"] == Manifest.load(shards).digest
    commit = git_tags(Path(train.__file__).parent).get("mlflow.source.git.commit")
    assert row["tags"].get("mlflow.source.git.commit") == commit


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_tracking_server_that_fails_during_the_run_gets_everything_later(shards, tmp_path, capsys):
    uri, server = mlflow_server(tmp_path)
    try:
        ranks = start(arguments(shards, tmp_path / "run", uri, run__experiment="mid-run"), tmp_path, WORLD)
        limit = time.monotonic() + 200
        while len(losses(tmp_path / "run")) < 2:
            assert time.monotonic() < limit, logs(tmp_path)
            time.sleep(0.05)
    finally:
        stop(server)
    assert wait(ranks) == [0, 0], logs(tmp_path)
    assert logs(tmp_path).count("does not answer") == 1
    assert (tmp_path / "run/mlflow-spool.jsonl").is_file()
    uri, server = mlflow_server(tmp_path)
    try:
        assert cli.run(["pretrain", *arguments(shards, tmp_path / "run", uri, run__experiment="mid-run")]) == 0
        assert "sent to MLflow the metrics that had been waiting" in capsys.readouterr().out
        (row,) = runs.runs(uri, "mid-run", "pretraining")
        assert row["status"] == "FINISHED"
        assert runs.metric_history(uri, row["run_id"], "loss") == losses(tmp_path / "run")
        assert [model["step"] for model in runs.checkpoints(uri, row["run_id"])] == [3, 6, 8]
    finally:
        stop(server)


def mlflow_server(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start an MLflow server; return its address and process."""
    port = free_port()
    given = {"host": "127.0.0.1", "port": port, "backend-store-uri": store_at(folder / "server.db"), "workers": 1,
             "artifacts-destination": folder / "artifacts"}  # fmt: skip
    command = [sys.executable, "-m", "mlflow", "server", *(f"--{key}={value}" for key, value in given.items())]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    limit = time.monotonic() + 200
    while True:
        assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
        assert time.monotonic() < limit, "the server did not start"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return f"http://127.0.0.1:{port}", server
        except OSError:
            time.sleep(0.5)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Kill the server and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only")])
def test_a_disk_error_outside_checkpoints_is_one_line(monkeypatch, capfd, number, text):
    def fails(recipe):
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")

    monkeypatch.setattr(train, "train", fails)
    assert train.main(["--config", "demo-cpu", "--train.watchdog_seconds=0"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("yaware: error: rank 0: [Errno ")
    assert text in error
    assert "'run/metrics.jsonl'" in error
    assert error.endswith("then the same command continues from the last checkpoint\n")
    assert error.count("\n") == 1


def test_another_oserror_keeps_its_traceback(monkeypatch):
    def fails(recipe):
        raise FileNotFoundError(errno.ENOENT, "gone", "x")

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(FileNotFoundError):
        train.main(["--config", "demo-cpu", "--train.watchdog_seconds=0"])


def bad_loss_on_rank_1(rank: int) -> None:
    from pretrain.run.objective import Objective

    loss, calls = Objective.loss, iter(range(1000))

    def corrupted(*arguments: object) -> object:
        value = loss(*arguments)
        return value * float("nan") if next(calls) in BAD_STEPS and rank == 1 else value

    Objective.loss = corrupted


@pytest.mark.distributed
def test_steps_that_are_not_finite_are_skipped_up_to_the_limit_and_then_stop_the_run(shards, store, tmp_path):
    by_the_clock = {"checkpoint__every_steps": 100, "checkpoint__every_minutes": 1e-7, "checkpoint__keep": 9}
    command = arguments(shards, tmp_path / "run", store, train__max_skipped_steps=1, **by_the_clock)
    assert wait(start(command, tmp_path, WORLD, harm=bad_loss_on_rank_1)) == [1, 1], logs(tmp_path)
    first, second = BAD_STEPS
    assert f"pretrain: step {first}: the loss is nan; step skipped (1 of at most 1); its scans are listed in" in logs(
        tmp_path
    )
    (line,) = error_lines(tmp_path)
    assert f"step {second}: the loss is nan after 1 skipped steps (train.max_skipped_steps=1)" in line
    found = losses(tmp_path / "run")
    assert [step for step, _ in found] == list(range(second))
    assert [step for step, loss in found if loss is None] == [first]
    # A checkpoint is due by the clock after each step; the votes of a skipped step count in the next.
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == [f"step-{step:08d}" for step in (1, 2, 4, 5)]
    skipped = [json.loads((path / "state.json").read_text())["not_finite_steps"] for path in checkpoints]
    assert skipped == [0, 0, 1, 1]
    for step in BAD_STEPS:
        scans = json.loads((tmp_path / f"run/not-finite-step-{step:08d}.json").read_text())["scans"]
        assert [len(keys) for keys in scans.values()] == [4, 4]


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(shards, store, tmp_path):
    command = arguments(shards, tmp_path / "run", store, train__steps=400, checkpoint__every_steps=1000)
    ranks = start(command, tmp_path, WORLD)
    limit = time.monotonic() + 150
    while len(losses(tmp_path / "run")) < 2:
        assert time.monotonic() < limit, logs(tmp_path)
        time.sleep(0.01)
    ranks[1].terminate()
    assert wait(ranks) == [0, 0], logs(tmp_path)
    done = len(losses(tmp_path / "run"))
    assert 2 <= done < 400
    assert f"stopped by a signal to another rank after step {done}, saved; the same command continues" in logs(tmp_path)
    assert verify_checkpoint(tmp_path / f"run/checkpoints/step-{done:08d}") is None
