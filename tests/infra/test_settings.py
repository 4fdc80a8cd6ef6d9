"""Recipes: unknown keys and wrong values raise errors that name the fix; overrides and round trips."""

from __future__ import annotations

import pytest

from infra.errors import UserError
from infra.settings import flatten, load_settings, to_dict, to_yaml
from pretrain.config import Recipe, check_world_size, find_recipe, load_recipe

SHIPPED = sorted(path.stem for path in find_recipe("demo-cpu").parent.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name, [])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(recipe))
    assert load_settings(Recipe, path) == recipe


def test_an_override_changes_only_its_key():
    default, overridden = (flatten(to_dict(load_recipe("demo-cpu", o))) for o in ([], ["--optimizer.lr=3e-5"]))
    assert {key for key in default if default[key] != overridden[key]} == {"optimizer.lr"}
    assert overridden["optimizer.lr"] == 3e-5


def test_an_override_replaces_a_whole_mapping():
    recipe = load_recipe("demo-cpu", ["--loss.proxies={sex: {kernel: same}}"])
    assert list(recipe.loss.proxies) == ["sex"]


def test_the_deepspeed_section_accepts_any_key():
    recipe = load_recipe("demo-cpu", ["--deepspeed.zero_optimization.stage=3", "--deepspeed.gradient_clipping=1.0"])
    assert recipe.deepspeed == {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--optimzer.lr=1", r"unknown key 'optimzer' \(did you mean 'optimizer'\?\)"),
        ("--optimizer.lrr=1", r"unknown key 'optimizer.lrr' \(did you mean 'lr'\?\); allowed here: name, lr,"),
        ("--batch.globl=8", r"unknown key 'batch.globl' \(did you mean 'global'\?\)"),
        ("--loss.proxies.age.bandwith=3", r"'loss.proxies.age.bandwith' \(did you mean 'bandwidth'\?\)"),
        ("--batch.global=many", r"batch.global: .*valid integer.*found 'many'; set it in the recipe or with"),
        ("--optimizer.lr=-1", r"optimizer.lr: .*greater than 0, found -1"),
        (
            "--train.precision=fp8",
            r"train.precision: .*'fp32', 'bf16', 'fp16', 'autocast' or 'autocast-fp16', found 'fp8'",
        ),
        ("--loss.proxies={age:", r"override '--loss.proxies=\{age:' is not valid YAML"),
        ("optimizer.lr=1", r"not of the form --section.key=value"),
    ],
)
def test_wrong_keys_and_values_are_named(override, text):
    with pytest.raises(UserError, match=text) as caught:
        load_recipe("demo-cpu", [override])
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'demo-cpuu' is not known \(did you mean 'demo-cpu'\?\)"):
        load_recipe("demo-cpuu", [])
    with pytest.raises(UserError, match="not found"):
        load_recipe(str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1,")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(broken), [])
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping of sections"):
        load_recipe(str(broken), [])


def test_a_typo_in_the_file_is_named_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("encoder:\n  nam: resnet18\n")
    with pytest.raises(UserError, match=r"mine.yaml: unknown key 'encoder.nam' \(did you mean 'name'\?\)"):
        load_recipe(str(path), [])


def test_a_world_size_that_does_not_divide_the_batch_is_refused_with_those_that_do():
    assert check_world_size(32, 4) == 8
    with pytest.raises(UserError, match=r"batch.global=32 is not divisible by world_size=3; use 2 or 4 ranks"):
        check_world_size(32, 3)
    with pytest.raises(UserError, match="use 32 or 32 ranks, or --batch.global=50"):
        check_world_size(32, 50)
