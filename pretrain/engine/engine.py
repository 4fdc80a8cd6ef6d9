"""DeepSpeed behind one door: process group, engine, its checkpoint files. The only module that imports deepspeed."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from infra import distributed
from infra.errors import UserError
from infra.extensions import exclusive_build, extensions_folder
from pretrain.config import Recipe
from pretrain.engine.deepspeed_config import deepspeed_config, zero_stage
from pretrain.engine.optimizers import LayerWise, build_optimizer, parameter_groups
from pretrain.engine.partitions import held

# More steps left out in a row than the scaler needs to come down from 2^24 to 1: not an overflow but a NaN.
LEFT_OUT = 30


# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


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
        _keep_freed_memory()
    warm()
    # Every rank would report that the collectives were built.
    with redirect_stdout(io.StringIO()), _no_shared_buffers():
        import_deepspeed().init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")


@contextmanager
def _no_shared_buffers() -> Iterator[None]:
    """Without LOCAL_SIZE, by which DeepSpeed gives every rank on a host 69 MB of /dev/shm.

    They are for its inference alone, and it never removes them: each run, killed or not, would take that much of the
    machine's memory until it is started anew.
    """
    size = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["LOCAL_SIZE"] = size


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed activations for the next step, instead of giving it back page by page.

    A step of DenseNet121 with two scans at 121 x 145 x 121 otherwise has the kernel clear ten gigabytes anew, 7.2 s in
    place of 4.2 s on two cores (tests/benchmarks/bench_training.py). A rank's memory stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc alone has it
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def stop_ranks() -> None:
    """Destroy the process group, so that ``start_ranks`` can be called again in this process.

    Raises RuntimeError if this version of DeepSpeed keeps its communication backend elsewhere.
    """
    if torch.distributed.is_initialized():
        communication = import_deepspeed().comm.comm
        if not hasattr(communication, "cdb"):
            torch.distributed.destroy_process_group()
            raise RuntimeError(
                "deepspeed.comm.comm has no `cdb` in this version of DeepSpeed; stop_ranks must clear it"
            )
        communication.destroy_process_group()  # also forgets DeepSpeed's subgroups
        communication.cdb = None  # with a backend, init_distributed would not create a new group


def build_engine(
    recipe: Recipe, model: nn.Module, lr_at: Callable[[int], float], config: dict[str, Any] | None = None
) -> Any:
    """The DeepSpeed engine of ``model``. ``lr_at(step)`` is the factor on the learning rate at a step."""
    make_contiguous(model)
    _check_fp16(recipe)
    groups = parameter_groups(model, recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, groups)
    if zero_stage(recipe) == 0:
        optimizer.register_step_pre_hook(_refuse_not_finite)  # the other stages look by themselves, see update
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_at)
    deepspeed = import_deepspeed()
    try:
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(recipe, distributed.world_size()) if config is None else deepcopy(config),
            dist_init_required=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"deepspeed: DeepSpeed refuses {key}={first['input']!r}: {first['msg']}") from None
    engine.parameter_order = [name for group in groups for name in group["names"]]
    engine.left_out_in_a_row = 0
    if hasattr(engine.optimizer, "refresh_fp32_params") and zero_stage(recipe) == 0:
        # DeepSpeed's 16-bit optimiser of stage 0 has made a step with gradients of 0 by now, weight decay and all.
        engine.optimizer.refresh_fp32_params()
        optimizer.state.clear()
    if isinstance(optimizer, LayerWise) and zero_stage(recipe) > 0:
        optimizer.learn_parts(held(engine), engine.parameter_order)
    return engine


def make_contiguous(model: nn.Module) -> None:
    """Give weights torch's usual strides, where they were channels-last.

    DeepSpeed's first broadcast sees weights as bytes, which wants a last stride of 1; ZeRO lays them flat in any case.
    """
    for p in model.parameters():
        # `contiguous` alone leaves the strides of a channels-last kernel of one voxel as they are.
        p.data = p.data.contiguous().flatten().view(p.shape)


def _check_fp16(recipe: Recipe) -> None:
    if recipe.train.precision in ("fp16", "autocast-fp16") and not _has_fp16():
        raise UserError(
            f"train.precision={recipe.train.precision} needs a GPU, or a CPU with AVX512-FP16; use fp32, bf16 or autocast"
        )


def _has_fp16() -> bool:
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _refuse_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """NotFinite on every rank before the weights change, where any rank's part of the gradient is not finite. Collective."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    bad = any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if distributed.reduce_scalars([float(bad)])[0]:
        raise NotFinite("the gradient is not finite")


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


def update(engine: Any) -> dict[str, float]:
    """Step the optimiser on the gradient that ``engine.backward`` left; what to log of it.

    ``grad_norm``: the gradient's L2 norm before clipping. In fp16 also ``loss_scale`` and ``skipped_steps``, how many steps
    the scaler has left out because their gradient overflowed; such a step has no norm and changes no weight, but the
    schedule of the learning rate goes on. Raises NotFinite where the gradient is not finite for another reason.
    """
    scale, norm = _loss_scale(engine), None
    if engine.zero_optimization_stage() == 0:
        # Stage 0 keeps no norm of its own. The gradients are averaged over the ranks by now, the same on each.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        norm = norm / (scale or 1.0)
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise NotFinite("the gradient is not finite at the smallest loss scale") from None
    applied = bool(engine.was_step_applied())
    if engine.torch_autocast_z0_gradscaler is not None:  # torch's scaler tells by its scale alone
        applied = _loss_scale(engine) >= scale
    if scale is None and not applied:  # ZeRO leaves out a step whose gradient overflowed on any rank
        raise NotFinite("the gradient is not finite")
    figures = {}
    if applied:
        engine.left_out_in_a_row = 0
        figures["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
    else:
        _left_out(engine)
    if scale is not None:
        figures |= {"loss_scale": scale, "skipped_steps": float(engine.skipped_steps)}
    return figures


def _loss_scale(engine: Any) -> Any:
    """The factor on the loss; None in precisions that need none."""
    if engine.torch_autocast_z0_gradscaler is not None:
        return float(engine.torch_autocast_z0_gradscaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def _left_out(engine: Any) -> None:
    """Count a step that the scaler left out; NotFinite where there were too many in a row."""
    if engine.torch_autocast_z0_gradscaler is None:
        engine.lr_scheduler.step()
    else:
        engine.skipped_steps += 1
    engine.left_out_in_a_row += 1
    if engine.left_out_in_a_row > LEFT_OUT:
        raise NotFinite(
            f"the gradient was not finite in {engine.left_out_in_a_row} steps in a row, whatever the loss scale"
        )


def scaler_state(engine: Any) -> dict[str, Any] | None:
    """The state of autocast-fp16's loss scaler, which DeepSpeed does not save; None for the other precisions."""
    scaler = engine.torch_autocast_z0_gradscaler
    return None if scaler is None else dict(scaler.state_dict())


def load_scaler_state(engine: Any, state: dict[str, Any] | None) -> None:
    """Go on with what ``scaler_state`` gave."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None and state:
        scaler.load_state_dict(state)


def save_engine(engine: Any, folder: Path, tag: str) -> None:
    """Write DeepSpeed's files to ``folder/tag``; its own ``latest`` is not used, see pretrain.run.checkpoint. Collective.

    OSError where a file of this rank could not be written, once all ranks are through: DeepSpeed has its ranks wait for
    each other within, so that one whose disk is full must not leave early.
    """
    writer, problems = engine.checkpoint_engine, list[Exception]()
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
            problems.append(error)

    writer.save = save
    # DeepSpeed's own export scripts, which it would copy beside the checkpoints at each, between its barriers.
    engine._copy_recovery_script = lambda folder: None
    try:
        order = {"parameter_order": engine.parameter_order}
        engine.save_checkpoint(str(folder), tag=tag, client_state=order, save_latest=False)
    finally:
        writer.save = write
    if problems:
        raise OSError(str(problems[0])) from problems[0]


def load_engine(engine: Any, folder: Path, tag: str) -> None:
    """Read what ``save_engine`` wrote, at the same world size and ZeRO stage."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise UserError(f"checkpoint {folder / tag} could not be loaded by DeepSpeed; is it of another world size?")
