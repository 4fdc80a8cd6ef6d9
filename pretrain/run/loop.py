"""The training loop: steps, monitor, checkpoints and log from a checkpoint to the last step. Every rank runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.loader import TwoViewLoader
from infra import distributed, watchdog
from infra.lean_imports import start_collecting
from infra.settings import to_dict
from pretrain.engine import engine
from pretrain.engine.ema import Average
from pretrain.engine.engine import NotFinite
from pretrain.losses.diagnostics import Positives, positive_statistics
from pretrain.losses.gather import AllGather
from pretrain.losses.proxies import proxy_columns
from pretrain.run import checkpoint, folder
from pretrain.run.log import RunLog
from pretrain.run.monitor import OnlineMonitor
from pretrain.run.plan import Plan
from pretrain.run.skips import Skips
from pretrain.run.step import train_step
from pretrain.run.stop import StopRequest
from pretrain.weights import seen_scans
from pretrain.weights.folder import first_config
from pretrain.weights.write import preprocessing_of, write_encoder

# Input dtype; autocast casts inside the network.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32,
          "autocast-fp16": torch.float32}  # fmt: skip


class TrainingLoop:
    """Trains from a checkpoint's state to the last step. Collective: every rank runs its own.

    Args:
        plan: the checked plan.
        trained: the DeepSpeed engine.
        average: the moving average of the encoder's weights; None if the recipe asks for none.
        device: this rank's device.
        log: the run's log on rank 0, None on the other ranks.
        state: what the loaded checkpoint returned; None for a new run.
    """

    def __init__(
        self, plan: Plan, trained: Any, average: Average | None, device: torch.device, log: RunLog | None,
        state: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        recipe = plan.recipe
        self.plan, self.trained, self.average, self.device, self.log = plan, trained, average, device, log
        self.first_step = int(state["step"]) if state else 0
        self._state, self._dtype = state, DTYPES[recipe.train.precision]
        on_device = "gpu" if device.type == "cuda" else "cpu"
        self._augment_on = on_device if recipe.data.device == "auto" else recipe.data.device
        self._skips = Skips(plan, int(state.get("not_finite_steps", 0)) if state else 0)
        self._prepared: dict[str, Any] = {}
        self._stop, self._clock = StopRequest(), checkpoint.Clock(recipe.checkpoint.every_minutes)

    def run(self) -> str:
        """Train to the last step. Stops earlier, after a checkpoint, if any rank was asked to.

        Returns the name of the signal that stopped the run, or an empty string.
        """
        if self._state is None and self.plan.total_steps == 0:
            self.save(0, {})
        if self.first_step >= self.plan.total_steps:
            return ""
        loader = self._build_loader()
        self.trained.train()
        self._positives = EpochPositives(self.plan)
        self._monitor = OnlineMonitor(self.plan, self.trained, self.average, self.device, self._dtype, self._augment_on)
        self._clock.restart()
        self._stop.listen()
        start_collecting()
        try:
            batches = iter(loader)
            for step in range(self.first_step, self.plan.total_steps):
                if self._step(step, batches, loader):
                    return self._stop.name
            return ""
        finally:
            self._stop.forget()
            loader.close()

    def _build_loader(self) -> TwoViewLoader:
        plan, data, recipe = self.plan, self.plan.recipe.data, self.plan.recipe
        loader = TwoViewLoader(
            plan.manifest, rows=plan.rows, global_batch=recipe.batch.global_, rank=distributed.rank(),
            world_size=distributed.world_size(), seed=recipe.run.seed, augmentation=plan.loader_augmentation,
            proxies=proxy_columns(recipe.loss.proxies), device=self._augment_on, start_step=self.first_step,
            workers=data.workers, threads=data.threads, prefetch=data.prefetch, reader=data.reader, order=plan.order,
            buffer=data.buffer, max_bad_share=data.max_bad_share, details=plan.view_details,
        )  # fmt: skip
        if self._state and self._state.get("loader"):
            loader.load_state_dict(self._state["loader"])
        return loader

    def _step(self, step: int, batches: Iterator[dict[str, torch.Tensor]], loader: TwoViewLoader) -> bool:
        """Make one step, and the checkpoint that is due after it. Returns whether the run stops before its last step."""
        recipe, started = self.plan.recipe, time.perf_counter()
        watchdog.phase(f"the loading of batch {step}")
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
        metrics, stop_votes, save_votes = self._train(step, batch)
        watchdog.phase(f"the logging of step {step}")
        positives = self._positives.step(step, batch)
        if self.log:
            if positives:
                self.log.epoch(step, positives)
            self.log.step(step, metrics, time.perf_counter() - started, loader)
        steps_done, last = step + 1, step + 1 == self.plan.total_steps or stop_votes > 0
        best = self._monitor(steps_done, self.log)
        if steps_done % recipe.checkpoint.every_steps == 0 or save_votes or last or best:
            self.save(steps_done, {"loader": loader.state_dict(), "not_finite_steps": self._skips.count}, best)
            self._clock.restart()
        watchdog.steady()
        return stop_votes > 0 and steps_done < self.plan.total_steps

    def _train(self, step: int, batch: dict[str, torch.Tensor]) -> tuple[dict[str, float], float, float]:
        """Train on a batch, or skip it if its loss or gradient is not finite.

        Returns the metrics, and how many ranks vote to stop and to save. The votes of a skipped step count in the next.
        """
        try:
            metrics, (stop_votes, save_votes) = train_step(
                self.trained, self.plan.objective.loss, batch, step, self._dtype, self.plan.recipe.batch.micro,
                votes=self._votes, weights=self.plan.objective.weights,
            )  # fmt: skip
        except NotFinite as error:
            message = self._skips.skip(self.trained, step, batch, error)
            if self.log:
                self.log.skipped(step, message, self._skips.count)
            return {"loss": math.nan}, 0.0, 0.0
        if self.average:
            self.average.update(step + 1)
        return metrics, stop_votes, save_votes

    def _votes(self) -> list[float]:
        """Return whether this rank was asked to stop, and whether a checkpoint is due by the clock."""
        return [float(self._stop.received is not None), float(self._clock.due())]

    def save(self, step: int, progress: dict[str, Any], best: bool = False) -> None:
        """Write checkpoint ``step-XXXXXXXX`` with the encoder as safetensors, and log it to MLflow. Collective.

        Args:
            step: steps done.
            progress: what the loop needs to continue.
            best: whether the monitor found this encoder better than all before.
        """
        watchdog.phase(f"the writing of the checkpoint after {step} steps", slow=True)
        plan, checkpoints = self.plan, Path(self.plan.recipe.run.output) / "checkpoints"
        weights = self.average.state() if self.average else engine.encoder_state(self.trained)

        def write_encoder_to(temporary: Path) -> None:
            assert self.log is not None  # only rank 0 writes
            config = self._encoder_config(step, self.log.tracker.run_id)
            self.log.weights_sha256 = write_encoder(
                temporary / "encoder", weights, config, self._preprocessing(), scans_seen(plan, step)
            )

        state = {**progress, "manifest_digest": plan.manifest.digest, "recipe": to_dict(plan.recipe)}
        written = checkpoint.save_checkpoint(checkpoints, step, self.trained, state, write_encoder_to)
        if self.log:
            self.log.checkpoint(step, written)
            if best:
                checkpoint.point_to_best(checkpoints, step)
            checkpoint.clean_checkpoints(checkpoints, plan.recipe.checkpoint.keep)

    def _preprocessing(self) -> dict[str, Any]:
        """Return the content of the encoder's preprocessing.json; made once, because a few scans are read for it."""
        if not self._prepared:
            self._prepared = preprocessing_of(self.plan.manifest, self.plan.rows)
        return self._prepared

    def _encoder_config(self, step: int, run_id: str | None) -> dict[str, Any]:
        """Return the content of the encoder's config.json."""
        recipe = self.plan.recipe
        return {
            **folder.describe_run(recipe, self.plan.manifest),
            "encoder": {"name": recipe.encoder.name, "options": recipe.encoder.options},
            "feature_size": int(self.trained.module.encoder.feature_size),
            "ema_decay": recipe.train.ema_decay,
            "licences": licences_of_data(self.plan, step),
            "step": step,
            "run_id": run_id,
        }


class EpochPositives:
    """The effective number of positives per anchor, over the steps of an epoch and all ranks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._gather = AllGather() if distributed.world_size() > 1 else None
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(self, step: int, batch: dict[str, torch.Tensor]) -> Positives | None:
        """Add a batch; return the statistics if it ends an epoch or the run, else None. Collective."""
        self._steps.append((self._plan.objective.effective_positives(batch), batch["proxies"]))
        scans, batch_size = self._plan.order.length, self._plan.recipe.batch.global_
        if (step + 1) * batch_size // scans == step * batch_size // scans and step + 1 < self._plan.total_steps:
            return None
        positives, proxies = zip(*self._steps, strict=True)
        self._steps = []
        return positive_statistics(positives, proxies, self._gather)


def licences_of_data(plan: Plan, step: int) -> dict[str, list[str]]:
    """Return the licences of the data sets that the weights after ``step`` steps come from: name -> texts, empty if unknown.

    This includes the data of the run whose checkpoint this run started from.
    """
    recipe = plan.recipe
    licences: dict[str, list[str]] = {}
    if step:
        watched = [] if plan.watched is None else [plan.watched.rows]
        licences = plan.manifest.licences(np.concatenate([plan.rows, *watched]))
    earlier = first_config(recipe.run.output, recipe.run.resume)
    if earlier.get("licences") is None and earlier.get("manifest_digest", plan.manifest.digest) != plan.manifest.digest:
        # A checkpoint of an earlier version does not name its data sets.
        earlier = {"licences": {f"the data of {earlier.get('run_name')}": []}}
    for name, texts in (earlier.get("licences") or {}).items():
        licences[name] = list(dict.fromkeys([*licences.get(name, []), *texts]))
    return licences


def scans_seen(plan: Plan, step: int) -> list[seen_scans.SeenScans]:
    """Return the scans that the weights after ``step`` steps were trained on or selected by.

    This includes the scans of the run whose checkpoint this run started from.
    """
    recipe = plan.recipe
    seen = seen_scans.seen_before(recipe.run.output, recipe.run.resume)
    if step:
        seen.append(seen_scans.source_of(plan.manifest, plan.rows))
        if plan.watched is not None:
            seen.append(seen_scans.source_of(plan.manifest, plan.watched.rows, "watched"))
    return seen
