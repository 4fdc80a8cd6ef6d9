"""Pretraining from Python: ``pretrain(recipe)`` returns the ``Run``, whose metrics, checkpoints and encoders can be read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from infra import distributed
from infra.errors import OPTIONAL_PATH, OPTIONAL_WHOLE, PATH, Kind, UserError, check_arguments
from infra.tracking.tracker import default_uri, send_spool
from infra.watchdog.exit_note import read_notes
from pretrain.config import Recipe
from pretrain.encoders import ENCODERS
from pretrain.kernels import KERNELS
from pretrain.launch.start import JobEnd, start_recipe
from pretrain.losses.options import find_loss
from pretrain.run.checkpoint import step_folder, verify_checkpoint
from pretrain.run.final_readouts import readouts_due
from pretrain.run.folder import read_metrics
from pretrain.run.log import SPOOL
from pretrain.run.newest import newest_step
from pretrain.run.plan import Plan, make_plan
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import list_checkpoints


class PretrainingFailed(RuntimeError):
    """The ranks of a pretraining ended with an error; the text is the reason in one line."""


class Run(os.PathLike[str]):
    """A pretraining run, read from its folder; every function that takes a run's path takes a ``Run`` too.

    Args:
        folder: the run's folder (``run.output`` of its recipe).

    Raises:
        UserError: if there is no run in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_arguments(PATH, folder=folder)
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise UserError(
                f"{self.folder} is not a run: it has no recipe.yaml; give the folder of a pretraining (run.output)"
            )

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        metrics, steps = self.metrics, newest_step(self.folder / "checkpoints")
        loss = f", loss {metrics['loss'].iloc[-1]:.4g}" if len(metrics) else ""
        return f"Run({str(self.folder)!r}: {steps or 0} steps saved{loss})"

    @property
    def recipe(self) -> Recipe:
        """The complete recipe of the run."""
        return Recipe.load(self.folder / "recipe.yaml")

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per step: ``step`` (from 0), ``epoch``, ``loss``, ``lr``, ``grad_norm``, ``seconds``, ...

        They are read from metrics.jsonl in the run's folder, not from MLflow; a missing value is NaN.
        """
        rows = list(read_metrics(self.folder / "metrics.jsonl"))
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["step", "epoch", "loss", "lr"], dtype=float)

    @property
    def checkpoints(self) -> list[Path]:
        """The folders ``checkpoints/step-XXXXXXXX`` in the order of their steps; empty before the first is written."""
        try:
            return list_checkpoints(self.folder)
        except UserError:
            return []

    def encoder(self, step: int | str | None = None) -> Encoder:
        """Load the encoder of a checkpoint: of a step, of the ``"best"`` by the monitor, or of the latest (None).

        Raises UserError if the run has no such checkpoint.
        """
        check_arguments(Kind((int, str, type(None)), "a step, 'best', or None for the latest"), step=step)
        if step is None:
            return Encoder.from_pretrained(self.folder)
        checkpoints = self.folder / "checkpoints"
        folder = checkpoints / step if isinstance(step, str) else step_folder(checkpoints, step)
        if not folder.exists():
            steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in self.checkpoints) or "none"
            best = ", or 'best'" if (checkpoints / "best").is_file() else ""
            raise UserError(f"{self.folder} has no checkpoint of step {step!r}; its steps: {steps}{best}")
        return Encoder.from_pretrained(folder)

    def plot(self) -> Any:
        """Return a matplotlib figure of loss and learning rate over the steps."""
        import matplotlib.pyplot as plt

        metrics = self.metrics
        figure, (loss, rate) = plt.subplots(
            2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained"
        )
        loss.plot(metrics["step"], metrics["loss"])
        loss.set(ylabel="loss", title=self.folder.name)
        rate.plot(metrics["step"], metrics["lr"])
        rate.set(xlabel="step", ylabel="learning rate")
        plt.close(figure)  # a notebook shows the returned figure; it would show an open one a second time
        return figure


def pretrain(
    recipe: str | os.PathLike[str] | Recipe, *, ranks: int | None = None, output: str | os.PathLike[str] | None = None,
    **sections: Mapping[str, Any],
) -> Run:  # fmt: skip
    """Pretrain an encoder and return the finished run; the same call continues an unfinished one.

    One rank trains in this process: signal handlers, ``os.environ`` and the process group are as before when it returns.
    Several ranks are started as ``yaware pretrain`` starts them.

    >>> run = pretrain("demo-cpu", output="runs/small-batch", batch={"global": 16}, train={"steps": 100})

    Args:
        recipe: name of a shipped recipe, path of a YAML file, or a ``Recipe``.
        ranks: processes on this host, one per GPU; None takes the recipe's ``launch.ranks``.
        output: the run's folder; None takes the recipe's ``run.output``.
        sections: values in place of the recipe's, by section, as in ``Recipe.with_``.

    Raises:
        UserError: if the recipe, the shards or the run's folder do not fit.
        PretrainingFailed: if a rank of several failed or was lost. The text is its reason in one line.
        NotFinite, CheckpointFailed: from a single rank, see ``pretrain.train.train``.
        KeyboardInterrupt: if a signal (Ctrl-C, SIGTERM, SIGUSR1) stopped the run after a checkpoint.
    """
    chosen = _with_overrides(recipe, ranks, output, sections)
    one_rank = chosen.launch.ranks == 1
    plan = make_plan(chosen, distributed.world_size() if one_rank else chosen.launch.ranks)
    if not report_if_complete(plan):
        if one_rank:
            from pretrain.train import train

            train(plan)
        else:
            _check_entries(plan)
            _raise_if_failed(start_recipe(chosen, chosen.launch.ranks), Path(chosen.run.output))
        step = newest_step(Path(chosen.run.output) / "checkpoints") or 0
        if step < plan.total_steps:
            raise KeyboardInterrupt(f"pretraining was stopped and saved after step {step}; the same call continues it")
    return Run(chosen.run.output)


def report_if_complete(plan: Plan) -> bool:
    """Return whether a run has all its steps, an undamaged last checkpoint and its readouts; if so, print that it is complete.

    What the run could not send to MLflow is sent then. A damaged last checkpoint is made again from the one before.
    """
    recipe = plan.recipe
    checkpoints = Path(recipe.run.output) / "checkpoints"
    newest = newest_step(checkpoints)
    if newest is None or newest < plan.total_steps or verify_checkpoint(step_folder(checkpoints, newest)):
        return False
    if readouts_due(plan):
        return False
    spool = Path(recipe.run.output) / SPOOL
    if spool.exists() and send_spool(recipe.run.tracking_uri or default_uri(), spool):
        print("pretrain: sent to MLflow the metrics that had been waiting")
    print(f"pretrain: {recipe.run.name} is already complete: {plan.total_steps} steps, {checkpoints}")
    return True


def _with_overrides(
    recipe: str | os.PathLike[str] | Recipe, ranks: int | None, output: str | os.PathLike[str] | None,
    sections: Mapping[str, Mapping[str, Any]],
) -> Recipe:  # fmt: skip
    if not isinstance(recipe, Recipe):
        check_arguments(Kind((str, os.PathLike), "a recipe's name, a path or a Recipe"), recipe=recipe)
    check_arguments(OPTIONAL_WHOLE, ranks=ranks)
    check_arguments(OPTIONAL_PATH, output=output)
    check_arguments(Kind((Mapping,), "a mapping of the section's keys to values"), **{
        name: sections[name] for name in ("launch", "run") if name in sections
    })  # fmt: skip
    changes = {name: dict(values) if isinstance(values, Mapping) else values for name, values in sections.items()}
    if ranks is not None:
        changes.setdefault("launch", {})["ranks"] = ranks
    if output is not None:
        changes.setdefault("run", {})["output"] = os.fspath(output)
    base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return base.with_(**changes) if changes else base


def _check_entries(plan: Plan) -> None:
    """Raise UserError if the recipe names an entry that was assigned in this process: the ranks are other processes."""
    recipe = plan.recipe
    proxies = recipe.loss.proxies.values()
    entries: list[tuple[str, str, Any]] = [
        ("LOSSES", recipe.loss.name, find_loss(recipe.loss.name)),
        *(("KERNELS", proxy.kernel, KERNELS[proxy.kernel]) for proxy in proxies),
        ("ENCODERS", recipe.encoder.name, ENCODERS[recipe.encoder.name]),
        *(("AUGMENTATIONS", name, operator.settings) for name, operator in plan.augmentation.operators.items()),
    ]
    for table, name, entry in entries:
        module = str(getattr(entry, "__module__", None) or type(entry).__module__)
        if module.partition(".")[0] not in ("pretrain", "data_pipeline"):
            raise UserError(
                f"ranks={recipe.launch.ranks}: {table}[{name!r}] is of {module} and was assigned in this process only, so the "
                f"started ranks do not know it; use ranks=1, or add it to the package's own {table} (CONTRIBUTING.md)"
            )


def _raise_if_failed(end: JobEnd, run_folder: Path) -> None:
    if end.status == 0:
        return
    failures = [
        note.ending.removeprefix("failed: ") for note in read_notes(run_folder) if note.ending.startswith("failed: ")
    ]
    reason = end.reason or (failures[0] if failures else f"the launcher ended with status {end.status}; see its output")
    raise PretrainingFailed(reason)
