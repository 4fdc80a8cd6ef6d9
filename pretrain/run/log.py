"""The log of a run on rank 0: console, metrics.jsonl and MLflow."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.loading.loader import TwoViewLoader
from infra import distributed
from infra.files import write_json
from infra.machine import git_tags, memory_gb, system_metrics
from infra.progress import Progress, clock
from infra.settings import flatten, to_dict
from infra.tracking.tracker import Tracker, default_uri
from infra.watchdog.run_status import FINISHED, RUNNING, STOPPED, RunStatus
from pretrain.losses.diagnostics import Positives
from pretrain.run import folder as run_folder
from pretrain.run.newest import newest_step
from pretrain.run.plan import Plan
from pretrain.weights.readouts import Readouts

SPOOL = "mlflow-spool.jsonl"
STEPS_PER_MLFLOW_CALL = 20
STEPS_SHOWN = 20  # the console shows means of rate and stall over this many steps


class RunLog:
    """Logs a run to the console, to metrics.jsonl and to MLflow. Only rank 0 has one."""

    def __init__(self, plan: Plan, state: dict[str, Any] | None) -> None:
        recipe, self.plan = plan.recipe, plan
        output = Path(recipe.run.output)
        first = int(state["step"]) if state else 0
        tags = {"yaware.kind": "pretraining", **{f"yaware.{k}": str(v) for k, v in self._description().items()}}
        tags |= git_tags(Path(__file__).parent)
        self.tracker = Tracker.open(
            recipe.run.tracking_uri or default_uri(), recipe.run.experiment, recipe.run.name,
            run_id=run_folder.read_run(output).get("run_id"), tags=tags, spool=output / SPOOL,
        )  # fmt: skip
        run_folder.begin_run(recipe, plan.manifest, self.tracker.run_id)
        self.tracker.log_params(flatten(to_dict(recipe)))
        self.tracker.log_artifact(output / "recipe.yaml", "recipe")
        self.metrics = run_folder.MetricsFile(output / "metrics.jsonl", first)
        self.weights_sha256 = ""
        self._positives_printed = False
        self._pending: list[tuple[str, float, int]] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=STEPS_SHOWN)
        self._started = time.monotonic()
        system_metrics(output)  # CPU use is measured from here
        self._announce(state, first)
        self._first = first
        RunStatus(RUNNING, first, first, plan.total_steps).write(output)
        title = f"pretraining {recipe.run.name}"
        self.progress = Progress(plan.total_steps, "steps", title, done=first)
        self.progress.__enter__()

    def _description(self) -> dict[str, Any]:
        return run_folder.describe_run(self.plan.recipe, self.plan.manifest)

    def _announce(self, state: dict[str, Any] | None, first: int) -> None:
        recipe, plan = self.plan.recipe, self.plan
        simulated = " simulated" if self._description()["simulated"] else ""
        start = f"resuming after step {first}" if state else "starting"
        ranks = "1 rank" if distributed.world_size() == 1 else f"{distributed.world_size()} ranks"
        print(
            f"pretrain: {start}: {recipe.run.name} ({run_folder.method_of(recipe)}), {recipe.encoder.name}, "
            f"{len(plan.rows)}{simulated} scans, batch {recipe.batch.global_} over {ranks}, "
            f"{plan.total_steps} steps ({plan.total_steps / plan.steps_per_epoch:.1f} epochs), "
            f"MLflow run {self.tracker.run_id}",
            flush=True,
        )

    def step(self, step: int, metrics: dict[str, float], seconds: float, loader: TwoViewLoader) -> None:
        """Log one step that took ``seconds``. The metrics of the data loading are those of rank 0."""
        rate, stall = self.plan.recipe.batch.global_ / seconds, loader.wait_seconds / seconds
        row = {**metrics, "seconds": seconds, "wait_seconds": loader.wait_seconds, "data_stall": stall,
               "bad_scans": float(loader.bad_scans), "scans_per_second": rate, "memory_gb": memory_gb()}  # fmt: skip
        line = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.metrics.write({"step": step, "epoch": step / self.plan.steps_per_epoch, **line})
        self._note(row, step)
        if (step + 1) % STEPS_PER_MLFLOW_CALL == 0:
            self.flush()
        self._show(metrics, seconds, loader)

    def _note(self, metrics: Mapping[str, float], step: int) -> None:
        self._pending += [(name, value, step) for name, value in metrics.items() if math.isfinite(value)]

    def _show(self, metrics: dict[str, float], seconds: float, loader: TwoViewLoader) -> None:
        self._recent.append((seconds, loader.wait_seconds))
        took, waited = (sum(column) for column in zip(*self._recent, strict=True))
        rate = self.plan.recipe.batch.global_ * len(self._recent) / took
        shown: dict[str, Any] = {"scans/s": f"{rate:.3g}", "loss": metrics["loss"]}
        shown |= {name.replace("_", " "): metrics[name] for name in ("lr", "grad_norm") if name in metrics}
        shown |= {"stall": f"{100 * waited / took:.0f}%", "memory": f"{memory_gb():.1f} GB"}
        if loader.bad_scans:
            shown["bad scans"] = loader.bad_scans
        if metrics.get("skipped_steps"):
            shown["skipped"] = int(metrics["skipped_steps"])
        self.progress.advance(**shown)

    def skipped(self, step: int, message: str, count: int) -> None:
        """Print the message about a skipped step and log how many there were."""
        print(f"pretrain: {message}", flush=True)
        self._pending.append(("not_finite_steps", float(count), step))

    def epoch(self, step: int, positives: Positives) -> None:
        """Log the effective positives of an epoch; print those of the first."""
        self._note(positives.metrics(), step)
        if not self._positives_printed:
            self._positives_printed = True
            print(
                f"pretrain: effective positives per anchor: {positives.mean:.1f} of {2 * self.plan.recipe.batch.global_ - 1}; "
                f"{100 * positives.below_two:.0f}% of anchors have fewer than 2, {100 * positives.missing:.0f}% of scans a "
                "missing proxy",
                flush=True,
            )

    def checkpoint(self, step: int, folder: Path) -> None:
        """Register a finished checkpoint in MLflow as a logged model, and write the model's id beside the encoder."""
        self.flush()
        encoder = folder / "encoder"
        name = f"{self.plan.recipe.run.name}-step-{step:08d}"
        model_id = self.tracker.log_checkpoint(name, step, encoder, self.weights_sha256)
        write_json(encoder / "mlflow.json", {"model_id": model_id, "run_id": self.tracker.run_id})

    def flush(self) -> None:
        """Send the pending metrics to MLflow, with the current system metrics."""
        if self._pending:
            self._note(system_metrics(Path(self.plan.recipe.run.output)), step=self._pending[-1][2])
        self.tracker.log_metrics(self._pending)
        self._pending = []

    def monitor(self, step: int, metrics: dict[str, float], alarm: str = "") -> None:
        """Log and print the monitor's metrics. An ``alarm`` is printed too, and set as a tag of the MLflow run."""
        self._note(metrics, step)
        shown = ", ".join(f"{name.removeprefix('monitor/')} {value:.3g}" for name, value in metrics.items())
        print(f"pretrain: monitor after {step + 1} steps: {shown}", flush=True)
        if alarm:
            print(f"pretrain: ALARM after {step + 1} steps: {alarm}", flush=True)
            self.tracker.set_tags({"yaware.collapse": f"after {step + 1} steps: {alarm}"})

    def readouts(self, steps: int, fitted: Readouts) -> None:
        """Log and print the errors of the readouts on people whom they are not fitted to."""
        self._note({f"readouts/{name}_mae": readout.summary["mae"] for name, readout in fitted.readouts.items()}, steps)
        for line in fitted.lines():
            print(f"pretrain: {line}", flush=True)

    def close(self, status: str, stopped: str = "") -> None:
        """End the MLflow run and print where the results are. ``stopped``: the signal that ended the run early."""
        self.flush()
        self.progress.__exit__(None, None, None)
        self.metrics.close()
        self.tracker.end(status)
        output = Path(self.plan.recipe.run.output)
        if stopped:
            step = newest_step(output / "checkpoints") or 0
            RunStatus(STOPPED, self._first, step, self.plan.total_steps, stopped).write(output)
            print(f"pretrain: stopped by {stopped} after step {step}, saved; the same command continues", flush=True)
        if status == "FINISHED":
            RunStatus(FINISHED, self._first, self.plan.total_steps, self.plan.total_steps).write(output)
            took = clock(time.monotonic() - self._started)
            print(f"pretrain: done in {took}; checkpoints in {output}/checkpoints, losses in {output}/metrics.jsonl")
