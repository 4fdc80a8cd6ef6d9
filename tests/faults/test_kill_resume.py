"""SIGKILL to both ranks of the real command: the same command continues with the losses of an uninterrupted run.

(test_kill_points.py kills one rank at any point, without the launcher.)"""

from __future__ import annotations

import pytest

from tests.faults.rank_process import run_ranks
from tests.runs import kill_ranks_when, losses, pretrain_command, run

STEPS = 14
pytestmark = [pytest.mark.distributed, pytest.mark.jobs]


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(pretrain_command(shards, folder / "run", STEPS), folder)
    expected = losses(folder / "run")
    assert [step for step, _ in expected] == list(range(STEPS))
    assert len({loss for _, loss in expected}) == STEPS
    return expected


def test_a_killed_run_ends_with_the_losses_of_an_uninterrupted_one(uninterrupted, shards, tmp_path):
    command = pretrain_command(shards, tmp_path / "run", STEPS)
    kill_ranks_when(command, tmp_path, lambda: len(losses(tmp_path / "run")) >= 6)
    assert len(losses(tmp_path / "run")) < STEPS, "killed too late to show anything"
    done = run(command, tmp_path)
    assert done.returncode == 0
    assert "resuming after step" in done.stdout
    assert losses(tmp_path / "run") == uninterrupted
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:08d}"
