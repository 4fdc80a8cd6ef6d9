"""``pretrain(recipe) -> Run`` from Python, with one rank in the process and with several started ranks."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from infra.errors import UserError
from pretrain import ENCODERS, KERNELS, LOSSES, Encoder, Recipe, Run, api, export, pretrain, train
from pretrain.launch.start import start_recipe
from pretrain.run.plan import make_plan
from pretrain.weights.folder import find_encoder
from tests.runs import ROOT, environment

pytestmark = pytest.mark.distributed
HEAD = """
import json, os, signal, threading, time
import yaware

def sections(steps):
    return {{
        "data": {{"shards": {shards!r}, "workers": 0}}, "train": {{"steps": steps}}, "batch": {{"global": 8}},
        "encoder": {{"options": {{"width": 0.25, "norm": "batch"}}}}, "checkpoint": {{"every_steps": 10}},
    }}
"""


def python(code, folder, shards):
    """Run a user's script in a folder; return its last printed line as JSON, and all that it printed."""
    env = {**environment(folder), "PYTHONPATH": str(ROOT)}
    script = HEAD.format(shards=str(shards)) + code
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, shards):
    """A run of one rank that is stopped by Ctrl-C, called again to its end, and called once more."""
    folder = tmp_path_factory.mktemp("one-rank")
    code = """
def state():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return [handlers, dict(os.environ)]

def interrupt():
    while not os.path.exists("run/metrics.jsonl") or not open("run/metrics.jsonl").read():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

def train():
    return yaware.pretrain("demo-cpu", ranks=1, output="run", **sections(30))

before = state()
threading.Thread(target=interrupt).start()
try:
    train()
    message = "was not interrupted"
except KeyboardInterrupt as error:
    message = str(error)
steps = [len(yaware.Run("run").metrics)]
run = train()
steps.append(len(run.metrics))
same = state() == before
assert len(train().metrics) == 30
print(json.dumps({"message": message, "steps": steps, "same": same, "run": repr(run)}))
"""
    return folder, *python(code, folder, shards)


@pytest.mark.jobs
def test_a_stopped_run_continues_at_the_second_call_and_is_complete_at_the_third(stopped_run):
    _, result, printed = stopped_run
    first, second = result["steps"]
    assert result["message"] == f"pretraining was stopped and saved after step {first}; the same call continues it"
    assert 0 < first < 30
    assert second == 30
    assert printed.count("pretrain: starting:") == printed.count(f"pretrain: resuming after step {first}") == 1
    assert printed.count("pretrain: y-aware is already complete: 30 steps") == 1


@pytest.mark.jobs
def test_signal_handlers_and_environment_are_as_before(stopped_run):
    assert stopped_run[1]["same"]


@pytest.mark.jobs
def test_a_run_gives_metrics_checkpoints_and_encoders(stopped_run, tmp_path):
    folder, result, _ = stopped_run
    run = Run(folder / "run")
    assert result["run"].startswith("Run('run': 30 steps saved, loss ")
    metrics = run.metrics
    assert metrics["step"].tolist() == list(range(30))
    assert metrics[["loss", "lr", "grad_norm"]].notna().all(axis=None)
    assert [path.name for path in run.checkpoints] == ["step-00000020", "step-00000030"]
    assert run.encoder().config["step"] == run.encoder(30).config["step"] == 30
    assert run.encoder(20).config["step"] == 20
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; its steps: 20, 30$"):
        run.encoder(5)
    assert run.recipe.batch.global_ == 8
    assert find_encoder(run) == run.checkpoints[-1] / "encoder"
    assert Encoder.from_pretrained(run).config["step"] == 30
    assert Encoder.from_pretrained(export(run.encoder(), tmp_path / "out")).config["step"] == 30
    loss, rate = run.plot().axes
    assert loss.lines[0].get_ydata().tolist() == metrics["loss"].tolist()
    assert (loss.get_ylabel(), rate.get_ylabel(), rate.get_xlabel()) == ("loss", "learning rate", "step")


def test_metrics_of_a_run_without_steps_are_an_empty_table(tmp_path):
    Recipe().save(tmp_path / "recipe.yaml")
    run = Run(tmp_path)
    assert run.metrics.empty
    assert {"step", "loss", "lr"} <= set(run.metrics)
    assert run.checkpoints == []
    assert repr(run) == f"Run('{tmp_path}': 0 steps saved)"
    assert len(run.plot().axes) == 2
    with pytest.raises(UserError, match="no encoder in"):
        run.encoder()
    assert isinstance(run.metrics, pd.DataFrame)
    with pytest.raises(UserError, match=r"nowhere is not a run: it has no recipe.yaml"):
        Run(tmp_path / "nowhere")


def test_a_run_of_one_rank_is_planned_once(tmp_path, shards, monkeypatch):
    plans, trained = [], []
    monkeypatch.setattr(api, "make_plan", lambda *arguments: plans.append(make_plan(*arguments)) or plans[-1])
    monkeypatch.setattr(train, "make_plan", None)
    monkeypatch.setattr(train, "_train", lambda plan, device: trained.append(plan))
    monkeypatch.setattr(train.engine, "start_ranks", lambda: None)
    monkeypatch.setattr(train.engine, "stop_ranks", lambda: None)
    sections = {"data": {"shards": str(shards)}, "batch": {"global": 4}, "train": {"steps": 1}}
    with pytest.raises(KeyboardInterrupt, match="stopped and saved after step 0"):
        pretrain("demo-cpu", ranks=1, output=tmp_path / "run", **sections)
    assert trained == plans
    assert len(plans) == 1


@pytest.mark.jobs
def test_several_ranks_are_started_and_a_failed_rank_raises_its_reason(tmp_path, shards):
    code = """
run = yaware.pretrain("demo-cpu", ranks=2, output="good", **sections(2))
recipe = yaware.Recipe.load("demo-cpu").with_(**sections(4)).with_(optimizer={"lr": 1e30, "warmup_steps": 0})
try:
    yaware.pretrain(recipe, output="bad", ranks=2)
    reason = "no error"
except RuntimeError as error:
    reason = f"{type(error).__name__}: {error}"
print(json.dumps({"steps": len(run.metrics), "reason": reason}))
"""
    result, printed = python(code, tmp_path, shards)
    assert result["steps"] == 2
    assert "over 2 ranks" in printed
    assert result["reason"].startswith("PretrainingFailed: NotFinite: ")
    assert "\n" not in result["reason"]


def test_the_wrong_input_that_ends_the_ranks_is_the_reason(tmp_path, shards):
    recipe = Recipe.load("demo-cpu").with_(
        data={"shards": str(shards)}, run={"output": str(tmp_path / "run")}, loss={"name": "mine"}
    )
    end = start_recipe(recipe, 1)
    assert end.status == 2
    assert end.reason.startswith("loss.name='mine' is not known")
    with pytest.raises(api.PretrainingFailed, match="^loss.name='mine' is not known"):
        api._raise_if_failed(end, tmp_path / "run")


@pytest.mark.parametrize(
    ("table", "name", "sections"),
    [
        (LOSSES, "mine", {"loss": {"name": "mine"}}),
        (LOSSES, "y-aware", {}),
        (KERNELS, "mine", {"loss": {"proxies": {"age": {"kernel": "mine", "bandwidth": 5.0}}}}),
        (ENCODERS, "mine", {"encoder": {"name": "mine", "options": {}}}),
    ],
)
def test_an_entry_that_the_ranks_cannot_import_is_refused(tmp_path, shards, monkeypatch, table, name, sections):
    of_shipped = {id(LOSSES): "y-aware", id(KERNELS): "gaussian", id(ENCODERS): "resnet18"}[id(table)]
    shipped = table[of_shipped]

    @functools.wraps(shipped)
    def mine(*arguments, **options):
        return shipped(*arguments, **options)

    mine.__module__, mine.__kwdefaults__ = "my_notebook", shipped.__kwdefaults__
    monkeypatch.setitem(table, name, mine)
    with pytest.raises(UserError, match=rf"^ranks=2: \w+\['{name}'\] is of my_notebook .*; use ranks=1"):
        pretrain(
            "demo-cpu", ranks=2, output=tmp_path / "run", data={"shards": str(shards)}, batch={"global": 8}, **sections
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "demo-cpuu"}, "recipe 'demo-cpuu' is not known"),
        ({"recipe": "demo-cpu", "ranks": 5}, "batch.global=32 is not divisible by world_size=5"),
        ({"recipe": "demo-cpu", "trian": {"steps": 1}}, "unknown key 'trian'"),
        ({"recipe": "demo-cpu", "train": {"stepz": 1}}, "unknown key 'train.stepz'"),
        ({"recipe": "demo-cpu", "train": 5}, "train=5 must be a mapping"),
        ({"recipe": "demo-cpu", "data": {"shards": "nowhere"}}, "nowhere/manifest.json is missing"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_started(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        pretrain(**arguments, output=tmp_path / "run")
    assert not Path(tmp_path / "run").exists()
