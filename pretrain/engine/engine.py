"""DeepSpeed: process group, engine, optimisation step and checkpoint files. Only `pretrain.engine` imports deepspeed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from infra import distributed
from infra.errors import UserError
from infra.extensions import exclusive_build, hidden_compiler_checks
from infra.internals import internal, library_changed, replaced_internal, set_internal
from infra.lean_imports import is_own_process
from infra.processes.allowance import usable_cores
from infra.processes.kept_memory import keep_freed_memory
from pretrain.config import Recipe
from pretrain.engine.deepspeed_config import deepspeed_config, fit_bucket, zero_stage
from pretrain.engine.importing import import_deepspeed, import_muon_uncompiled, without_compiler
from pretrain.engine.optimizers import LayerWise, build_optimizer, parameter_groups
from pretrain.engine.partitions import deepspeed_internal, keeps_float32_copies, local_shards
from pretrain.engine.rendezvous import init_method, taken_port_is_named
from pretrain.engine.safe_load import no_code

# The loss scaler needs 24 skipped steps to come down from 2^24 to 1. More than this many in a row mean a NaN.
MAX_SKIPPED_IN_A_ROW = 30


class NotFinite(RuntimeError):
    """The loss or its gradient is NaN or infinite. The weights have not been changed by the step."""


def warm() -> None:
    """Compile DeepSpeed's CPU collectives, or load them (0.1 s), one process at a time. Does nothing on a GPU."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        with exclusive_build():
            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def start_ranks() -> torch.device:
    """Join the launcher's process group, or create one of a single rank; return this rank's device.

    Raises UserError if ``MASTER_PORT`` is taken, or if DS_ACCELERATOR names a device that this host does not have.
    """
    cuda = distributed.accelerator() == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("DS_ACCELERATOR=cuda, but torch sees no GPU on this host; unset it, or set it to cpu")
    os.environ.update(distributed.single_process_environment())
    if cuda:
        torch.cuda.set_device(distributed.local_rank())
    else:
        # The ranks of a host share its cores; by default torch would use all of them in every rank.
        local_ranks = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size()
        )
        torch.set_num_threads(max(1, usable_cores() // local_ranks))
        if is_own_process():  # it cannot be undone
            keep_freed_memory()
    warm()
    # Otherwise every rank prints that the collectives were built.
    with redirect_stdout(io.StringIO()), hidden_compiler_checks(), _no_shared_buffers(), taken_port_is_named():
        import_deepspeed().init_distributed("nccl" if cuda else "gloo", verbose=False, init_method=init_method())
    return torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")


@contextmanager
def _no_shared_buffers() -> Iterator[None]:
    """Unset LOCAL_SIZE within the block; otherwise DeepSpeed allocates 69 MB of /dev/shm per rank.

    Only its inference uses these buffers, and it never removes them: every run, killed or not, would occupy that much of
    the machine's memory until the next reboot.
    """
    size = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["LOCAL_SIZE"] = size


def stop_ranks() -> None:
    """Destroy the process group, so that ``start_ranks`` can be called again in this process.

    Raises:
        LibraryChanged: if this version of DeepSpeed keeps its communication backend elsewhere.
    """
    if torch.distributed.is_initialized():
        communication = import_deepspeed().comm.comm
        if not hasattr(communication, "cdb"):
            torch.distributed.destroy_process_group()
            raise library_changed("deepspeed", "comm.comm has no attribute 'cdb', which stop_ranks must clear")
        communication.destroy_process_group()  # also forgets DeepSpeed's subgroups
        communication.cdb = None  # with a backend, init_distributed would not create a new group


def build_engine(
    recipe: Recipe, model: nn.Module, lr_factor: Callable[[int], float], config: dict[str, Any] | None = None
) -> Any:
    """Build the DeepSpeed engine that trains ``model``.

    Args:
        recipe: the whole recipe.
        model: encoder and projector.
        lr_factor: step -> factor on the learning rate.
        config: DeepSpeed's configuration; None builds it from the recipe.

    Raises:
        UserError: if the recipe's configuration is not possible, or DeepSpeed refuses a key of ``deepspeed:``.
    """
    config = deepspeed_config(recipe, distributed.world_size()) if config is None else config
    make_contiguous(model)
    _check_fp16(recipe)
    if not recipe.encoder.options.get("compile"):
        without_compiler()
    groups = parameter_groups(model, recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, groups)
    if zero_stage(recipe) == 0:
        optimizer.register_step_pre_hook(_refuse_not_finite)  # the other stages check by themselves, see update
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    deepspeed = import_deepspeed()
    import_muon_uncompiled()
    try:
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=fit_bucket(config, recipe, sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"deepspeed: DeepSpeed refuses {key}={first['input']!r}: {first['msg']}") from None
    engine.parameter_order = [name for group in groups for name in group["names"]]
    engine.skipped_in_a_row = 0
    if keeps_float32_copies(engine):
        # When it is built, this optimiser takes a step with gradients of 0, which applies weight decay. Undo that step.
        deepspeed_internal(engine.optimizer, "refresh_fp32_params")()
        optimizer.state.clear()
    if isinstance(optimizer, LayerWise) and zero_stage(recipe) > 0:
        optimizer.set_shards(local_shards(engine), engine.parameter_order)
    return engine


def close_engine(engine: Any) -> None:
    """Free the engine, which DeepSpeed's hooks and a list of stage 3 hold. Call it before `stop_ranks`."""
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        offload = import_module("deepspeed.runtime.zero.parameter_offload")
        running, own = internal("deepspeed", offload, "FWD_MODULE_STACK"), set(engine.module.modules())
        running[:] = [module for module in running if module not in own]
        # torch 2.13 keeps a reference to a stage-3 engine after its steps, so its weights and state are freed here.
        for parameter in engine.module.parameters():
            vars(parameter).clear()
        vars(engine.optimizer).clear()
        vars(engine).clear()


def make_contiguous(model: nn.Module) -> None:
    """Give channels-last weights torch's default strides.

    DeepSpeed's first broadcast views the weights as bytes, which requires a last stride of 1. ZeRO flattens them anyway.
    """
    for p in model.parameters():
        # `contiguous` does not change the strides of a channels-last kernel of one voxel; flattening does.
        p.data = p.data.contiguous().flatten().view(p.shape)


def _check_fp16(recipe: Recipe) -> None:
    if recipe.train.precision in ("fp16", "autocast-fp16") and not _has_fp16():
        raise UserError(
            f"train.precision={recipe.train.precision} needs a GPU, or a CPU with AVX512-FP16; use fp32, bf16 or autocast"
        )


def _has_fp16() -> bool:
    return distributed.accelerator() == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _refuse_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise NotFinite on every rank, before the weights change, if the gradient of any rank is not finite. Collective."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    bad = any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if distributed.reduce_scalars([float(bad)])[0]:
        raise NotFinite("the gradient is not finite")


def encoder_state(engine: Any) -> dict[str, torch.Tensor]:
    """Return the encoder's weights and buffers in float32 on the CPU, whole on every rank under any ZeRO stage. Collective."""
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


def update(engine: Any) -> dict[str, float]:
    """Let the optimiser take a step with the gradient of ``engine.backward``; return the metrics to log. Collective.

    Returns:
        ``grad_norm``: L2 norm of the gradient before clipping. In fp16 also ``loss_scale`` and ``skipped_steps``, the number
        of steps that the loss scaler has skipped because the gradient overflowed. A skipped step has no ``grad_norm`` and
        changes no weight, but the learning-rate schedule advances.

    Raises:
        NotFinite: if the gradient is not finite for another reason than an overflow of fp16.
    """
    scale, exhausted, norm = _loss_scale(engine), _at_smallest_scale(engine), None
    if engine.zero_optimization_stage() == 0:
        # Stage 0 does not compute a norm. The gradients are already averaged over the ranks, the same on each.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        norm = norm / (scale or 1.0)
    engine.step()
    applied = bool(engine.was_step_applied())
    if engine.torch_autocast_z0_gradscaler is not None:  # torch's scaler shows a skipped step only by a smaller scale
        applied = _loss_scale(engine) >= scale
    if scale is None and not applied:  # ZeRO skips a step if the gradient is not finite on any rank
        raise NotFinite("the gradient is not finite")
    if exhausted and not applied:
        raise NotFinite("the gradient is not finite at the smallest loss scale")
    metrics = {}
    if applied:
        engine.skipped_in_a_row = 0
        metrics["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
    else:
        _count_skipped_step(engine)
    if scale is not None:
        metrics |= {"loss_scale": scale, "skipped_steps": float(engine.skipped_steps)}
    return metrics


def _loss_scale(engine: Any) -> Any:
    """Return the factor on the loss; None in precisions without loss scaling."""
    if engine.torch_autocast_z0_gradscaler is not None:
        return float(engine.torch_autocast_z0_gradscaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def _at_smallest_scale(engine: Any) -> bool:
    """Whether fp16's loss scaler would have to go below its minimum if the coming step overflowed.

    DeepSpeed then raises a bare Exception. That is switched off here, so that the step is skipped like any other.
    """
    if not engine.fp16_enabled():
        return False
    scaler = deepspeed_internal(engine.optimizer, "loss_scaler")
    if not deepspeed_internal(scaler, "dynamic"):
        return False
    set_internal("deepspeed", scaler, "raise_error_at_min_scale", False)
    scale, smallest = deepspeed_internal(scaler, "cur_scale"), deepspeed_internal(scaler, "min_scale")
    # Overflows that are tolerated before the scale is lowered: in all, and still left.
    tolerated, left = deepspeed_internal(scaler, "delayed_shift"), deepspeed_internal(scaler, "cur_hysteresis")
    return bool(scale == smallest and (tolerated == 1 or left == 1))


def _count_skipped_step(engine: Any) -> None:
    """Count a step that the loss scaler skipped; raise NotFinite after too many in a row."""
    if engine.torch_autocast_z0_gradscaler is None:
        engine.lr_scheduler.step()
    else:
        engine.skipped_steps += 1
    engine.skipped_in_a_row += 1
    if engine.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise NotFinite(
            f"the gradient was not finite in {engine.skipped_in_a_row} steps in a row, whatever the loss scale"
        )


def scaler_state(engine: Any) -> dict[str, Any] | None:
    """Return the state of autocast-fp16's loss scaler, which DeepSpeed does not save; None in other precisions."""
    scaler = engine.torch_autocast_z0_gradscaler
    return None if scaler is None else dict(scaler.state_dict())


def load_scaler_state(engine: Any, state: dict[str, Any] | None) -> None:
    """Restore what ``scaler_state`` returned."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None and state:
        scaler.load_state_dict(state)


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write DeepSpeed's files to ``folder/tag``, without its pointer ``latest`` (see pretrain.run.checkpoint). Collective.

    Raises:
        OSError: if a file of this rank could not be written. It is raised after all ranks have finished, since DeepSpeed's
            ranks wait for each other in between.
    """
    writer = deepspeed_internal(engine, "checkpoint_engine")
    write, problems = deepspeed_internal(writer, "save"), list[Exception]()

    def save_or_note(state_dict: Any, path: str) -> None:
        """Write a file; note an error instead of raising it."""
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError if the disk is full
            problems.append(error)

    # DeepSpeed would also copy its export scripts beside every checkpoint, where a full disk would raise between barriers.
    no_scripts = replaced_internal("deepspeed", engine, "_copy_recovery_script", lambda folder: None)
    with replaced_internal("deepspeed", writer, "save", save_or_note), no_scripts:
        order = {"parameter_order": engine.parameter_order}
        engine.save_checkpoint(str(folder), tag=tag, client_state=order, save_latest=False)
    if problems:
        raise OSError(str(problems[0])) from problems[0]


def load_engine(engine: Any, folder: Path, tag: str) -> None:
    """Load what ``save_engine`` wrote at the same world size and ZeRO stage; raises UserError if DeepSpeed cannot.

    Code in the files is not run: torch raises pickle.UnpicklingError. ``safe_load.find_code`` finds such files before.
    """
    with no_code():
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise UserError(
            f"checkpoint {folder / tag} could not be loaded by DeepSpeed; was it written with another number of ranks?"
        )
