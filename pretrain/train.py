"""What every rank runs: ``deepspeed --num_accelerators 2 --module pretrain.train --config demo-cpu``.

Reads top to bottom: recipe, data, engine, resume, loop. Starting the same command again continues the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import load_augmentation
from data_pipeline.balance import build_order
from data_pipeline.loader import TwoViewLoader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.remote import Access
from data_pipeline.source import LoaderError
from data_pipeline.volume import PREPARED
from infra import distributed, watchdog
from infra.errors import UserError
from infra.files import write_json
from infra.progress import Progress, clock
from infra.settings import flatten, to_dict
from infra.tracking import Tracker, default_uri
from pretrain import checkpoint, engine, run_folder
from pretrain.config import Recipe, check_world_size, load_recipe
from pretrain.diagnostics import Positives, positive_figures
from pretrain.encoders import check_encoder
from pretrain.export import write_encoder
from pretrain.gather import AllGather
from pretrain.model import build_model
from pretrain.proxies import proxy_columns
from pretrain.step import build_loss, build_watch, loss_options, lr_factor, recipe_kernel, train_step

STEPS_PER_MLFLOW_CALL = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


@dataclass
class Plan:
    """What a recipe comes to on its data."""

    recipe: Recipe
    manifest: Manifest
    rows: np.ndarray[Any, np.dtype[np.int64]]
    order: Order
    total_steps: int

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps an epoch; not whole where the batch does not divide the scans."""
        return self.order.length / self.recipe.batch.global_


def make_plan(recipe: Recipe, world_size: int) -> Plan:
    """Check a recipe against its shards and the number of ranks; UserError for whatever cannot work."""
    check_world_size(recipe.batch.global_, world_size)
    run_folder.check_same_recipe(recipe)
    load_augmentation(recipe.augmentation)
    data = recipe.data
    manifest = Manifest.load(data.shards, Access(data.cache, data.cache_gb, data.retries, data.timeout))
    run_folder.check_same_manifest(Path(recipe.run.output), manifest)
    rows = manifest.rows(split=recipe.data.split, query=recipe.data.query)
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
    recipe_kernel(recipe, manifest, rows)
    loss_options(recipe.loss)
    check_encoder(recipe.encoder.name, recipe.encoder.options, grid=manifest.grid["shape"], training=True)
    engine.deepspeed_config(recipe, world_size)
    steps = recipe.train.steps
    if steps is None:
        if recipe.train.epochs is None:
            raise UserError("train.epochs and train.steps are both null; set one of them")
        steps = math.ceil(recipe.train.epochs * order.length / recipe.batch.global_)
    return Plan(recipe, manifest, rows, order, steps)


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
        watchdog.phase("the loading of the checkpoint")
        folder = Path(recipe.run.output) / "checkpoints"
        state = checkpoint.load_checkpoint(folder, trained)
        if distributed.is_main():
            checkpoint.clean_checkpoints(folder, recipe.checkpoint.keep)
        log = RunLog(plan, state) if distributed.is_main() else None
        try:
            loop(plan, trained, state, device, log)
        except BaseException:
            if log:
                log.close("FAILED")
            raise
        if log:
            log.close("FINISHED")
    finally:
        engine.stop_ranks()


def loop(plan: Plan, trained: Any, state: dict[str, Any] | None, device: torch.device, log: RunLog | None) -> None:
    """Steps from the checkpoint's ``state`` (None: a new run) to the last, with checkpoints on the way and at the end."""
    recipe, first = plan.recipe, int(state["step"]) if state else 0
    loss, dtype = build_loss(recipe, plan.manifest, plan.rows), DTYPES[recipe.train.precision]
    if state is None and plan.total_steps == 0:
        save(plan, trained, 0, {}, log)
    if first >= plan.total_steps:
        return
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
    watch = EpochPositives(plan)
    try:
        batches = iter(loader)
        for step in range(first, plan.total_steps):
            started = time.perf_counter()
            watchdog.phase(f"the loading of batch {step}")
            batch = next(batches)
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            figures = train_step(trained, loss, batch, step, dtype, recipe.batch.micro)
            watchdog.phase(f"the logging of step {step}")
            positives = watch.step(step, batch)
            if log:
                if positives:
                    log.epoch(step, positives)
                log.step(step, figures, time.perf_counter() - started, loader)
            if (step + 1) % recipe.checkpoint.every_steps == 0 or step + 1 == plan.total_steps:
                save(plan, trained, step + 1, loader.state_dict(), log)
            watchdog.steady()
    finally:
        loader.close()


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
        return positive_figures(positives, proxies, self._gather)


def save(plan: Plan, trained: Any, step: int, loader_state: dict[str, Any], log: RunLog | None) -> None:
    """Write checkpoint ``step-XXXXXXXX``, with the encoder as safetensors in it, and tell MLflow. Collective."""
    watchdog.phase(f"the writing of the checkpoint after {step} steps", slow=True)
    weights = engine.encoder_state(trained)
    folder = Path(plan.recipe.run.output) / "checkpoints"

    def write_rest(temporary: Path) -> None:
        assert log is not None  # only rank 0 writes
        config = {
            **run_folder.describe_run(plan.recipe, plan.manifest),
            "encoder": {"name": plan.recipe.encoder.name, "options": plan.recipe.encoder.options},
            "feature_size": int(trained.module.encoder.feature_size),
            "step": step,
            "run_id": log.tracker.run_id,
        }
        settings = plan.manifest.settings
        preprocessing = {
            "grid": plan.manifest.grid, "normalisation": "zscore",
            "modality": settings.get("modality"), "scaling": settings.get("scaling"),
            **{name: settings.get(name, usual) for name, usual in PREPARED.items()},
        }  # fmt: skip
        log.weights_sha256 = write_encoder(temporary / "encoder", weights, config, preprocessing)

    state = {"loader": loader_state, "manifest_digest": plan.manifest.digest, "recipe": to_dict(plan.recipe)}
    written = checkpoint.save_checkpoint(folder, step, trained, state, write_rest)
    if log:
        log.checkpoint(step, written)
        checkpoint.clean_checkpoints(folder, plan.recipe.checkpoint.keep)


class RunLog:
    """Rank 0's voice: the console, metrics.jsonl and MLflow."""

    def __init__(self, plan: Plan, state: dict[str, Any] | None) -> None:
        recipe, self.plan = plan.recipe, plan
        output = Path(recipe.run.output)
        first = int(state["step"]) if state else 0
        tags = {"yaware.kind": "pretraining", **{f"yaware.{k}": str(v) for k, v in self._description().items()}}
        self.tracker = Tracker.open(
            recipe.run.tracking_uri or default_uri(), recipe.run.experiment, recipe.run.name,
            run_id=run_folder.read_run(output).get("run_id"), tags=tags, spool=output / "mlflow-spool.jsonl",
        )  # fmt: skip
        run_folder.begin_run(recipe, plan.manifest, self.tracker.run_id)
        self.tracker.log_params(flatten(to_dict(recipe)))
        self.tracker.log_artifact(output / "recipe.yaml", "recipe")
        self.metrics = run_folder.MetricsFile(output / "metrics.jsonl", first)
        self.weights_sha256 = ""
        self._positives_said = False
        self._pending: list[tuple[str, float, int]] = []
        self._started = time.monotonic()
        self._announce(state, first)
        title = f"pretraining {recipe.run.name}"
        self.progress = Progress(plan.total_steps, "steps", title, done=first)
        self.progress.__enter__()

    def _description(self) -> dict[str, Any]:
        return run_folder.describe_run(self.plan.recipe, self.plan.manifest)

    def _announce(self, state: dict[str, Any] | None, first: int) -> None:
        recipe, plan = self.plan.recipe, self.plan
        simulated = " simulated" if self._description()["simulated"] else ""
        begun = f"resuming after step {first}" if state else "starting"
        print(
            f"pretrain: {begun}: {recipe.run.name} ({run_folder.method_of(recipe)}), {recipe.encoder.name}, "
            f"{len(plan.rows)}{simulated} scans, batch {recipe.batch.global_} over {distributed.world_size()} ranks, "
            f"{plan.total_steps} steps ({plan.total_steps / plan.steps_per_epoch:.1f} epochs), "
            f"MLflow run {self.tracker.run_id}",
            flush=True,
        )

    def step(self, step: int, figures: dict[str, float], seconds: float, loader: TwoViewLoader) -> None:
        """Log one step; what is said of data is rank 0's."""
        rate, stall = self.plan.recipe.batch.global_ / seconds, loader.wait_seconds / seconds
        row = {**figures, "seconds": seconds, "wait_seconds": loader.wait_seconds, "data_stall": stall,
               "bad_scans": float(loader.bad_scans), "scans_per_second": rate}  # fmt: skip
        self.metrics.write({"step": step, "epoch": step / self.plan.steps_per_epoch, **row})
        self._pending += [(name, value, step) for name, value in row.items() if math.isfinite(value)]
        if (step + 1) % STEPS_PER_MLFLOW_CALL == 0:
            self.flush()
        bad = {"bad scans": loader.bad_scans} if loader.bad_scans else {}
        self.progress.advance(loss=figures["loss"], stall=f"{100 * stall:.0f}%", **bad)

    def epoch(self, step: int, positives: Positives) -> None:
        """Log an epoch's effective positives, and say the first."""
        self._pending += [(name, value, step) for name, value in positives.figures().items() if math.isfinite(value)]
        if not self._positives_said:
            self._positives_said = True
            print(
                f"pretrain: effective positives per anchor: {positives.mean:.1f} of {2 * self.plan.recipe.batch.global_ - 1}; "
                f"{100 * positives.below_two:.0f}% of anchors have fewer than 2, {100 * positives.missing:.0f}% of scans a "
                "missing proxy",
                flush=True,
            )

    def checkpoint(self, step: int, folder: Path) -> None:
        """Enter a finished checkpoint in MLflow as a logged model and note its id beside the encoder."""
        self.flush()
        encoder = folder / "encoder"
        name = f"{self.plan.recipe.run.name}-step-{step:08d}"
        model_id = self.tracker.log_checkpoint(name, step, encoder, self.weights_sha256)
        write_json(encoder / "mlflow.json", {"model_id": model_id, "run_id": self.tracker.run_id})

    def flush(self) -> None:
        """Send what is pending to MLflow."""
        self.tracker.log_metrics(self._pending)
        self._pending = []

    def close(self, status: str) -> None:
        """End the MLflow run and say where everything lies."""
        self.flush()
        self.progress.__exit__(None, None, None)
        self.metrics.close()
        self.tracker.end(status)
        if status == "FINISHED":
            output = Path(self.plan.recipe.run.output)
            took = clock(time.monotonic() - self._started)
            print(f"pretrain: done in {took}; checkpoints in {output}/checkpoints, losses in {output}/metrics.jsonl")


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
