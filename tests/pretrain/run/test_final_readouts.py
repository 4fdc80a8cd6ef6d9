"""Readouts at the end of a pretraining: when they are fitted, what they are, and that a killed fit is continued."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from infra.errors import UserError
from pretrain import Encoder
from pretrain.config import load_recipe
from pretrain.readouts.add import add_readouts
from pretrain.run.final_readouts import readouts_due, wanted
from pretrain.run.plan import make_plan
from tests.runs import ROOT, environment

SCRIPT = """
import json
import yaware
from infra import watchdog
from pretrain.weights import scan_source

def train(output, fit):
    sections = {{
        "data": {{"shards": {shards!r}, "workers": 0}}, "train": {{"steps": 2}}, "batch": {{"global": 8}},
        "encoder": {{"options": {{"width": 0.25, "norm": "group"}}}}, "monitor": {{"every_epochs": 0}},
        "readouts": {{"fit": fit, "columns": ["sex", "site"]}},
    }}
    return yaware.pretrain("demo-cpu", ranks=1, output=output, **sections)

train("without", False)
beats, beat = [], watchdog.beat

def killed():
    beats.append(1)
    beat()
    if len(beats) == 3:
        raise SystemError("killed")

watchdog.beat = killed
try:
    train("run", True)
    killed_by = "nothing"
except SystemError as error:
    killed_by = str(error)
watchdog.beat = beat
steps = len(yaware.Run("run").metrics)
reads, zscore = [], scan_source.zscore
scan_source.zscore = lambda voxels: reads.append(1) or zscore(voxels)
train("run", True)
first = len(reads)
train("run", True)
print(json.dumps({{
    "killed_by": killed_by, "steps": [steps, len(yaware.Run("run").metrics)], "reads": [first, len(reads)],
}}))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, healthy):
    """A run without readouts, and one that was killed while it fitted them and called twice again."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(shards=healthy.url)], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**environment(folder), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.jobs
def test_a_killed_fit_is_continued_without_another_step(runs):
    folder, result, printed = runs
    assert result["killed_by"] == "killed"
    assert result["steps"] == [2, 2]
    assert result["reads"] == [100 - 3 * 8, 100 - 3 * 8]  # the third call only says that the run is complete
    assert "pretrain: readout of age: mean absolute error" in printed
    assert "pretrain: no readout of site: text with 3 values" in printed
    assert printed.count("y-aware is already complete") == 1
    assert not (folder / "run" / ".readouts-unfinished").exists()


@pytest.mark.jobs
def test_readouts_do_not_change_the_run_and_are_those_of_the_command(runs, healthy, tmp_path):
    folder, _, _ = runs
    step = "checkpoints/step-00000002"
    weights = [(folder / name / step / "encoder" / "model.safetensors").read_bytes() for name in ("run", "without")]
    assert weights[0] == weights[1]
    assert Encoder.from_pretrained(folder / "without").readouts is None
    fitted = Encoder.from_pretrained(folder / "run").readouts
    assert list(fitted.readouts) == ["age", "sex"]
    shutil.copytree(folder / "without", tmp_path / "copy")
    by_command = add_readouts(tmp_path / "copy", healthy, columns=["age", "sex"], progress=False)
    for name, readout in fitted.readouts.items():
        np.testing.assert_allclose(readout.coefficients, by_command.readouts[name].coefficients, rtol=1e-4, atol=1e-7)
    # Without columns the command takes the proxies of the run's recipe.
    assert list(add_readouts(folder / "without", healthy, progress=False).readouts) == ["age"]


@pytest.mark.jobs
def test_two_ranks_calibrate_on_the_monitor_split_as_the_command_does(two_splits, tmp_path):
    script = f"""
import yaware
sections = {{
    "data": {{"shards": {str(two_splits)!r}, "workers": 0}}, "train": {{"steps": 2}}, "batch": {{"global": 8}},
    "encoder": {{"options": {{"width": 0.25, "norm": "group"}}}}, "monitor": {{"every_epochs": 0}}, "readouts": {{"fit": True}},
}}
yaware.pretrain("demo-cpu", ranks=2, output="run", **sections)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 54 people of the split monitor whom the encoder has not seen (fitted to 24 people" in done.stdout
    fitted = Encoder.from_pretrained(tmp_path / "run").readouts
    by_command = add_readouts(tmp_path / "run", two_splits, replace=True, progress=False)
    one, other = fitted.readouts["age"], by_command.readouts["age"]
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(one.residuals, other.residuals, rtol=1e-4, atol=1e-4)
    assert one.summary["calibrated_on"] == other.summary["calibrated_on"]
    assert fitted.fitted_on == by_command.fitted_on


@pytest.mark.parametrize(
    ("calibration", "steps", "expected"),
    [("auto", 32, False), ("auto", 33, True), ("none", 9, False), ("none", 10, True)],
)
def test_scans_to_calibrate_on_count_too(two_splits, tmp_path, calibration, steps, expected):
    """24 scans to fit to, and 55 of the monitor's split."""
    overrides = [
        f"--readouts.calibration={calibration}", f"--train.steps={steps}", "--batch.global=8", f"--data.shards={two_splits}",
    ]  # fmt: skip
    plan = make_plan(load_recipe("demo-cpu", [*overrides, f"--run.output={tmp_path}", "--monitor.every_epochs=0"]), 1)
    assert wanted(plan) == expected


@pytest.mark.parametrize(
    ("fit", "steps", "expected"),
    [("auto", 41, False), ("auto", 42, True), ("true", 1, True), ("false", 1000, False), ("auto", 0, False)],
)
def test_auto_fits_if_it_costs_at_most_five_percent(healthy, tmp_path, fit, steps, expected):
    """100 scans are embedded once; a step passes 8 scans in two views forward and backward, which is 48 passes."""
    overrides = [f"--readouts.fit={fit}", f"--train.steps={steps}", "--batch.global=8", f"--data.shards={healthy.url}"]
    plan = make_plan(load_recipe("demo-cpu", [*overrides, f"--run.output={tmp_path}", "--monitor.every_epochs=0"]), 1)
    assert wanted(plan) == expected
    assert not readouts_due(plan)  # there is no last checkpoint


def test_a_run_is_due_until_its_last_checkpoint_has_readouts(tmp_path):
    recipe = SimpleNamespace(readouts=SimpleNamespace(fit=True), run=SimpleNamespace(output=tmp_path))
    plan = SimpleNamespace(recipe=recipe, total_steps=7)
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert readouts_due(plan)
    (tmp_path / "checkpoints" / "step-00000007" / "readouts").mkdir()
    assert not readouts_due(plan)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--readouts.columns=[agee]", "readouts.columns: 'agee' is not a column of .* .did you mean 'age'"),
        ("--readouts.layer=layer9", "layer='layer9' is not a block of this encoder"),
        ("--readouts.pooling=[median]", "pooling='median' is not known"),
        ("--readouts.pooling=[grid8]", "pooling grid8 needs a map of 8 or more"),
        ("--readouts.fit=sometimes", "readouts.fit"),
        (
            "--readouts.calibration=monitor",
            "readouts.calibration=monitor is not a split of .*; allowed: auto, none, pretrain",
        ),
        (
            "--readouts.calibration=pretrain",
            "readouts.calibration=pretrain: 0 people of this split are neither fitted to nor",
        ),
    ],
)
def test_wrong_settings_are_refused_by_the_plan(healthy, tmp_path, override, message):
    settings = [
        f"--data.shards={healthy.url}",
        f"--run.output={tmp_path}",
        "--monitor.every_epochs=0",
        "--batch.global=8",
    ]
    with pytest.raises(UserError, match=message):
        make_plan(load_recipe("demo-cpu", [*settings, override]), 1)
