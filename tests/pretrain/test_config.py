"""Recipes built in Python: load, change, save; the checks are those of a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import UserError
from pretrain.config import Recipe, load_recipe


def test_a_changed_recipe_equals_one_with_the_same_overrides():
    changed = Recipe.load("demo-cpu").with_(
        batch={"global": 16}, deepspeed={"zero_optimization.stage": 2}, run={"output": Path("a/b")},
        loss={"proxies": {"sex": {"kernel": "same"}}},
    )  # fmt: skip
    overrides = ["--batch.global=16", "--deepspeed.zero_optimization.stage=2", "--run.output=a/b",
                 "--loss.proxies={sex: {kernel: same}}"]  # fmt: skip
    assert changed == load_recipe("demo-cpu", overrides) == Recipe.load("demo-cpu", *overrides)


def test_the_recipe_that_is_changed_stays_as_it_was():
    recipe = Recipe.load("demo-cpu")
    recipe.with_(batch={"global": 16}, encoder={"options.width": 0.25})
    assert recipe == Recipe.load("demo-cpu")


def test_a_saved_recipe_reads_back_equal(tmp_path):
    recipe = Recipe.load("paper-bhb10k").with_(loss={"temperature_bounds": [0.01, 1.0]}, batch={"micro": None})
    assert recipe.save(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert Recipe.load(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"batch": {"globl": 16}},
            r"Recipe.with_: unknown key 'batch.globl' \(did you mean 'global'\?\); allowed here",
        ),
        ({"bach": {"global": 16}}, r"unknown key 'bach' \(did you mean 'batch'\?\)"),
        ({"bach": {}}, r"unknown key 'bach' \(did you mean 'batch'\?\)"),
        ({"batch": {"global": 1}}, "batch.global: Input should be greater than or equal to 2, found 1"),
        ({"batch": 16}, "batch=16 must be a mapping of the section's keys"),
        ({"train": {"precision": "fp8"}}, "train.precision: Input should be 'fp32'"),
        ({"run": {"seed": object()}}, "run.seed: .*not a supported primitive type"),
    ],
)
def test_what_a_yaml_file_may_not_hold_is_refused(sections, text):
    with pytest.raises(UserError, match=text):
        Recipe.load("demo-cpu").with_(**sections)
