"""The limits refuse figures outside them, with the rule and the figure."""

from __future__ import annotations

import json
import math

import pytest

from data_pipeline.prepare.judge import judge
from data_pipeline.prepare.settings import Limits, load_prepare_recipe, recorded
from infra.errors import UserError

GOOD = {"brain_ml": 1500.0, "contrast": 0.15, "rotation": 5.0, "stretch_low": 0.9, "stretch_high": 1.1,
        "correlation": 0.96, "overlap": 0.95}  # fmt: skip


def test_good_figures_pass():
    assert judge(GOOD, Limits()) is None


@pytest.mark.parametrize(
    ("changes", "rule", "limit"),
    [
        ({"brain_ml": 90.0}, "brain_ml", 800.0), ({"brain_ml": 2300.0}, "brain_ml", 2200.0),
        ({"contrast": -0.2}, "contrast", 0.05), ({"rotation": 92.0}, "rotation", 50.0),
        ({"stretch_low": 0.5}, "stretch", 0.7), ({"stretch_high": 2.0}, "stretch", 1.5),
        ({"correlation": 0.5}, "correlation", 0.85), ({"overlap": math.nan}, "overlap", 0.8),
        ({"brain_ml": 90.0, "overlap": 0.1}, "brain_ml", 800.0),
    ],
)  # fmt: skip
def test_the_first_violated_rule_is_named(changes, rule, limit):
    error = judge({**GOOD, **changes}, Limits())
    assert error is not None
    assert (error.rule, error.threshold) == (rule, limit)
    assert "\n" not in str(error)


def test_a_missing_figure_violates_nothing():
    assert judge({}, Limits()) is None


def test_a_recipe_is_read_back_as_it_is_recorded(tmp_path):
    recipe = load_prepare_recipe(
        None, ["--prepare.pipeline=vbm", "--prepare.linear.iterations=[7,5,3]", "--prepare.spacing=3"]
    )
    section = {key: value for key, value in recorded(recipe).items() if key != "version"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"prepare": section}))
    assert load_prepare_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.grid.shape == (60, 72, 60)
    assert recipe.modality == "vbm"


@pytest.mark.parametrize(
    "change", ["--prepare.linear.iteration=[1]", "--prepare.pipeline=fast", "--prepare.bias.spacing=0"]
)
def test_a_wrong_parameter_is_refused(change):
    with pytest.raises(UserError, match="prepare"):
        load_prepare_recipe(None, [change])
