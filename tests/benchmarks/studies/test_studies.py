"""Benchmarks outside the harness: their tables say what was measured."""

from __future__ import annotations

import pandas as pd
import pytest

from pretrain.config import load_recipe
from tests.benchmarks import small_step
from tests.benchmarks.studies import several_proxies


def test_the_parts_of_a_small_step():
    recipe = load_recipe("demo-cpu", ["--batch.global=2", "--encoder.options={width: 0.125, norm: group}"])
    seconds, operations = small_step.parts(recipe, (16, 16, 16))
    assert all(value > 0 for value in seconds.values())
    wider = load_recipe("demo-cpu", ["--batch.global=4", "--encoder.options={width: 0.125, norm: group}"])
    assert small_step.parts(wider, (16, 16, 16))[1] == pytest.approx(2 * operations, rel=0.01)


def test_the_table_of_several_proxies_pairs_the_seeds():
    rows = [
        (name, task, metric, value + shift * (name == "several"), seed)
        for task, metric in several_proxies.TASKS.items()
        for seed, value, shift in ((1, 0.5, 0.1), (2, 0.7, -0.02))
        for name in ("y-aware", "several")
    ]
    table = several_proxies.report(pd.DataFrame(rows, columns=["checkpoint", "task", "metric", "value", "seed"]))
    assert list(table["task"]) == ["ad, auc", "scz, auc", "age, mae", "sex, auc"]
    assert set(table["age"]) == {"0.600"}
    assert set(table["age, sex and TIV"]) == {"0.640"}
    assert set(table["difference"]) == {"+0.040"}
    assert set(table["range over the seeds"]) == {"-0.020 to +0.100"}
