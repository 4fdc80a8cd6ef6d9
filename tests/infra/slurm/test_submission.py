"""The log of a submitted job, and which variables of sbatch reach it."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest

from infra.slurm.submission import log_path, log_pattern, without_conflicts


def test_the_log_is_where_slurm_puts_it():
    assert log_path(log_pattern(Path("/a%x")), "name", "7") == "/a%x/name-7.log"


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("%u/%5j", f"{getpass.getuser()}/00007"),
        ("%A_%a", None),
        ("%N.log", None),
        ("%x%", None),
        ("%3x", None),
        ("a%%j", "a%j"),
    ],
)
def test_only_symbols_whose_value_is_known_are_replaced(pattern, path):
    assert log_path(pattern, "name", "7") == path


def test_a_variable_of_the_user_stays_unless_an_option_contradicts_it():
    variables = {"SBATCH_TIMELIMIT": "5", "SBATCH_QOS": "low", "SBATCH_GRES": "gpu:1", "HOME": "/h"}
    options = {"time": "24:00:00", "gpus-per-node": "8"}
    kept, said = without_conflicts(variables, options, {})
    assert kept == {"SBATCH_TIMELIMIT": "5", "SBATCH_QOS": "low", "HOME": "/h"}
    assert said == ["SBATCH_GRES=gpu:1 is not used: the job has --gpus-per-node=8"]
    assert "SBATCH_TIMELIMIT" not in without_conflicts(variables, options, {"time": "24:00:00"})[0]
