"""Changes of the recipe that a run accepts or refuses when it is resumed."""

from __future__ import annotations

import pytest
import yaml

from infra.errors import UserError
from infra.settings import to_dict
from pretrain.config import load_recipe
from pretrain.run.folder import check_same_network, check_same_recipe


@pytest.fixture
def started(tmp_path):
    """Write the recipe.yaml of a run of the demo recipe after ``change``; return the run's folder."""

    def write(change=lambda content: None):
        content = to_dict(load_recipe("demo-cpu", [f"--run.output={tmp_path}"]))
        change(content)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path

    return write


def check(folder, *overrides):
    check_same_recipe(load_recipe("demo-cpu", [f"--run.output={folder}", *overrides]))


def test_keys_that_do_not_change_the_result_may_change(started):
    check(started())
    overrides = [
        "--data.workers=3", "--data.cache_unpacked=/disk",
        "--launch.ranks=1", "--checkpoint.keep=9", "--run.resume=auto", "--monitor.tasks=[sex]",
        "--deepspeed.zero_optimization.stage=2", "--train.watchdog_seconds=7", "--train.max_skipped_steps=2",
    ]  # fmt: skip
    check(started(), *overrides)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--optimizer.lr=1e-5", "optimizer.lr was 0.001, now 1e-05"),
        ("--batch.micro=4", "batch.micro was None, now 4"),
        ("--loss.proxies.sex.kernel=same", "loss.proxies.sex.kernel was None, now 'same'"),
        ("--encoder.options.norm=group", "encoder.options.norm was 'batch', now 'group'"),
    ],
)
def test_keys_that_change_the_result_are_refused(started, override, text):
    with pytest.raises(UserError, match=text):
        check(started(), override)


def test_another_runs_checkpoint_must_fit_the_network_but_not_the_rest_of_the_recipe():
    other = to_dict(load_recipe("demo-cpu", []))
    check_same_network(load_recipe("demo-cpu", ["--optimizer.lr=0.5", "--run.name=new", "--batch.global=8"]), other)
    for override, text in (
        ("--encoder.options.width=0.5", "encoder.options.width was 0.25, now 0.5"),
        ("--optimizer.name=sgd", "optimizer.name was 'adam', now 'sgd'"),
        ("--projector.out=64", "projector.out was 128, now 64"),
    ):
        with pytest.raises(UserError, match=f"run.resume=old is a checkpoint of another network .{text}"):
            check_same_network(load_recipe("demo-cpu", ["--run.resume=old", override]), other)


def test_a_run_older_than_a_key_continues_only_with_the_keys_default(started):
    def older(content):
        del (
            content["loss"]["temperature_bounds"],
            content["monitor"],
            content["data"]["reader"],
            content["batch"]["micro"],
        )

    check(started(older))
    with pytest.raises(UserError, match="data.reader was 'index', now 'stream'"):
        check(started(older), "--data.reader=stream")


def test_another_proxy_is_refused(started):
    def other(content):
        content["loss"]["proxies"] = {"sex": content["loss"]["proxies"]["age"]}

    with pytest.raises(UserError, match=r"loss.proxies.age.bandwidth was None, now 5.0"):
        check(started(other))
