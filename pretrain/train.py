"""What every rank runs: ``deepspeed --num_accelerators 2 --module pretrain.train --config demo-cpu``.

Reads top to bottom: recipe, data, engine, resume, loop. Starting the same command again continues the run.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.augment import load_augmentation
from data_pipeline.loading.balance import build_order
from data_pipeline.loading.loader import TwoViewLoader
from data_pipeline.storage.manifest import Manifest, check_shards
from data_pipeline.storage.remote import Access
from infra import distributed, watchdog
from infra.errors import LoaderError, UserError
from infra.settings import to_dict
from pretrain.config import Recipe, check_world_size, load_recipe
from pretrain.encoders import check_encoder
from pretrain.engine import engine
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.ema import Average
from pretrain.engine.engine import NotFinite
from pretrain.losses.diagnostics import Positives, positive_statistics
from pretrain.losses.gather import AllGather
from pretrain.losses.proxies import proxy_columns
from pretrain.model import build_model
from pretrain.run import checkpoint
from pretrain.run import folder as run_folder
from pretrain.run.checkpoint import CheckpointFailed
from pretrain.run.log import RunLog
from pretrain.run.monitor import OnlineMonitor
from pretrain.run.online_probes import check_held_out, watched_scans
from pretrain.run.plan import Plan, total_steps
from pretrain.run.skips import Skips
from pretrain.run.step import build_loss, build_watch, loss_options, lr_factor, recipe_kernel, train_step
from pretrain.run.stop import StopRequest
from pretrain.weights import seen_scans
from pretrain.weights.write import preprocessing_of, write_encoder

# Of the views; under autocast the network's own layers shorten them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32,
          "autocast-fp16": torch.float32}  # fmt: skip
# Errors of the machine's storage, said in one line; any other OSError is a bug and shows where it came from.
OF_THE_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip


def make_plan(recipe: Recipe, world_size: int) -> Plan:
    """Check a recipe against its shards and the number of ranks; UserError for whatever cannot work."""
    check_world_size(recipe.batch.global_, world_size)
    run_folder.check_same_recipe(recipe)
    load_augmentation(recipe.augmentation)
    data = recipe.data
    manifest = Manifest.load(data.shards, Access(data.cache, data.cache_gb, data.retries, data.timeout))
    run_folder.check_same_manifest(Path(recipe.run.output), manifest)
    rows = manifest.rows(split=recipe.data.split, query=recipe.data.query)
    if distributed.local_rank() == 0:  # what one host sees, all its ranks see
        check_shards(manifest, rows)
        run_folder.check_writable(Path(recipe.run.output))
    balance = recipe.data.balance
    order = build_order(
        manifest, rows, seed=recipe.run.seed, batch=recipe.batch.global_, by=balance.by, bins=balance.bins,
        one_session_per_subject=balance.one_session_per_subject,
    )  # fmt: skip
    if order.length < recipe.batch.global_:
        raise UserError(
            f"data.split={recipe.data.split} has {order.length} scans an epoch, fewer than "
            f"batch.global={recipe.batch.global_}; lower batch.global or choose other splits"
        )
    check_held_out(recipe.monitor, manifest, rows)
    recipe_kernel(recipe, manifest, rows)
    loss_options(recipe.loss)
    check_encoder(recipe.encoder.name, recipe.encoder.options, grid=manifest.grid["shape"], training=True)
    deepspeed_config(recipe, world_size)
    plan = Plan(recipe, manifest, rows, order, total_steps(recipe, order.length))
    watched_scans(recipe.monitor, manifest, plan.steps_per_epoch, recipe.run.seed)
    return plan


def train(recipe: Recipe) -> None:
    """Pretrain from the recipe's last checkpoint to its last step. Collective: every rank calls it."""
    plan = make_plan(recipe, distributed.world_size())
    device = engine.start_ranks()
    try:
        watchdog.connect()
        watchdog.phase("the building of the engine")
        model = build_model(recipe).to(device)
        trained = engine.build_engine(
            recipe, model, lr_factor(recipe.optimizer, plan.total_steps, plan.steps_per_epoch)
        )
        watchdog.phase("the loading of the checkpoint", slow=True)
        folder = Path(recipe.run.output) / "checkpoints"
        state = checkpoint.resume(
            folder, trained, recipe.run.resume, lambda other: run_folder.check_same_network(recipe, other["recipe"])
        )
        average = None if recipe.train.ema_decay is None else Average(trained, recipe.train.ema_decay)
        if average and state:
            average.load(Path(state["folder"]))
        if distributed.is_main():
            checkpoint.clean_checkpoints(folder, recipe.checkpoint.keep)
        log = RunLog(plan, state) if distributed.is_main() else None
        try:
            stopped = loop(plan, trained, average, state, device, log)
        except BaseException:
            if log:
                log.close("FAILED")
            raise
        if log:
            log.close("KILLED" if stopped else "FINISHED", stopped)
    finally:
        engine.stop_ranks()


def loop(
    plan: Plan, trained: Any, average: Average | None, state: dict[str, Any] | None, device: torch.device,
    log: RunLog | None,
) -> str:  # fmt: skip
    """Steps from the checkpoint's ``state`` (None: a new run) to the last, with checkpoints on the way and at the end.

    Ends early, after a checkpoint, where any rank was asked to stop; the signal's name then, else an empty text.
    """
    recipe, first = plan.recipe, int(state["step"]) if state else 0
    loss, dtype = build_loss(recipe, plan.manifest, plan.rows), DTYPES[recipe.train.precision]
    if state is None and plan.total_steps == 0:
        save(plan, trained, average, 0, {}, log)
    if first >= plan.total_steps:
        return ""
    augment_on = recipe.data.device if recipe.data.device != "auto" else ("gpu" if device.type == "cuda" else "cpu")
    loader = TwoViewLoader(
        plan.manifest, rows=plan.rows, global_batch=recipe.batch.global_, rank=distributed.rank(),
        world_size=distributed.world_size(), seed=recipe.run.seed, augmentation=load_augmentation(recipe.augmentation),
        proxies=proxy_columns(recipe.loss.proxies), device=augment_on, start_step=first, workers=recipe.data.workers,
        threads=recipe.data.threads, prefetch=recipe.data.prefetch, reader=recipe.data.reader, order=plan.order,
        buffer=recipe.data.buffer, max_bad_share=recipe.data.max_bad_share,
    )  # fmt: skip
    if state and state.get("loader"):
        loader.load_state_dict(state["loader"])
    trained.train()
    watch, monitor = EpochPositives(plan), OnlineMonitor(plan, trained, average, device, dtype, augment_on)
    skips = Skips(plan, int(state.get("not_finite_steps", 0)) if state else 0)
    clock, stop = checkpoint.Clock(recipe.checkpoint.every_minutes), StopRequest()
    votes = partial(_votes, stop, clock)
    stop.listen()
    try:
        batches = iter(loader)
        for step in range(first, plan.total_steps):
            started = time.perf_counter()
            watchdog.phase(f"the loading of batch {step}")
            batch = next(batches)
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            figures, asked, due = {"loss": math.nan}, 0.0, 0.0  # of a step left out; its votes count with the next
            try:
                figures, (asked, due) = train_step(trained, loss, batch, step, dtype, recipe.batch.micro, votes)
            except NotFinite as error:
                said = skips.leave_out(trained, step, batch, error)
                if log:
                    log.skipped(step, said, skips.count)
            else:
                if average:
                    average.update(step + 1)
            watchdog.phase(f"the logging of step {step}")
            positives = watch.step(step, batch)
            if log:
                if positives:
                    log.epoch(step, positives)
                log.step(step, figures, time.perf_counter() - started, loader)
            done, last = step + 1, step + 1 == plan.total_steps or asked > 0
            best = monitor(done, log)
            if done % recipe.checkpoint.every_steps == 0 or due or last or best:
                progress = {"loader": loader.state_dict(), "not_finite_steps": skips.count}
                save(plan, trained, average, done, progress, log, best)
                clock.restart()
            watchdog.steady()
            if asked and done < plan.total_steps:
                return stop.name
        return ""
    finally:
        stop.forget()
        loader.close()


def _votes(stop: StopRequest, clock: checkpoint.Clock) -> list[float]:
    """Whether this rank was asked to stop, and whether it is time for a checkpoint."""
    return [float(stop.received is not None), float(clock.due())]


class EpochPositives:
    """How many positives an anchor effectively had, over the steps of each epoch and all ranks."""

    def __init__(self, plan: Plan) -> None:
        self._watch = build_watch(plan.recipe, plan.manifest, plan.rows)
        self._plan = plan
        self._gather = AllGather() if distributed.world_size() > 1 else None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(self, step: int, batch: dict[str, torch.Tensor]) -> Positives | None:
        """Take in a batch; the figures where it ends an epoch or the run. Collective."""
        self._seen.append((self._watch(batch), batch["proxies"]))
        scans, batch_size = self._plan.order.length, self._plan.recipe.batch.global_
        if (step + 1) * batch_size // scans == step * batch_size // scans and step + 1 < self._plan.total_steps:
            return None
        positives, proxies = zip(*self._seen, strict=True)
        self._seen = []
        return positive_statistics(positives, proxies, self._gather)


def save(
    plan: Plan, trained: Any, average: Average | None, step: int, progress: dict[str, Any], log: RunLog | None,
    best: bool = False,
) -> None:  # fmt: skip
    """Write checkpoint ``step-XXXXXXXX``, with the encoder as safetensors in it, and tell MLflow. Collective."""
    watchdog.phase(f"the writing of the checkpoint after {step} steps", slow=True)
    weights = average.state() if average else engine.encoder_state(trained)
    folder = Path(plan.recipe.run.output) / "checkpoints"

    def write_rest(temporary: Path) -> None:
        assert log is not None  # only rank 0 writes
        config = {
            **run_folder.describe_run(plan.recipe, plan.manifest),
            "encoder": {"name": plan.recipe.encoder.name, "options": plan.recipe.encoder.options},
            "feature_size": int(trained.module.encoder.feature_size),
            "ema_decay": plan.recipe.train.ema_decay,
            "step": step,
            "run_id": log.tracker.run_id,
        }
        log.weights_sha256 = write_encoder(
            temporary / "encoder", weights, config, preprocessing_of(plan.manifest), scans_seen(plan, step)
        )

    state = {**progress, "manifest_digest": plan.manifest.digest, "recipe": to_dict(plan.recipe)}
    written = checkpoint.save_checkpoint(folder, step, trained, state, write_rest)
    if log:
        log.checkpoint(step, written)
        if best:
            checkpoint.point_to_best(folder, step)
        checkpoint.clean_checkpoints(folder, plan.recipe.checkpoint.keep)


def scans_seen(plan: Plan, step: int) -> list[seen_scans.Source]:
    """What the weights after ``step`` steps were fitted to, the run's that it began from included, and chosen by."""
    recipe, manifest = plan.recipe, plan.manifest
    seen = seen_scans.seen_before(recipe.run.output, recipe.run.resume)
    if step:
        seen.append(seen_scans.source_of(manifest, plan.rows))
        watched = watched_scans(recipe.monitor, manifest, plan.steps_per_epoch, recipe.run.seed)
        if watched is not None:
            seen.append(seen_scans.source_of(manifest, watched.rows, "watched"))
    return seen


def main(arguments: Sequence[str]) -> int:
    """Parse, train, close; 2 and one line from rank 0 for what the user gave and is wrong."""
    try:
        distributed.adopt_slurm()
        recipe = load_recipe(*parse_arguments(arguments))
        with watchdog.Watchdog(recipe.train.watchdog_seconds):
            train(recipe)
    except UserError as error:
        if distributed.is_main() or isinstance(error, LoaderError):  # a rank's own data concern that rank alone
            print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2
    except (NotFinite, CheckpointFailed) as error:
        if distributed.is_main():
            print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.errno not in OF_THE_STORAGE:
            raise
        print(f"yaware: error: rank {distributed.rank()}: {error}; make room or see to the file system, then the same command "
              "continues from the last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        return 1
    return 0


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """``--config NAME`` (or ``--config=NAME``) and the overrides; the launcher's own ``--local_rank`` is dropped."""
    rest = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    for index, argument in enumerate(rest):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), rest[:index] + rest[index + 1 :]
        if argument == "--config" and index + 1 < len(rest):
            return rest[index + 1], rest[:index] + rest[index + 2 :]
    raise UserError("--config is missing; give a shipped recipe's name or a YAML file: --config demo-cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
