"""The main job with the real commands, from NIfTI files to a comparison, and DeepSpeed's launcher typed by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.demo.summary import summary
from infra.distributed import free_port
from infra.tracking import runs
from pretrain import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.seen_scans import read, source_of
from tests.runs import ROOT, environment, losses, pretrain_command, run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run by the hand-typed launcher in a folder of its own, and a random baseline by ``yaware pretrain``."""
    folder = tmp_path_factory.mktemp("job")
    for command in (
        ["cohort", "simulate", str(folder / "demo/cohort"), "--participants", "150", "--spacing", "12", "--workers", "1"],
        ["shards", "build", str(folder / "demo/cohort"), str(folder / "demo/shards"), "--scaling", "tiv", "--workers", "2",
         "--splits", "pretrain=.4,monitor=.2,downstream=.4"],
    ):  # fmt: skip
        assert cli.run(command) == 0
    # As a user types it, with a smaller encoder. The paths of the recipe are relative.
    port = f"--master_port={free_port()}"  # the default one may be another job's
    typed = ["deepspeed", "--num_accelerators", "2", port, "--module", "pretrain.train", "--config", "demo-cpu"]
    small = ["--train.steps=6", "--checkpoint.every_steps=3", "--encoder.options={width: 0.25}", "--run.experiment=job"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*typed, *small],
        cwd=folder,
        env={**environment(folder), "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    shards = folder / "demo/shards"
    command = pretrain_command(shards, folder / "demo/runs/random", 0, "--run.name=random", "--run.experiment=job")
    assert run(command, folder).returncode == 0
    return folder


def store(folder: Path) -> str:
    return environment(folder)["MLFLOW_TRACKING_URI"]


def test_the_hand_typed_launcher_writes_metrics_and_checkpoints(job):
    output = job / "demo/runs/y-aware"
    assert [step for step, _ in losses(output)] == list(range(6))
    assert sorted(p.name for p in (output / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]
    state = json.loads((output / "checkpoints/step-00000006/state.json").read_text())
    assert (state["step"], state["world_size"], state["loader"]["step"]) == (6, 2, 6)
    assert state["manifest_digest"] == Manifest.load(job / "demo/shards").digest
    encoder = Encoder.from_pretrained(output)
    grid = encoder.preprocessing["grid"]["shape"]
    with torch.no_grad():
        assert encoder(torch.zeros(2, 1, *grid)).shape == (2, encoder.feature_size)
    assert encoder.config["simulated"] is True


def test_a_checkpoint_records_the_scans_it_was_trained_on(job):
    manifest = Manifest.load(job / "demo/shards")
    (trained,) = read(find_encoder(job / "demo/runs/y-aware"))
    assert trained == source_of(manifest, manifest.rows(split="pretrain"))
    assert len(trained.voxels) == len(manifest.rows(split="pretrain"))
    assert read(find_encoder(job / "demo/runs/random")) is None


@pytest.mark.slow
def test_the_same_command_trains_regression_of_age(job):
    shards, output = job / "demo/shards", job / "demo/runs/age"
    more = ["--run.name=age", "--run.experiment=job", "--loss.name=regression", "--monitor.every_epochs=1"]
    done = run(pretrain_command(shards, output, 12, *more), job)
    assert done.returncode == 0
    found = [loss for _, loss in losses(output)]
    assert np.mean(found[-4:]) < found[0]
    encoder = Encoder.from_pretrained(output)
    assert encoder.config["method"] == "age regression"
    assert [source.role for source in read(find_encoder(output))] == ["trained", "watched"]


def test_mlflow_has_one_run_per_pretraining_with_its_checkpoints(job):
    rows = {row["name"]: row for row in runs.runs(store(job), "job", "pretraining")}
    assert set(rows) == {"y-aware", "random"}
    trained = rows["y-aware"]
    assert (trained["status"], trained["tags"]["yaware.method"]) == ("FINISHED", "y-aware")
    assert rows["random"]["tags"]["yaware.method"] == "random"
    assert trained["params"]["loss.proxies.age.bandwidth"] == "5.0"
    history = runs.metric_history(store(job), trained["run_id"], "loss")
    assert history == [(step, pytest.approx(loss)) for step, loss in losses(job / "demo/runs/y-aware")]
    stalls = runs.metric_history(store(job), trained["run_id"], "data_stall")
    assert [step for step, _ in stalls] == list(range(6))
    assert all(0 < share <= 1 for _, share in stalls)
    models = runs.checkpoints(store(job), trained["run_id"])
    assert [model["step"] for model in models] == [3, 6]
    assert Encoder.from_pretrained(models[1]["path"]).config["model_id"] == models[1]["model_id"]


def test_the_commands_evaluate_and_compare(job, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(job))
    given = [str(job / "demo/runs/y-aware"), str(job / "demo/runs/random"), "--shards", str(job / "demo/shards")]
    protocol = [
        "--tasks",
        "scz,age",
        "--experiment",
        "job",
        "--n-train",
        "10",
        "--draws",
        "2",
        "--workers",
        "2",
        "--halvings",
        "5",
    ]
    assert cli.run(["evaluate", *given, *protocol]) == 0
    shutil.move(job / "demo/runs", job / "moved")
    try:
        assert cli.run(["compare", "--experiment", "job", "--out", str(job / "demo/report.html")]) == 0
    finally:
        shutil.move(job / "moved", job / "demo/runs")
    printed = capsys.readouterr().out
    assert "simulated data" in printed
    page = (job / "demo/report.html").read_text()
    assert "Simulated data." in page
    assert page.count("data:image/png;base64,") == 1  # the map of the features
    assert page.count("data:image/svg+xml;base64,") >= 3
    shown = summary(job / "demo")
    assert "y-aware: 6 steps, loss " in shown
    assert re.search(r" scz auc +age mae$| age mae +scz auc$", shown, re.MULTILINE), shown
    assert re.search(r"^ +random( +\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]){2}$", shown, re.MULTILINE), shown


def test_a_finished_run_is_not_trained_again(job):
    shards, output = job / "demo/shards", job / "demo/runs/random"
    done = run(pretrain_command(shards, output, 0, "--run.name=random", "--run.experiment=job"), job)
    assert done.returncode == 0
    assert "already complete" in done.stdout


def test_another_recipe_in_the_same_folder_is_refused(job):
    shards, output = job / "demo/shards", job / "demo/runs/random"
    done = run(
        pretrain_command(shards, output, 0, "--run.name=random", "--run.experiment=job", "--optimizer.lr=0.5"), job
    )
    assert done.returncode == 2
    assert "holds a run of another recipe (optimizer.lr was 0.001, now 0.5)" in done.stderr


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--optimizer.lrr=1", "unknown key 'optimizer.lrr' (did you mean 'lr'?)"),
        ("--batch.global=9", "batch.global=9 is not divisible by world_size=2; use 1 or 3 ranks"),
        ("--batch.global=4096", "fewer than batch.global=4096"),
        ("--data.shards=nowhere", "nowhere/manifest.json is missing"),
        ("--loss.proxies={aeg: {kernel: gaussian, bandwidth: 5}}", "proxy 'aeg' is not a column of"),
        ("--encoder.name=densenet", "encoder.name='densenet' is not known (did you mean 'densenet121'?)"),
        ("--deepspeed.train_batch_size=4", "deepspeed.train_batch_size is decided by the recipe's own keys"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_starts_nothing(job, tmp_path, capsys, override, text):
    shards = job / "demo/shards"
    command = ["pretrain", "--config", "demo-cpu", f"--data.shards={shards}", f"--run.output={tmp_path}/run", override]
    assert cli.run(command) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_print_config_prints_a_recipe_that_can_be_loaded(capsys, tmp_path):
    assert cli.run(["pretrain", "--config", "demo-cpu", "--optimizer.lr=0.25", "--print_config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert cli.run(["pretrain", "--config", str(tmp_path / "mine.yaml"), "--print_config"]) == 0
    assert "lr: 0.25" in capsys.readouterr().out


def test_a_rank_started_by_hand_prints_one_line_for_a_wrong_recipe(tmp_path):
    command = [sys.executable, "-m", "pretrain.train", "--config", "demo-cpu", f"--data.shards={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("yaware: error: ")
    assert "Traceback" not in done.stderr


def test_export_and_embed_a_nifti_file(job, tmp_path, capsys):
    assert cli.run(["export", str(job / "demo/runs/y-aware"), str(tmp_path / "encoder")]) == 0
    scan = next((job / "demo/cohort").rglob("*_probseg.nii.gz"))
    out = tmp_path / "features.tsv"
    assert cli.run(["embed", str(tmp_path / "encoder"), str(scan), "--tiv", "1450", "--out", str(out)]) == 0
    head, row = out.read_text().splitlines()
    assert len(head.split("\t")) == len(row.split("\t")) == 129
    features = Encoder.from_pretrained(tmp_path / "encoder").embed([scan], tiv=[1450.0], progress=False)
    np.testing.assert_allclose(
        features.to_numpy()[0], [float(value) for value in row.split("\t")[1:]], rtol=1e-4, atol=1e-5
    )
    assert cli.run(["embed", str(tmp_path / "encoder"), str(scan)]) == 2
    assert "1 values in ml are needed, found none; give tiv=[...] (--tiv)" in capsys.readouterr().err
