"""DeepSpeed's configuration from a recipe: keys that are passed through, added, or refused."""

from __future__ import annotations

from copy import deepcopy

import pytest

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.engine import engine
from pretrain.engine.deepspeed_config import (
    FIXED,
    FIXED_ZERO,
    LARGEST_BUCKET,
    OWNED,
    PASSED,
    SCALER,
    deepspeed_config,
    fit_bucket,
)
from pretrain.model import build_model


def config(*overrides):
    return deepspeed_config(load_recipe("demo-cpu", list(overrides)), world_size=2)


def test_the_deepspeed_section_is_passed_through_whole():
    zero = "zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}"
    section = f"{{{zero}, gradient_clipping: 0.5, wall_clock_breakdown: true}}"
    built = config(f"--deepspeed={section}", "--train.precision=bf16", "--batch.micro=4")
    assert built["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert (built["gradient_clipping"], built["wall_clock_breakdown"]) == (0.5, True)
    assert (built["train_batch_size"], built["gradient_accumulation_steps"]) == (32, 4)
    assert built["bf16"] == {"enabled": True}
    assert built["data_types"] == {"buffer_dtype": "bf16"}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {}),
        ("bf16", {"bf16": {"enabled": True}}),
        ("fp16", {"fp16": {"enabled": True}}),
        ("autocast", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ],
)
def test_a_precision_sets_its_section(precision, expected):
    built = config(f"--train.precision={precision}")
    assert {key: built[key] for key in ("bf16", "fp16", "torch_autocast") if key in built} == expected
    half = config("--train.precision=autocast-fp16", "--deepspeed={}")
    assert half["torch_autocast"] == {"enabled": True, "dtype": "float16"}


def test_the_keys_of_the_loss_scaler_are_passed_with_fp16():
    built = config("--train.precision=fp16", "--deepspeed.fp16={initial_scale_power: 12}")
    assert built["fp16"] == {"initial_scale_power": 12, "enabled": True}


BUCKET = "--deepspeed.zero_optimization.reduce_bucket_size="


@pytest.mark.parametrize(
    ("parameters", "overrides", "expected"),
    [
        (1000, [], 1000),
        (10**10, [], LARGEST_BUCKET),
        (1000, [BUCKET + "300"], 300),
        (1000, [BUCKET + "5e8"], 500_000_000),
        (1000, ["--deepspeed={}"], None),
    ],
)
def test_the_bucket_fits_the_network_unless_the_recipe_sets_one(parameters, overrides, expected):
    recipe = load_recipe("demo-cpu", overrides)
    plain = deepspeed_config(recipe, world_size=2)
    before = deepcopy(plain)
    fitted = fit_bucket(plain, recipe, parameters)
    assert fitted.get("zero_optimization", {}).get("reduce_bucket_size") == expected
    assert plain == before


def test_a_bucket_without_a_value_of_the_recipe_is_at_most_that_of_deepspeed(one_rank):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().reduce_bucket_size == LARGEST_BUCKET


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--deepspeed.gradient_cliping=1.0"], "gradient_cliping is not known .*gradient_clipping"),
        (["--deepspeed.zero_optimisation={stage: 1}"], "zero_optimisation is not known .*zero_optimization"),
        (["--deepspeed.train_batch_size=8"], "is decided by the recipe's own keys; set batch.global instead"),
        (["--deepspeed.gradient_allreduce_op=sum"], "is set by the training engine; leave it out"),
        (["--deepspeed.gradient_clipping=-1"], "gradient_clipping=-1 is not possible; give the largest L2 norm"),
        (["--deepspeed.zero_optimization.zenflow={topk_ratio: 0.1}"], "zero_optimization.zenflow is not supported"),
        ([BUCKET + "0"], "reduce_bucket_size=0 is not possible; give a whole number of elements of at least 1"),
        ([BUCKET + ".inf"], "reduce_bucket_size=inf is not possible"),
        ([BUCKET + "much"], "reduce_bucket_size='much' is not possible"),
        (["--deepspeed.zero_optimization.stage=4"], "a section of keys with stage 0, 1, 2 or 3"),
        (["--deepspeed.zero_optimization.offload_param={device: cpu}"], "offload_param does not work with stage 1"),
        (["--deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"], "with stage 0; use stage 1 or 2 or 3"),
        (["--deepspeed.fp16={loss_scale: 8}"], "is for train.precision=fp16, found fp32"),
        (["--train.precision=fp16", "--deepspeed.fp16={enabled: false}"], "deepspeed.fp16.enabled cannot be set in a recipe"),
        (["--train.precision=fp16", "--deepspeed={}"], "fp16 does not work with ZeRO stage 0"),
        (["--train.precision=autocast-fp16"], "autocast-fp16 does not work with ZeRO stage 1"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_possible_is_refused_in_one_line(overrides, text):
    with pytest.raises(UserError, match=text) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)


class Recording(dict):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, *arguments, **entries):
        super().__init__(*arguments, **entries)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


def test_the_installed_deepspeed_reads_every_key(one_rank):
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    configuration = Recording(train_batch_size=4, train_micro_batch_size_per_gpu=4)
    DeepSpeedConfig(configuration)
    assert [key for key in (*OWNED, *FIXED, *PASSED) if key not in configuration.asked] == []
    assert [key for key in SCALER if key not in DeepSpeedFP16Config.model_fields] == []
    assert [key for key in FIXED_ZERO if key not in DeepSpeedZeroConfig.model_fields] == []


def test_a_key_within_a_section_that_deepspeed_refuses_is_one_line(one_rank):
    recipe = load_recipe("demo-cpu", ["--deepspeed.zero_optimization.overlap_com=true", "--batch.global=4"])
    with pytest.raises(UserError, match=r"deepspeed: DeepSpeed refuses overlap_com=True"):
        engine.build_engine(recipe, build_model(recipe), lambda step: 1.0)


def test_fp16_on_a_cpu_without_it_is_refused(one_rank, monkeypatch):
    monkeypatch.setattr(engine, "_has_fp16", lambda: False)
    recipe = load_recipe("demo-cpu", ["--train.precision=fp16", "--batch.global=4"])
    with pytest.raises(UserError, match=r"train.precision=fp16 needs a GPU, or a CPU with AVX512-FP16; use fp32, bf16"):
        engine.build_engine(recipe, build_model(recipe), lambda step: 1.0)
