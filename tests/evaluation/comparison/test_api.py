"""The comparison from Python: ``from evaluation import compare``."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

import evaluation
from evaluation.comparison.repeats import COLUMNS
from evaluation.comparison.tables import METRIC_COLUMNS
from infra import cli

NAMES_ARE_RIGHT = """
import evaluation
assert callable(evaluation.compare) and evaluation.compare.__name__ == "compare", evaluation.compare
assert callable(evaluation.evaluate) and evaluation.evaluate.__name__ == "evaluate", evaluation.evaluate
assert isinstance(evaluation.Comparison, type), evaluation.Comparison
assert "paper" in evaluation.PROTOCOLS
"""
USE = """
from evaluation import compare, Comparison, evaluate
try:
    compare("none", tracking_uri="sqlite:////nonexistent/mlflow.db")
except ValueError as error:
    assert "does not exist" in str(error), error
else:
    raise AssertionError("a store that does not exist was read")
import evaluation.comparison.comparison, evaluation.protocols.evaluate, evaluation.compare_cli
"""


def test_public_names_are_functions_and_classes_before_and_after_their_use():
    """Other orders of imports are tested in tests/api/test_names.py."""
    for program in (USE + NAMES_ARE_RIGHT, NAMES_ARE_RIGHT + USE + NAMES_ARE_RIGHT):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors_and_dir_lists_the_public_ones():
    with pytest.raises(AttributeError, match="has no attribute 'comparee'"):
        _ = evaluation.comparee
    assert {"compare", "Comparison", "evaluate", "PROTOCOLS"} <= set(dir(evaluation))


def test_every_table_of_a_comparison_is_a_data_frame_with_its_documented_columns(comparison):
    documented = {
        "metrics": METRIC_COLUMNS,
        "differences": ["task", "metric", "first", "second", "difference", "low", "high", "p", "p_holm", "test",
                        "fixed_difference", "fixed_low", "fixed_high", "fixed_p", "fixed_test", "boot_low", "boot_high"],
        "curves": ["checkpoint", "task", "n_train", "draws", "auc", "low", "high"],
        "curve_differences": ["task", "n_train", "first", "second", "draws", "difference", "low", "high", "p", "p_holm"],
        "subgroups": ["checkpoint", "task", "metric", "by", "group", "participants", "scans", "value", "low", "high", "note"],
        "calibration": ["checkpoint", "task", "predicted", "observed", "low", "high", "scans"],
        "site_leakage": ["checkpoint", "sites", "bacc", "chance", "leakage", "external_mae", "openbhb"],
        "brain_age": ["checkpoint", "task", "mae", "slope", "r_raw", "gap_sd", "r_corrected"],
        "reliability": COLUMNS,
        "fairness": ["checkpoint", "task", "by", "measure", "lowest", "highest", "groups", "gap", "low", "high"],
    }  # fmt: skip
    assert {name: list(table.columns) for name, table in comparison.tables.items()} == documented
    for name, table in comparison.tables.items():
        assert isinstance(table, pd.DataFrame)
        assert len(table), name
        assert getattr(comparison, name) is table


def test_a_comparison_shows_its_primary_metrics(comparison):
    summary = comparison.summary()
    assert list(summary.columns) == ["scz AUC", "age MAE", "site balanced accuracy"]
    left_out = "y-aware, step 200, linear, sites left out"
    assert summary.loc[left_out, "age MAE"] == "5.50 [5.0, 6.0]"
    row = comparison.metrics.set_index(["checkpoint", "task", "metric"]).loc[("SimCLR, linear", "scz", "auc")]
    cautious = f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"
    assert summary.loc["SimCLR, linear", "scz AUC"] == cautious
    assert summary.loc["random, linear", "age MAE"] == "-"
    shown, page = repr(comparison), comparison._repr_html_()
    for text in ("experiment kept, simulated data", "SimCLR, linear", cautious, "5.50 [5.0, 6.0]"):
        assert text in shown
        assert text in page
    assert "<table" in page


def test_the_command_writes_what_python_writes(comparison, store, tmp_path, capsys):
    paths = comparison.report(str(tmp_path / "python" / "report.html"))
    command = [
        "compare",
        "--experiment",
        "kept",
        "--tracking-uri",
        store,
        "--out",
        str(tmp_path / "cli" / "report.html"),
    ]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    for path in paths:
        assert path.read_bytes() == (tmp_path / "cli" / path.name).read_bytes(), path.name
        assert path.name in printed
    assert len(paths) == len(list((tmp_path / "cli").iterdir()))
