"""The experiment on travelling heads: its arms, tasks, verdicts, and a tiny run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from evaluation.experiments import travelling
from evaluation.experiments.travelling import ARMS, TravellingPlan, differences_of, results_of, task_files
from evaluation.tasks.tasks import FILES
from pretrain.config import load_recipe
from pretrain.run.objective import loss_options


def results(**changes):
    """Two seeds of the control and of the arm positives, which differs by ``changes``."""
    rows = []
    for arm in ("y-aware", "positives"):
        for seed in (0, 1):
            row = {"arm": arm, "seed": seed, **dict.fromkeys(travelling.MEASURES, 0.5 + 0.1 * seed)}
            if arm == "positives":
                row |= {name: row[name] + change for name, change in changes.items()}
            rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("changes", "reliability", "accuracy"),
    [
        ({"scanners.icc21": 0.03}, "risen", "not paid"),
        ({"scanners.icc21": 0.01}, "not risen", "not paid"),
        ({"scanners.icc21": 0.03, "age.mae": 0.3}, "risen", "paid: age.mae"),
        ({"age.mae": -0.3, "ad.auc": -0.03, "scz.auc": 0.1}, "not risen", "paid: ad.auc"),
    ],
)
def test_the_verdict_follows_the_rule_that_was_written_down(changes, reliability, accuracy):
    table = differences_of(results(**changes))
    assert table["seed"].tolist() == [0, 1, "mean"]
    assert set(table["reliability"]) == {reliability}
    assert set(table["accuracy"]) == {accuracy}
    assert table["age.mae"].to_numpy() == pytest.approx(changes.get("age.mae", 0.0))


def test_reliability_in_one_seed_only_has_not_risen():
    table = results(**{"scanners.icc21": 0.05})
    table.loc[3, "scanners.icc21"] = 0.6
    assert set(differences_of(table)["reliability"]) == {"not risen"}


def test_every_arm_is_a_recipe_that_the_loss_takes():
    for overrides in ARMS.values():
        loss_options(load_recipe("simulated-6mm", list(overrides)).loss)


def test_the_tasks_are_the_shipped_ones_without_the_heads(tmp_path):
    for file in task_files(tmp_path):
        text = Path(file).read_text()
        assert text.startswith((FILES / Path(file).name).read_text().rstrip("\n"))
        assert text.endswith(f"query: '{travelling.OTHERS}'\n")


def test_results_are_those_of_each_run():
    folders = {("y-aware", 0): Path("y-aware-0"), ("both", 0): Path("both-0")}
    summary = pd.DataFrame({"checkpoint": ["both-0", "y-aware-0"], "scanners.icc21": [0.8, 0.6]})
    accuracy = pd.DataFrame(
        [("both-0", "age", "mae", 5.0), ("y-aware-0", "age", "mae", 4.0)],
        columns=["checkpoint", "task", "metric", "value"],
    )
    table = results_of(folders, summary, accuracy).set_index("arm")
    assert table["scanners.icc21"].to_dict() == {"y-aware": 0.6, "both": 0.8}
    assert table["age.mae"].to_dict() == {"y-aware": 4.0, "both": 5.0}
    assert table["ad.auc"].isna().all()


@pytest.mark.slow
def test_a_tiny_experiment_runs_to_its_tables(tmp_path):
    plan = TravellingPlan(participants=500, heads=40, scanners=2, repeats=2, spacing=12.0, steps=3, seeds=(0,))
    found = travelling.run(tmp_path / "out", plan, jobs=2)
    assert found["arm"].tolist() == list(ARMS)
    assert found.notna().all().all()
    assert (tmp_path / "out" / "differences.csv").is_file()
