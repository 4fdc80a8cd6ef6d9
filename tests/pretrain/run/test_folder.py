"""Which changes of a recipe a begun run refuses."""

from __future__ import annotations

import pytest
import yaml

from infra.errors import UserError
from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.run.folder import check_same_network, check_same_recipe


@pytest.fixture
def begun(tmp_path):
    """A run folder of the demo recipe; writes its recipe.yaml after ``change``."""

    def write(change=lambda content: None):
        content = to_dict(load_recipe("demo-cpu", [f"--run.output={tmp_path}"]))
        change(content)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path

    return write


def check(folder, *overrides):
    check_same_recipe(load_recipe("demo-cpu", [f"--run.output={folder}", *overrides]))


def test_what_only_changes_where_and_how_fast_may_change(begun):
    check(begun())
    overrides = [
        "--data.workers=3", "--launch.ranks=1", "--checkpoint.keep=9", "--run.resume=auto", "--monitor.tasks=[sex]",
        "--deepspeed.zero_optimization.stage=2", "--train.watchdog_seconds=7", "--train.max_skipped_steps=2",
    ]  # fmt: skip
    check(begun(), *overrides)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--optimizer.lr=1e-5", "optimizer.lr was 0.001, now 1e-05"),
        ("--batch.micro=4", "batch.micro was None, now 4"),
        ("--loss.proxies.sex.kernel=same", "loss.proxies.sex.kernel was None, now 'same'"),
        ("--encoder.options.norm=group", "encoder.options.norm was 'batch', now 'group'"),
    ],
)
def test_what_changes_the_result_is_refused(begun, override, text):
    with pytest.raises(UserError, match=text):
        check(begun(), override)


def test_another_runs_checkpoint_must_fit_into_the_network_and_no_more():
    other = to_dict(load_recipe("demo-cpu", []))
    check_same_network(load_recipe("demo-cpu", ["--optimizer.lr=0.5", "--run.name=new", "--batch.global=8"]), other)
    for override, text in (
        ("--encoder.options.width=0.25", "encoder.options.width was 0.5, now 0.25"),
        ("--optimizer.name=sgd", "optimizer.name was 'adam', now 'sgd'"),
        ("--projector.out=64", "projector.out was 128, now 64"),
    ):
        with pytest.raises(UserError, match=f"run.resume=old is a checkpoint of another network .{text}"):
            check_same_network(load_recipe("demo-cpu", ["--run.resume=old", override]), other)


def test_a_run_of_before_a_key_existed_goes_on_with_its_default_alone(begun):
    def older(content):
        del (
            content["loss"]["temperature_bounds"],
            content["monitor"],
            content["data"]["reader"],
            content["batch"]["micro"],
        )

    check(begun(older))
    with pytest.raises(UserError, match="data.reader was 'index', now 'stream'"):
        check(begun(older), "--data.reader=stream")


def test_a_proxy_that_the_run_had_not_is_no_default(begun):
    def other(content):
        content["loss"]["proxies"] = {"sex": content["loss"]["proxies"]["age"]}

    with pytest.raises(UserError, match=r"loss.proxies.age.bandwidth was None, now 5.0"):
        check(begun(other))
