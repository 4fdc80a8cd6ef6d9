"""The command of the second experiment: no time, and a tiny run of some pieces that a later run takes over (slow)."""

from __future__ import annotations

import os
import sys

import pandas as pd
import pytest

from evaluation.experiments.second import __main__ as command
from evaluation.experiments.second.plan import SecondPlan, chosen_pieces
from tests.runs import run

PIECES = "middle/voxels,middle/y-aware-0,middle/random-0,middle/networks-ad"
TINY = ["--healthy", "300", "--clinic", "400", "--steps", "2", "--seeds", "1", "--sizes", "20", "40", "--draws", "3",
        "--network-draws", "2", "1", "--network-epochs", "1", "--resamples", "100"]  # fmt: skip


def test_without_time_nothing_is_started_and_the_report_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert command.main(["--out", str(tmp_path / "e"), "--minutes", "0", *TINY]) == 0
    assert "0 of 19 pieces are done" in capsys.readouterr().out
    text = (tmp_path / "e" / "results.md").read_text()
    assert "0 of 19 pieces are done" in text
    assert "voxels + brain-age score" in text  # a primary comparison, not measured
    assert not list((tmp_path / "e").glob("*.png"))
    assert not (tmp_path / "e" / "cohorts").exists()


def test_the_plan_of_the_documentation_keeps_its_answers_where_they_are_committed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "write_report", lambda out, results, plan: asked.append((results, plan)))
    assert command.main(["--out", str(tmp_path / "e"), "--report"]) == 0
    assert command.main(["--out", str(tmp_path / "f"), "--report", "--steps", "3"]) == 0
    assert asked[0] == (command.COMMITTED, SecondPlan())
    assert asked[1] == (tmp_path / "f" / "answers", SecondPlan(steps=3))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2700)
def test_pieces_of_a_tiny_experiment_are_not_repeated_by_another_clone(tmp_path):
    jobs = str(min(2, len(os.sched_getaffinity(0))))
    results, first, second = tmp_path / "answers", tmp_path / "e", tmp_path / "clone"
    base = [sys.executable, "-m", "evaluation.experiments.second", "--results", str(results), "--jobs", jobs, *TINY]
    assert run([*base, "--out", str(first), "--pieces", PIECES], tmp_path, timeout=2400).returncode == 0
    plan = SecondPlan(healthy=300, clinic=400, steps=2, seeds=1, sizes=(20, 40), draws=3, network_draws=(2, 1),
                      network_epochs=1, resamples=100)  # fmt: skip
    files = {piece.file(results): piece.file(results).stat().st_mtime_ns for piece in chosen_pieces(plan, PIECES)}
    assert len(files) == 4
    auc = pd.read_csv(first / "auc.csv")
    # y-aware with four kinds of features, random with three, three models of voxels; two networks for one disease.
    assert len(auc) == (4 + 3 + 3) * 2 * 2 + 2 * 2
    assert len(pd.read_csv(first / "primary.csv")) == 4 * 2 * 2
    assert pd.read_csv(first / "primary.csv")["p_holm"].notna().sum() == 2 * 2 * 2
    assert set(pd.read_csv(first / "age.csv")["method"]) == {
        "y-aware, readout",
        "random encoder, readout",
        "brain-age score",
    }
    for plot in ("middle", "levels", "differences"):
        assert (first / f"experiment2_{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert run([*base, "--out", str(second), "--pieces", PIECES], tmp_path, timeout=600).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert not (second / "runs").exists()
    assert (second / "auc.csv").read_text() == (first / "auc.csv").read_text()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_a_tiny_tuning_compares_its_grid_and_a_second_call_trains_nothing(tmp_path):
    base = [
        sys.executable,
        "-m",
        "evaluation.experiments.second.tune",
        "--out",
        str(tmp_path / "t"),
        "--healthy",
        "150",
    ]
    one = [*base, "--rates", "1e-3", "--steps", "2"]
    assert run(one, tmp_path, timeout=900).returncode == 0
    table = pd.read_csv(tmp_path / "t" / "tuning.csv")
    assert list(table.columns) == ["method", "learning rate", "steps", "pooled: age error", "pooled: effective rank",
                                   "spatial: age error", "spatial: effective rank"]  # fmt: skip
    assert table.notna().all(axis=None)
    assert (table["pooled: effective rank"] > 1).all()
    measured = tmp_path / "t" / "measured" / "y-aware-lr0.001-steps2.json"
    before = measured.stat().st_mtime_ns
    done = run(one, tmp_path, timeout=600)
    assert done.returncode == 0
    assert "tuning:" not in done.stdout
    assert measured.stat().st_mtime_ns == before
    assert run([*base, "--seed", "61"], tmp_path).returncode == 2
