"""How the scans of a task are divided for its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from evaluation.tasks.folds import Draw, Fold, curve_draws, outer_folds
from evaluation.tasks.resamples import NO_RESAMPLING, Resample, Resampling, make_resamples
from evaluation.tasks.tasks import Task


class Division(NamedTuple):
    """How a task's scans are divided, for whatever features: outer folds, training sets of the learning curve, resamples."""

    folds: list[Fold]
    draws: list[Draw]
    resamples: list[Resample]


def divide(
    task: Task, *, folds: int, sizes: Sequence[int], draws: int, seed: int, by_site: bool = False,
    resampling: Resampling = NO_RESAMPLING,
) -> Division:  # fmt: skip
    """Make the outer folds, learning-curve draws and resamples of a task.

    Args:
        task: with N scans.
        folds: number of outer folds.
        sizes: training-set sizes of the learning curve; none if empty.
        draws: training sets of each size.
        seed: of folds and draws.
        by_site: leave out whole sites.
        resampling: how many repeats, halvings and permutations a grid search runs beside.
    """
    outer = outer_folds(task, folds, seed, by_site)
    resamples = make_resamples(task, outer, resampling, count=folds, seed=seed, by_site=by_site)
    return Division(outer, curve_draws(task, outer, list(sizes), draws, seed), resamples)
