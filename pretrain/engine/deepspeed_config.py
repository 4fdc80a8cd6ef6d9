"""Build DeepSpeed's configuration from a recipe: its ``deepspeed:`` section, completed from the recipe's other keys."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from infra.errors import UserError, nearest
from pretrain.config import Recipe, check_micro_batch

# Keys that the recipe's own keys decide -> the key to set instead.
OWNED = {
    "train_batch_size": "batch.global", "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro", "managed_gradient_accumulation": "batch.micro",
    "optimizer": "optimizer", "scheduler": "optimizer", "bf16": "train.precision", "bfloat16": "train.precision",
    "torch_autocast": "train.precision", "elasticity": "launch.ranks", "compile": "encoder.options.compile",
    "activation_checkpointing": "encoder.options.checkpointing", "checkpoint": "checkpoint",
    "data_efficiency": "data.balance", "curriculum_learning": "data.balance",
}  # fmt: skip
# Keys that the training engine sets: another value would change what is trained (a summed gradient) or is not supported
# (another parallelism).
FIXED = (
    "gradient_allreduce_op", "steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size", "hybrid_engine", "autotuning",
    "progressive_layer_drop", "compression_training", "weight_quantization",
)  # fmt: skip
# Keys of deepspeed.zero_optimization for which the same holds.
FIXED_ZERO = ("zenflow",)
# All other keys at the top level of DeepSpeed 0.19's configuration. They are passed through.
PASSED = (
    "zero_optimization", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
    "seq_parallel_communication_data_type", "disable_allgather", "data_types", "fp16", "aio", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "disable_python_gc", "dataloader_drop_last", "log_level", "timers",
)  # fmt: skip
# DeepSpeed's default of deepspeed.zero_optimization.reduce_bucket_size, in elements.
LARGEST_BUCKET = 500_000_000
# Keys of deepspeed.fp16 that may be set: those of the loss scaler.
SCALER = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
          "min_loss_scale")  # fmt: skip


def zero_stage(recipe: Recipe) -> int:
    """Return the recipe's ZeRO stage; DeepSpeed's default is 0."""
    return int((recipe.deepspeed.get("zero_optimization") or {}).get("stage", 0))


def reduce_bucket_size(recipe: Recipe, parameters: int) -> int:
    """Return the number of elements of the buffer in which stages 1 to 3 reduce gradients.

    It is the recipe's number if it has one, else the number of parameters, at most DeepSpeed's default. DeepSpeed reserves the
    whole buffer, by its default 1.9 GiB in float32, but a backward pass fills only as many elements as there are parameters.
    So a buffer of that size gives the same collectives as a larger one.

    Raises:
        UserError: if the recipe's value is not a number of elements.
    """
    given = (recipe.deepspeed.get("zero_optimization") or {}).get("reduce_bucket_size")
    if given is None:
        return max(1, min(parameters, LARGEST_BUCKET))
    if isinstance(given, bool) or not isinstance(given, int | float) or given < 1 or not float(given).is_integer():
        raise UserError(
            f"deepspeed.zero_optimization.reduce_bucket_size={given!r} is not possible; give a whole number of elements of at "
            "least 1, or leave it out for the number of parameters"
        )
    return int(given)


def fit_bucket(config: dict[str, Any], recipe: Recipe, parameters: int) -> dict[str, Any]:
    """Return a copy of DeepSpeed's configuration with the bucket of a network of ``parameters`` parameters."""
    copied = deepcopy(config)
    if zero_stage(recipe) > 0:
        copied["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_size(recipe, parameters)
    return copied


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for ``world_size`` ranks.

    Raises:
        UserError: if ``deepspeed:`` contradicts the recipe, has an unknown key, or combines settings that do not work together.
    """
    _check_keys(recipe)
    _check_precision(recipe)
    if recipe.encoder.options.get("compile") and zero_stage(recipe) == 3:
        # A compiled encoder does not call the hooks in which stage 3 gathers the weights.
        raise UserError(
            "encoder.options.compile=true does not work with deepspeed.zero_optimization.stage=3; use stage 0, 1 or 2"
        )
    passes = check_micro_batch(recipe.batch, world_size)
    return {
        **recipe.deepspeed,
        "train_micro_batch_size_per_gpu": recipe.batch.global_ // world_size // passes,
        "gradient_accumulation_steps": passes,
        "train_batch_size": recipe.batch.global_,
        "steps_per_print": 10**9,
        # DeepSpeed accepts torch's optimisers under ZeRO, off-loaded or not, only with these two settings.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **_precision(recipe),
    }


def _precision(recipe: Recipe) -> dict[str, Any]:
    precision = recipe.train.precision
    if precision in ("bf16", "fp16"):
        # Batch normalisation raises if its buffers (float32 by default) and its 16-bit input have different types.
        types = {"buffer_dtype": precision, **(recipe.deepspeed.get("data_types") or {})}
        section = recipe.deepspeed.get("fp16") or {} if precision == "fp16" else {}
        return {precision: {**section, "enabled": True}, "data_types": types}
    if precision.startswith("autocast"):
        dtype = "float16" if precision == "autocast-fp16" else "bfloat16"
        return {"torch_autocast": {"enabled": True, "dtype": dtype}}
    return {}


def _check_keys(recipe: Recipe) -> None:
    for key in recipe.deepspeed:
        if key in OWNED:
            raise UserError(f"deepspeed.{key} is decided by the recipe's own keys; set {OWNED[key]} instead")
        if key in FIXED:
            raise UserError(f"deepspeed.{key} is set by the training engine; leave it out")
        if key not in PASSED:
            raise UserError(
                f"deepspeed.{key} is not known{nearest(key, PASSED)}; allowed keys of DeepSpeed's configuration: "
                f"{', '.join(PASSED)}"
            )
    clip = recipe.deepspeed.get("gradient_clipping", 0.0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0:
        raise UserError(
            f"deepspeed.gradient_clipping={clip!r} is not possible; give the largest L2 norm of the gradient, or 0 for none"
        )
    zero = recipe.deepspeed.get("zero_optimization") or {}
    if not isinstance(zero, Mapping) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(
            f"deepspeed.zero_optimization={zero!r} is not possible; give a section of keys with stage 0, 1, 2 or 3"
        )
    reduce_bucket_size(recipe, 0)  # its check
    for key in FIXED_ZERO:
        if key in zero:
            raise UserError(f"deepspeed.zero_optimization.{key} is not supported by the training engine; leave it out")
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(name)
        enabled = isinstance(section, Mapping) and section.get("device", "none") != "none"
        if enabled and zero_stage(recipe) not in stages:
            raise UserError(
                f"deepspeed.zero_optimization.{name} does not work with stage {zero_stage(recipe)}; use stage "
                f"{' or '.join(map(str, stages))}"
            )


def _check_precision(recipe: Recipe) -> None:
    precision, stage, scaler = recipe.train.precision, zero_stage(recipe), recipe.deepspeed.get("fp16") or {}
    if "fp16" in recipe.deepspeed and precision != "fp16":
        raise UserError(f"deepspeed.fp16 is for train.precision=fp16, found {precision}; leave it out, or set fp16")
    for key in scaler:
        if key not in SCALER:
            raise UserError(
                f"deepspeed.fp16.{key} cannot be set in a recipe{nearest(key, SCALER)}; allowed: {', '.join(SCALER)}"
            )
    if precision == "fp16" and stage == 0:
        # DeepSpeed 0.19 divides the gradient by a loss scale, but does not multiply the loss by it.
        raise UserError("train.precision=fp16 does not work with ZeRO stage 0; use deepspeed.zero_optimization.stage=1")
    if stage == 0 and (recipe.deepspeed.get("data_types") or {}).get("grad_accum_dtype"):
        raise UserError(
            "deepspeed.data_types.grad_accum_dtype does not work with ZeRO stage 0; leave it out, or use stage 1"
        )
    if precision == "autocast-fp16" and stage > 0:
        # Each rank's scaler would see only its own part of the gradient, and the ranks would skip different steps.
        raise UserError(
            f"train.precision=autocast-fp16 does not work with ZeRO stage {stage}; use deepspeed.zero_optimization.stage=0, "
            "or train.precision fp16 or autocast"
        )
