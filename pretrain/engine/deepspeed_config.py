"""DeepSpeed's configuration from a recipe: its ``deepspeed:`` section whole, and what the recipe's other keys imply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import UserError, nearest
from pretrain.config import Recipe, check_micro_batch

# What the recipe or the engine decides, and what to set instead.
OWNED = {
    "train_batch_size": "batch.global", "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro", "managed_gradient_accumulation": "batch.micro",
    "optimizer": "optimizer", "scheduler": "optimizer", "bf16": "train.precision", "bfloat16": "train.precision",
    "torch_autocast": "train.precision", "elasticity": "launch.ranks", "compile": "encoder.options.compile",
    "activation_checkpointing": "encoder.options.checkpointing", "checkpoint": "checkpoint",
    "data_efficiency": "data.balance", "curriculum_learning": "data.balance",
}  # fmt: skip
# The engine's own: another value would train something else (a summed gradient) or nothing (another parallelism).
FIXED = (
    "gradient_allreduce_op", "steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size", "hybrid_engine", "autotuning",
    "progressive_layer_drop", "compression_training", "weight_quantization", "zenflow",
)  # fmt: skip
# The rest of the top level of DeepSpeed 0.19's configuration.
PASSED = (
    "zero_optimization", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
    "seq_parallel_communication_data_type", "disable_allgather", "data_types", "fp16", "aio", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "disable_python_gc", "dataloader_drop_last", "log_level", "timers",
)  # fmt: skip
# What of deepspeed.fp16 may be set: the scaler's keys.
SCALER = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
          "min_loss_scale")  # fmt: skip


def zero_stage(recipe: Recipe) -> int:
    """The recipe's ZeRO stage; DeepSpeed's default is 0."""
    return int((recipe.deepspeed.get("zero_optimization") or {}).get("stage", 0))


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The configuration for ``world_size`` ranks; UserError for what contradicts the recipe or what DeepSpeed has not."""
    _check_keys(recipe)
    _check_precision(recipe)
    if recipe.encoder.options.get("compile") and zero_stage(recipe) == 3:
        # A compiled encoder never calls the hooks by which stage 3 brings the weights together.
        raise UserError(
            "encoder.options.compile=true does not go with deepspeed.zero_optimization.stage=3; use stage 0, 1 or 2"
        )
    passes = check_micro_batch(recipe.batch, world_size)
    return {
        **recipe.deepspeed,
        "train_micro_batch_size_per_gpu": recipe.batch.global_ // world_size // passes,
        "gradient_accumulation_steps": passes,
        "train_batch_size": recipe.batch.global_,
        "steps_per_print": 10**9,
        # A client optimiser of torch's under ZeRO, off-loaded or not, is what the recipe asks for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **_precision(recipe),
    }


def _precision(recipe: Recipe) -> dict[str, Any]:
    precision = recipe.train.precision
    if precision in ("bf16", "fp16"):
        # Batch statistics stay in one type with the activations; a float32 buffer beside 16-bit input raises.
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
            raise UserError(f"deepspeed.{key} contradicts the recipe's own keys; set {OWNED[key]} instead")
        if key in FIXED:
            raise UserError(f"deepspeed.{key} is the training engine's to set; leave it out")
        if key not in PASSED:
            raise UserError(
                f"deepspeed.{key} is no key of DeepSpeed's configuration{nearest(key, PASSED)}; allowed here: "
                f"{', '.join(PASSED)}"
            )
    clip = recipe.deepspeed.get("gradient_clipping", 0.0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0:
        raise UserError(
            f"deepspeed.gradient_clipping={clip!r} must be a number from 0 (off), the largest L2 norm of the gradient"
        )
    zero = recipe.deepspeed.get("zero_optimization") or {}
    if not isinstance(zero, Mapping) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(
            f"deepspeed.zero_optimization={zero!r} is not possible; it is a section of keys, its stage 0, 1, 2 or 3"
        )
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(name)
        wanted = isinstance(section, Mapping) and section.get("device", "none") != "none"
        if wanted and zero_stage(recipe) not in stages:
            raise UserError(
                f"deepspeed.zero_optimization.{name} does not go with stage {zero_stage(recipe)}; use stage "
                f"{' or '.join(map(str, stages))}"
            )


def _check_precision(recipe: Recipe) -> None:
    precision, stage, scaler = recipe.train.precision, zero_stage(recipe), recipe.deepspeed.get("fp16") or {}
    if "fp16" in recipe.deepspeed and precision != "fp16":
        raise UserError(f"deepspeed.fp16 is for train.precision=fp16, found {precision}; leave it out, or set fp16")
    for key in scaler:
        if key not in SCALER:
            raise UserError(
                f"deepspeed.fp16.{key} is not for a recipe to set{nearest(key, SCALER)}; allowed: {', '.join(SCALER)}"
            )
    if precision == "fp16" and stage == 0:
        # DeepSpeed 0.19 divides the gradient by a scale with which the loss was never multiplied.
        raise UserError("train.precision=fp16 does not go with ZeRO stage 0; use deepspeed.zero_optimization.stage=1")
    if stage == 0 and (recipe.deepspeed.get("data_types") or {}).get("grad_accum_dtype"):
        raise UserError(
            "deepspeed.data_types.grad_accum_dtype does not go with ZeRO stage 0; leave it out, or use stage 1"
        )
    if precision == "autocast-fp16" and stage > 0:
        # Each rank's scaler would judge its own part of the gradient alone, and the ranks would part.
        raise UserError(
            f"train.precision=autocast-fp16 does not go with ZeRO stage {stage}; use deepspeed.zero_optimization.stage=0, "
            "or train.precision fp16 or autocast"
        )
