"""Fit the readouts of the last checkpoint at the end of a pretraining: to its training scans, calibrated on other people."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from infra import distributed, watchdog
from pretrain.losses.proxies import proxy_columns
from pretrain.readouts.add import WORK
from pretrain.readouts.calibration import most_scans
from pretrain.readouts.fit import LARGEST, Ranks, ReadoutSettings, fit_readouts
from pretrain.run.checkpoint import step_folder
from pretrain.run.log import RunLog
from pretrain.run.plan import Plan
from pretrain.weights.encoder import Encoder
from pretrain.weights.readouts import FOLDER, write_readouts

# `fit: auto`: a step passes two views forward and backward, which costs about six forward passes of a scan. Readouts need one
# of every training scan, and of every scan to calibrate on.
PASSES_PER_SHOWN_SCAN, CHEAP = 6, 0.05
# And solving takes seconds to a few minutes.
CHEAP_FEATURES = 4096


def wanted(plan: Plan) -> bool:
    """Return whether the recipe asks for readouts; ``auto`` does if they cost at most 5 % of the training."""
    fit = plan.recipe.readouts.fit
    if fit != "auto":
        return bool(fit)
    shown = plan.total_steps * plan.recipe.batch.global_
    scans = len(plan.rows) + most_scans(plan.manifest, plan.calibration)
    return scans <= CHEAP * PASSES_PER_SHOWN_SCAN * shown


def readouts_due(plan: Plan) -> bool:
    """Return whether a run that has all its steps still has to fit its readouts."""
    last = step_folder(Path(plan.recipe.run.output) / "checkpoints", plan.total_steps)
    return wanted(plan) and last.is_dir() and not (last / FOLDER).is_dir()


def fit_final_readouts(plan: Plan, device: torch.device, log: RunLog | None) -> None:
    """Fit the readouts of the last checkpoint, if they are due, and write them into it. Collective.

    Every rank reads the exported encoder and embeds its share of the scans. The features wait in a folder of the run,
    so that a killed fit is continued. A column that cannot be predicted is named, and is not an error.
    """
    watchdog.phase("the start of the readouts")
    (due,) = distributed.reduce_scalars([float(readouts_due(plan))], "max")
    if not due:
        return
    recipe, settings = plan.recipe, plan.recipe.readouts
    output = Path(recipe.run.output)
    last, work = step_folder(output / "checkpoints", plan.total_steps), output / WORK
    watchdog.phase("the fitting of the readouts", slow=True)
    fitted = fit_readouts(
        Encoder.from_pretrained(last), plan.manifest, plan.rows,
        ReadoutSettings(
            columns=[*proxy_columns(recipe.loss.proxies), *settings.columns], layer=settings.layer,
            pooling=tuple(settings.pooling), calibration=plan.calibration, seed=recipe.run.seed, batch_size=settings.batch,
            device=device, workers=max(1, recipe.data.workers), progress=sys.stdout if log else False,
            largest=CHEAP_FEATURES if settings.fit == "auto" else LARGEST,
        ),
        work, ranks=Ranks(distributed.rank(), distributed.world_size(), device=device), beat=watchdog.beat,
    )  # fmt: skip
    if log:
        write_readouts(last / FOLDER, fitted)
        log.readouts(plan.total_steps, fitted)
        shutil.rmtree(work, ignore_errors=True)
    distributed.reduce_scalars([0.0])  # no rank leaves before the files are written
