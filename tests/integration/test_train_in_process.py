"""``train(recipe)`` called from Python: it can be called again, and it leaves the process as it found it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pretrain.engine import engine
from tests.runs import ROOT, environment, losses, pretrain_command, run


@pytest.fixture(scope="module")
def called(shards, tmp_path_factory):
    """The folder of the runs, and what the process was like before and after each call."""
    folder = tmp_path_factory.mktemp("called")
    command = [sys.executable, "-m", "tests.integration.train_twice", str(shards), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=600)
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    return folder, json.loads(done.stdout.split("RESULT ")[1])


@pytest.mark.jobs
def test_two_recipes_train_in_one_process(called):
    folder, result = called
    for name in ("first", "second"):
        assert [step for step, _ in losses(folder / name)] == [0, 1, 2]
        assert (folder / name / "checkpoints/latest").read_text() == "step-00000003\n"
        assert not (folder / name / "ranks").exists()
    assert len(result["problems"]) == 1
    assert "holds a run of another recipe (optimizer.lr was 0.001, now 0.5)" in result["problems"][0]


@pytest.mark.jobs
@pytest.mark.parametrize("call", ["first", "failed", "second, in a thread"])
@pytest.mark.parametrize("what", ["signals", "wakeup", "environ", "threads", "torch threads", "process group",
                                  "excepthook", "random", "warning filters"])  # fmt: skip
def test_a_call_leaves_the_process_as_it_was(called, call, what):
    result = called[1]
    assert result["after"][call][what] == result["before"][what]


@pytest.mark.jobs
def test_every_call_frees_its_engine(called):
    held = called[1]["held"]
    assert held["first"]["engines"] == 0
    assert held["first"]["tensor bytes"] < 2e6  # the engine's are 34 MB
    assert held["again"] == held["first"]
    assert held["failed"] == held["first"]
    # The shell of a stage-3 engine stays; its weights and optimiser state, 43 MB a call, are freed.
    assert held["stage 3"]["tensor bytes"] < 2 * 10e6


@pytest.mark.jobs
def test_the_losses_are_those_of_the_command(called, shards, tmp_path):
    folder, _ = called
    given = ["--launch.ranks=1", "--encoder.options={width: 0.25, norm: group}", "--checkpoint.every_steps=40",
             "--monitor.every_epochs=1", "--monitor.split=downstream", "--monitor.max_scans=20"]  # fmt: skip
    assert run(pretrain_command(shards, tmp_path / "run", 3, *given), tmp_path).returncode == 0
    assert losses(tmp_path / "run") == losses(folder / "first")


def test_an_unknown_layout_of_deepspeeds_communication_is_an_error(monkeypatch):
    communication = engine.import_deepspeed().comm.comm
    assert hasattr(communication, "cdb")
    destroyed = []
    monkeypatch.delattr(communication, "cdb")
    monkeypatch.setattr(engine.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(engine.torch.distributed, "destroy_process_group", lambda: destroyed.append(True))
    with pytest.raises(RuntimeError, match="deepspeed .* has no attribute 'cdb'"):
        engine.stop_ranks()
    assert destroyed
