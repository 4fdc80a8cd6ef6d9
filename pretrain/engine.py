"""DeepSpeed behind one door: process group, engine, its checkpoint files. The only module that imports deepspeed."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra import distributed
from infra.errors import UserError
from infra.extensions import exclusive_build, extensions_folder
from pretrain.config import Optimizer, Recipe, check_micro_batch

# What the recipe itself decides; in the recipe's `deepspeed:` section these would contradict it.
OWNED = {
    "train_batch_size": "batch.global", "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro", "optimizer": "optimizer", "scheduler": "optimizer",
    "fp16": "train.precision", "bf16": "train.precision", "torch_autocast": "train.precision",
}  # fmt: skip


class NotFinite(RuntimeError):
    """The loss or its gradient is NaN or infinite; the run stops and its last checkpoint stays as it is."""


def import_deepspeed() -> Any:
    """DeepSpeed, told where to compile and which accelerator to take, and without its INFO lines."""
    extensions_folder()
    # The environment's own ninja first, however the command was started: another ninja would compile all over again.
    binaries = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != binaries:
        os.environ["PATH"] = os.pathsep.join((binaries, os.environ["PATH"]))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed and gloo go by names that torch 2.13 calls deprecated; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def warm() -> None:
    """Compile (or load, 0.1 s) DeepSpeed's CPU collectives, one process at a time; nothing to do on a GPU."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        with exclusive_build():
            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def start_ranks() -> torch.device:
    """Join the process group that the launcher prepared (or make one of one rank) and give this rank its device."""
    os.environ.update(distributed.single_process_environment())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(distributed.local_rank())
    else:
        # Ranks on one host share its cores; torch alone would give every rank all of them.
        local_ranks = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size()
        )
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    warm()
    with redirect_stdout(io.StringIO()):  # every rank would report that the collectives were built
        import_deepspeed().init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")


def stop_ranks() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's ``deepspeed:`` section and what the recipe's other keys imply."""
    for key in recipe.deepspeed:
        if key in OWNED:
            raise UserError(f"deepspeed.{key} contradicts the recipe's own keys; set {OWNED[key]} instead")
    if recipe.encoder.options.get("compile") and (recipe.deepspeed.get("zero_optimization") or {}).get("stage") == 3:
        # A compiled encoder never calls the hooks by which stage 3 brings the weights together.
        raise UserError(
            "encoder.options.compile=true does not go with deepspeed.zero_optimization.stage=3; use stage 0, 1 or 2"
        )
    passes = check_micro_batch(recipe.batch, world_size)
    config: dict[str, Any] = {
        **recipe.deepspeed,
        "train_micro_batch_size_per_gpu": recipe.batch.global_ // world_size // passes,
        "gradient_accumulation_steps": passes,
        "train_batch_size": recipe.batch.global_,
        "steps_per_print": 10**9,
        # A client optimiser of torch's under ZeRO is what the recipe asks for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if recipe.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        # Batch statistics stay in one type with the activations; a float32 buffer beside bf16 input raises.
        config["data_types"] = {"buffer_dtype": "bf16", **recipe.deepspeed.get("data_types", {})}
    elif recipe.train.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def build_engine(recipe: Recipe, model: nn.Module, lr_at: Callable[[int], float]) -> Any:
    """The DeepSpeed engine of ``model``. ``lr_at(step)`` is the factor on the learning rate at a step."""
    lay_plainly(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for name, p in named if not name.startswith("temperature.")]}]
    if learned := [p for name, p in named if name.startswith("temperature.")]:
        groups.append({"params": learned, "weight_decay": 0.0})  # decay would pull the temperature towards 1
    optimizer = build_optimizer(recipe.optimizer, groups)
    if int(recipe.deepspeed.get("zero_optimization", {}).get("stage", 0)) == 0:
        optimizer.register_step_pre_hook(_refuse_not_finite)  # the other stages look by themselves, see update
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_at)
    engine, _, _, _ = import_deepspeed().initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(recipe, distributed.world_size()),
        dist_init_required=False,
    )
    return engine


def lay_plainly(model: nn.Module) -> None:
    """Give weights torch's usual strides, where they were channels-last.

    DeepSpeed's first broadcast sees weights as bytes, which wants a last stride of 1; ZeRO lays them flat in any case.
    """
    for p in model.parameters():
        # `contiguous` alone leaves the strides of a channels-last kernel of one voxel as they are.
        p.data = p.data.contiguous().flatten().view(p.shape)


def _refuse_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """NotFinite on every rank before the weights change, where any rank's part of the gradient is not finite. Collective."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    bad = any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if distributed.reduce_scalars([float(bad)])[0]:
        raise NotFinite("the gradient is not finite")


def build_optimizer(settings: Optimizer, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's own optimisers: DeepSpeed's would be compiled a second time, and the paper's is plain Adam with L2."""
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(parameters, betas=settings.betas, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, betas=settings.betas, **common),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
    }
    return kinds[settings.name]()


def encoder_state(engine: Any) -> dict[str, torch.Tensor]:
    """The encoder's weights and buffers in float32 on the CPU, whole on every rank whatever the ZeRO stage."""
    encoder = engine.module.encoder
    if engine.zero_optimization_stage() == 3:
        deepspeed = import_deepspeed()
        with deepspeed.zero.GatheredParameters(list(encoder.parameters())):
            return _to_float32(encoder.state_dict())
    return _to_float32(encoder.state_dict())


def _to_float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().clone().contiguous()
        for name, value in state.items()
    }


def update(engine: Any) -> float:
    """Step the optimiser on the gradient that ``engine.backward`` left; the gradient's L2 norm before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0:
        # Stage 0 keeps no norm of its own. The gradients are averaged over the ranks by now, the same on each.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    if not engine.was_step_applied():  # ZeRO leaves out a step whose gradient overflowed on any rank
        raise NotFinite("the gradient is not finite")
    return float(engine.get_global_grad_norm() if norm is None else norm)


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write DeepSpeed's files to ``folder/tag``; its own ``latest`` is not used, see pretrain.checkpoint."""
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)


def load_engine(engine: Any, folder: Path, tag: str) -> None:
    """Read what ``save_engine`` wrote, at the same world size and ZeRO stage."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise UserError(f"checkpoint {folder / tag} could not be loaded by DeepSpeed; is it of another world size?")


def convert_to_universal(folder: Path, out: Path) -> None:
    """Join the ranks' parts of a checkpoint (ZeRO 1 to 3) into one file per parameter, DeepSpeed's universal checkpoint."""
    import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    with redirect_stdout(io.StringIO()):
        main(
            Namespace(
                input_folder=str(folder), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip


def load_universal(engine: Any, folder: Path, tag: str) -> None:
    """Read what ``convert_to_universal`` wrote, on any number of ranks."""
    engine._config.load_universal_checkpoint = True
    try:
        load_engine(engine, folder, tag)
    finally:
        engine._config.load_universal_checkpoint = False
