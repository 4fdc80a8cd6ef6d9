"""A run that is asked to stop saves and exits with status 0; the same command continues it on the same or other ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.rank_process import at_phase, run_ranks, start, wait
from tests.runs import ROOT, environment, losses, pretrain_command, run
from tests.stores import store_at

STEPS = 8
# Batch statistics would differ with the number of ranks.
GROUP = ("--encoder.options={width: 0.25, norm: group}", "--checkpoint.every_steps=100", "--optimizer.lr=1e-4",
         "--train.ema_decay=0.9")  # fmt: skip
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(pretrain_command(shards, folder / "run", STEPS, *GROUP), folder)
    return losses(folder / "run"), folder / "run"


def weights_of(run):
    """Return the exported file of the averaged encoder after the last step."""
    return (run / f"checkpoints/step-{STEPS:08d}/encoder/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory):
    """Return the folder and the output of a run that got SIGTERM after some steps."""
    folder = tmp_path_factory.mktemp("stopped")
    command = pretrain_command(shards, folder / "run", STEPS, *GROUP)
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=log, stderr=log)
        try:
            limit = time.monotonic() + 200
            while len(losses(folder / "run")) < 2:
                assert started.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < limit
                time.sleep(0.01)
            started.send_signal(signal.SIGTERM)
            assert started.wait(timeout=100) == 0, (folder / "log").read_text()[-3000:]
        finally:
            started.kill()
            started.wait()
    return folder, (folder / "log").read_text()


@pytest.mark.jobs
def test_a_stopped_run_saves_its_last_step_and_prints_how_to_continue(stopped):
    folder, text = stopped
    done = len(losses(folder / "run"))
    assert 2 <= done < STEPS
    assert (folder / "run/checkpoints/latest").read_text().strip() == f"step-{done:08d}"
    assert f"pretrain: stopped by SIGUSR1 after step {done}, saved; the same command continues" in text
    assert "Traceback" not in text


@pytest.mark.jobs
def test_the_same_command_ends_like_an_uninterrupted_run(stopped, uninterrupted, shards, tmp_path):
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    done = run(pretrain_command(shards, tmp_path / "run", STEPS, *GROUP), tmp_path)
    assert done.returncode == 0
    assert "resuming after step" in done.stdout
    assert losses(tmp_path / "run") == uninterrupted[0]
    assert weights_of(tmp_path / "run") == weights_of(uninterrupted[1])


@pytest.mark.jobs
def test_a_run_continued_on_other_ranks_has_equal_losses_within_rounding(stopped, uninterrupted, shards, tmp_path):
    ranks, stage = 1, 3
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    command = pretrain_command(shards, tmp_path / "run", STEPS, *GROUP, f"--deepspeed.zero_optimization.stage={stage}")
    printed = run_ranks(command, tmp_path, ranks)
    assert f"of 2 ranks under ZeRO 1 is converted for {ranks} under ZeRO {stage}" in printed
    continued = losses(tmp_path / "run")
    assert [step for step, _ in continued] == [step for step, _ in uninterrupted[0]]
    for (_, loss), (_, expected) in zip(continued, uninterrupted[0], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    assert not list((tmp_path / "run/checkpoints").glob(".unfinished-*"))


@pytest.mark.jobs
@pytest.mark.jobs
def test_resume_never_and_another_precision_are_refused_in_one_line(stopped, shards, tmp_path):
    for option, text in (
        ("--train.precision=bf16", "train.precision was 'fp32', now 'bf16'"),
        ("--resume=never", "holds a checkpoint of step"),
    ):
        done = run(pretrain_command(shards, stopped[0] / "run", STEPS, *GROUP, option), tmp_path)
        assert done.returncode != 0
        assert text in done.stderr
        assert done.stderr.count("yaware: error:") == 1
        assert "Traceback" not in done.stderr


def signal_in_step_2(rank):
    """Rank 1 gets SIGUSR1 after its forward pass of the third step."""
    if rank == 1:
        at_phase("the exchange of embeddings of step 2", lambda: os.kill(os.getpid(), signal.SIGUSR1))


def test_a_signal_after_the_forward_pass_takes_effect_in_that_step(shards, tmp_path):
    words = pretrain_command(shards, tmp_path / "run", STEPS, *GROUP)
    command = [*words[words.index("--config") :], f"--run.tracking_uri={store_at(tmp_path / 'mlflow.db')}"]
    assert wait(start(command, tmp_path, 2, harm=signal_in_step_2)) == [0, 0], (tmp_path / "rank-0.log").read_text()
    output = (tmp_path / "rank-0.log").read_text()
    assert "pretrain: stopped by a signal to another rank after step 3, saved; the same command continues" in output
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000003"
