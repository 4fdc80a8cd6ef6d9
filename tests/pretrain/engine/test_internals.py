"""The names inside DeepSpeed and torch that the engine uses: each exists, and a missing one stops the run.

When a test of `test_the_names_exist` fails after an upgrade, look up what became of the name; until then the guards raise
LibraryChanged in place of training with stale weights.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from infra.internals import LibraryChanged
from pretrain.config import load_recipe
from pretrain.engine import engine, reshard
from pretrain.engine.ema import Average
from pretrain.engine.partitions import LAYOUTS, layout_of, local_shards, write_back_weights
from tests.distributed.engine_cases import COMMON, allow_fp16, build

STAGE3 = "{stage: 3, stage3_param_persistence_threshold: 0}"
# DeepSpeed's optimiser -> overrides of a recipe that make DeepSpeed choose it.
ENGINES = {
    "Adam": ["--deepspeed={zero_optimization: {stage: 0}}"],
    "FP16_UnfusedOptimizer": ["--deepspeed={zero_optimization: {stage: 0}}", "--train.precision=bf16"],
    "DeepSpeedZeroOptimizer": ["--deepspeed={zero_optimization: {stage: 2}}", "--train.precision=fp16"],
    "BF16_Optimizer": ["--deepspeed={data_types: {grad_accum_dtype: fp32}, zero_optimization: {stage: 1}}",
                       "--train.precision=bf16"],
    "DeepSpeedZeroOptimizer_Stage3": [f"--deepspeed={{zero_optimization: {STAGE3}}}"],
}  # fmt: skip
# DeepSpeed's optimiser -> its attributes, and those of a parameter, that hold or update the weights.
OPTIMIZER_NAMES = {
    "Adam": (),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "bit16_groups", "update_lp_params"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups", "update_lp_params"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat", "fp16_groups", "fp16_partitioned_groups_flat", "fp16_partitioned_groups", "unflatten",
        "checkpoint_event_prologue", "checkpoint_event_epilogue",
    ),
}  # fmt: skip
PARAMETER_NAMES = {
    "DeepSpeedZeroOptimizer": ("_hp_mapping",),
    "BF16_Optimizer": ("_hp_mapping",),
    "DeepSpeedZeroOptimizer_Stage3": ("ds_numel", "partition_numel"),
}
FRAGMENT_NAMES = ("lp_fragment_address", "hp_fragment_address")
AVERAGE_NAMES = ("ds_tensor", "ds_numel", "ds_shape")
SCALER_NAMES = ("dynamic", "raise_error_at_min_scale", "cur_scale", "min_scale", "delayed_shift", "cur_hysteresis")
ENGINE_NAMES = (
    "basic_optimizer", "checkpoint_engine", "_copy_recovery_script", "torch_autocast_z0_gradscaler", "global_steps",
    "global_samples", "skipped_steps", "was_step_applied", "get_global_grad_norm", "zero_optimization_stage", "fp16_enabled",
    "zero_offload_optimizer", "zero_offload_param", "set_gradient_accumulation_boundary", "lr_scheduler", "module",
)  # fmt: skip
TORCH_NAMES = (
    (torch, "_foreach_norm"),
    (torch.nn.modules.batchnorm, "_BatchNorm"),
    (torch.ops.mkldnn, "_is_mkldnn_fp16_supported"),
    (torch, "_disable_dynamo"),
    (torch._C._distributed_c10d, "Store"),
    (torch._C._distributed_c10d, "TCPStore"),
    (import_module("torch.distributed.rendezvous"), "register_rendezvous_handler"),
)


@pytest.fixture(scope="module", params=ENGINES)
def built(request, one_rank):
    """One engine for each of DeepSpeed's optimisers."""
    allow_fp16()
    recipe = load_recipe("demo-cpu", [*COMMON, *ENGINES[request.param]])
    trained = engine.build_engine(recipe, build(recipe), lambda step: 1.0)
    yield trained
    trained.destroy()


def kind_of(trained):
    return type(trained.optimizer).__name__


def remove(monkeypatch, owner, name):
    """Remove an attribute from the object and from its classes."""
    places = [place for place in (owner, *type(owner).__mro__) if name in vars(place)]
    assert places, f"{owner!r} has no {name}"
    for place in places:
        monkeypatch.delattr(place, name)


def engines(*kinds):
    """Run a test with the engines of these optimisers only."""
    return pytest.mark.parametrize("built", kinds, indirect=True)


def test_the_names_exist(built):
    kind = kind_of(built)
    parameter = next(built.module.parameters())
    missing = [name for name in ENGINE_NAMES if not hasattr(built, name)]
    missing += [name for name in OPTIMIZER_NAMES[kind] if not hasattr(built.optimizer, name)]
    missing += [name for name in PARAMETER_NAMES.get(kind, ()) if not hasattr(parameter, name)]
    if "_hp_mapping" in PARAMETER_NAMES.get(kind, ()):
        missing += [name for name in FRAGMENT_NAMES if not hasattr(parameter._hp_mapping, name)]
    if built.zero_optimization_stage() == 3:
        missing += [name for name in AVERAGE_NAMES if not hasattr(parameter, name)]
    if built.fp16_enabled():
        missing += [name for name in SCALER_NAMES if not hasattr(built.optimizer.loss_scaler, name)]
    assert missing == []
    assert kind == "Adam" or kind in LAYOUTS


@pytest.mark.parametrize(("owner", "name"), TORCH_NAMES)
def test_the_names_of_torch_exist(owner, name):
    assert hasattr(owner, name)


def test_the_names_of_torch_that_skip_the_compiler_exist():
    """`without_compiler` sets and compares these names; with other ones, every start would import torch's compiler."""
    wrapper = torch._disable_dynamo(lambda: None).__code__
    assert "__dynamo_disable" in wrapper.co_consts
    assert wrapper in [getattr(function, "__code__", None) for function in vars(torch.optim.Optimizer).values()]
    for kind in (torch.optim.Adam, torch.optim.SGD):
        hooked = hasattr(kind.step, "hooked")  # by the first optimiser that was made
        step = kind.step.__wrapped__ if hooked else kind.step
        assert step.__code__.co_name == "_use_grad"
        assert step.__wrapped__.__code__.co_name == "step"


def test_a_store_of_torch_takes_an_open_port():
    assert "master_listen_fd" in torch.distributed.TCPStore.__init__.__doc__


def test_weights_written_back_are_those_of_the_optimiser(built):
    """Every entry of every parameter is in one shard, and a change of the shard reaches the network."""
    shards = local_shards(built)
    sizes = {}
    for _, segments in shards:
        for segment in segments:
            sizes[segment.name] = sizes.get(segment.name, 0) + segment.size
    whole = {name: getattr(p, "ds_numel", p.numel()) for name, p in built.module.named_parameters()}
    assert sizes == whole
    before = engine.encoder_state(built)
    for tensor, _ in shards:
        tensor.data.mul_(2.0)
    write_back_weights(built)
    after = engine.encoder_state(built)
    for name in whole:
        if name.startswith("encoder."):
            key = name.removeprefix("encoder.")
            torch.testing.assert_close(after[key], 2.0 * before[key], rtol=2e-2, atol=1e-6)


@engines(*LAYOUTS)
def test_a_missing_attribute_of_the_optimiser_raises(built, monkeypatch):
    for name in OPTIMIZER_NAMES[kind_of(built)]:
        with monkeypatch.context() as patch:
            remove(patch, built.optimizer, name)
            with pytest.raises(LibraryChanged, match=f"deepspeed .*: {kind_of(built)} has no attribute '{name}'"):
                local_shards(built)
                write_back_weights(built)


@engines(*PARAMETER_NAMES)
def test_a_missing_attribute_of_a_parameter_raises(built, monkeypatch):
    for name in PARAMETER_NAMES[kind_of(built)]:
        with monkeypatch.context() as patch:
            remove(patch, next(built.module.parameters()), name)
            with pytest.raises(LibraryChanged, match=f"has no attribute '{name}'"):
                local_shards(built)


@engines("DeepSpeedZeroOptimizer", "BF16_Optimizer")
def test_a_missing_attribute_of_a_fragment_raises(built, monkeypatch):
    for name in FRAGMENT_NAMES:
        with monkeypatch.context() as patch:
            remove(patch, next(built.module.parameters())._hp_mapping, name)
            with pytest.raises(LibraryChanged, match=f"has no attribute '{name}'"):
                local_shards(built)


@engines("DeepSpeedZeroOptimizer_Stage3")
def test_an_average_under_stage_3_raises_without_the_parts(built, monkeypatch):
    for name in AVERAGE_NAMES:
        with monkeypatch.context() as patch:
            average = Average(built, 0.9)
            remove(patch, next(built.module.encoder.parameters()), name)
            with pytest.raises(LibraryChanged, match=f"has no attribute '{name}'"):
                average.update(1)
                average._gather(*next(zip(average._averages.values(), built.module.encoder.parameters(), strict=True)))


@engines("DeepSpeedZeroOptimizer")
def test_a_missing_attribute_of_the_loss_scaler_raises(built, monkeypatch):
    assert engine._at_smallest_scale(built) is False
    assert built.optimizer.loss_scaler.raise_error_at_min_scale is False
    for name in SCALER_NAMES:
        with monkeypatch.context() as patch:
            remove(patch, built.optimizer.loss_scaler, name)
            with pytest.raises(LibraryChanged, match=f"DynamicLossScaler has no attribute '{name}'"):
                engine._at_smallest_scale(built)


@engines("DeepSpeedZeroOptimizer")
def test_the_smallest_scale_is_reached_once_no_overflow_is_tolerated(built, monkeypatch):
    scaler = built.optimizer.loss_scaler
    for scale, tolerated, left, expected in (
        (1.0, 1, 1, True),
        (1.0, 2, 2, False),
        (1.0, 2, 1, True),
        (2.0, 1, 1, False),
    ):
        for name, value in (("cur_scale", scale), ("delayed_shift", tolerated), ("cur_hysteresis", left)):
            monkeypatch.setattr(scaler, name, value)
        assert engine._at_smallest_scale(built) is expected


def test_saving_copies_no_scripts_and_leaves_the_engine_as_it_was(built, tmp_path, monkeypatch):
    write = built.checkpoint_engine.save
    engine.save_engine(built, tmp_path, "step")
    assert list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.py"))
    with monkeypatch.context() as patch:
        patch.setattr(built, "save_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.save_engine(built, tmp_path, "other")
    assert "_copy_recovery_script" not in vars(built)
    assert built.checkpoint_engine.save == write
    for owner, name in ((built, "_copy_recovery_script"), (built.checkpoint_engine, "save")):
        with monkeypatch.context() as patch:
            remove(patch, owner, name)
            with pytest.raises(LibraryChanged, match=f"has no attribute '{name}'"):
                engine.save_engine(built, tmp_path, "third")


def test_a_renamed_counter_raises(built, monkeypatch):
    remaining = {"counters": {"global_steps": 3}, "schedule": built.lr_scheduler.state_dict(), "scaler": {}}
    reshard._load_remaining(built, remaining)
    assert built.global_steps == 3
    remove(monkeypatch, built, "global_steps")
    with pytest.raises(LibraryChanged, match="DeepSpeedEngine has no attribute 'global_steps'"):
        reshard._load_remaining(built, remaining)


def test_an_unknown_optimiser_raises():
    class Renamed:
        pass

    changed = SimpleNamespace(optimizer=Renamed(), basic_optimizer=None)
    with pytest.raises(
        LibraryChanged, match="deepspeed .*: unknown optimiser Renamed; known are FP16_UnfusedOptimizer"
    ):
        layout_of(changed)


WEIGHTS = {"w": torch.ones(2)}
MODEL = {
    "module": WEIGHTS,
    "buffer_names": [],
    "lr_scheduler": {},
    "global_steps": 1,
    "global_samples": 1,
    "skipped_steps": 0,
}


def write_checkpoint(folder, model, *optimizers):
    torch.save({**MODEL, **model}, folder / "mp_rank_00_model_states.pt")
    for rank, state in enumerate(optimizers):
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (
            {"state": {}, "param_groups": [], "extra": 1},
            "unknown optimiser state with the keys state, param_groups, extra",
        ),
        ({"optimizer_state_dict": {"state": {}}, "fp32_copies": []}, "unknown optimiser state with the keys"),
        ({"state": {"w": {}}, "param_groups": []}, "optimiser state under 'w', not under the numbers of its 1 tensors"),
    ],
)
def test_an_unknown_form_of_stage_0_is_refused(tmp_path, optimizer, text):
    write_checkpoint(tmp_path, {"optimizer": optimizer})
    assert text in reshard._join(tmp_path, 0, ["w"], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("missing", ["module", "buffer_names", "lr_scheduler", "global_steps", "skipped_steps"])
def test_a_checkpoint_without_a_key_is_refused(tmp_path, missing):
    model = {**MODEL, "optimizer": {"state": {}, "param_groups": []}}
    del model[missing]
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    assert f"KeyError: '{missing}'" in reshard._join(tmp_path, 0, ["w"], tmp_path / "out.safetensors")


@pytest.mark.parametrize("stage", [1, 3])
def test_an_unknown_loss_scaler_and_renamed_partitions_are_refused(tmp_path, stage):
    write_checkpoint(tmp_path, {"param_shapes": []}, {"loss_scaler": torch.zeros(1)})
    text = reshard._join(tmp_path, stage, ["w"], tmp_path / "out.safetensors")
    assert "unknown loss scaler Tensor; known are NoneType, LossScaler, DynamicLossScaler" in text
    write_checkpoint(tmp_path, {"param_shapes": []}, {"renamed": []})
    assert "KeyError" in reshard._join(tmp_path, stage, ["w"], tmp_path / "out.safetensors")
