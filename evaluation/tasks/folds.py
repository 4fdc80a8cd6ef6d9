"""Which scans are fitted to and which are asked about. Nobody (no group) is ever on both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from evaluation.tasks.columns import fifths
from evaluation.tasks.tasks import Task
from infra import random_streams
from infra.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
Fold = tuple[Array, Array]  # rows to fit, rows to predict
INNER = 3


class Draw(NamedTuple):
    """A training set of ``size`` scans, and the scans of a fold that it is tested on."""

    size: int
    number: int
    train: Array
    test: Array


def make_folds(
    labels: Array, groups: Array, kind: str, count: int, seed: int, strata: Array | None = None
) -> list[Fold]:
    """``count`` folds in which no group is on both sides; classes (or fifths of a number's range) spread alike.

    ``strata`` (N,) codes are spread alike instead; of one that is too small for the folds only the class is.
    """
    plain = fifths(labels) if kind == "regression" else labels
    strata = plain if strata is None else _merged(strata, plain, count)
    smallest = np.bincount(np.unique(strata, return_inverse=True)[1]).min()
    if smallest >= count and len(np.unique(groups)) == len(groups):
        # One scan a group: the same promise, thirty times as fast.
        return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, strata))
    if smallest >= count:
        splitter: Any = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    else:
        splitter = GroupKFold(count, shuffle=True, random_state=seed)
    return list(splitter.split(labels, strata, groups))


def _merged(strata: Array, plain: Array, count: int) -> Array:
    """Strata, of which one smaller than ``count`` goes into the largest of its class."""
    classes, merged = np.unique(plain, return_inverse=True)[1], strata.copy()
    small = np.bincount(strata)[strata] < count
    for name in np.unique(classes[small]):
        merged[small & (classes == name)] = np.argmax(np.bincount(strata[classes == name]))
    return merged


def outer_folds(task: Task, count: int, seed: int, by_site: bool = False) -> list[Fold]:
    """The folds that a task is judged by: its fixed test set, its sites, or ``count`` folds of groups."""
    if task.test is not None:
        return [(np.flatnonzero(~task.test), np.flatnonzero(task.test))]
    if by_site:
        return site_folds(task, count, seed)
    return make_folds(task.labels, task.groups, task.kind, count, seed, task.strata)


def site_folds(task: Task, count: int, seed: int) -> list[Fold]:
    """Whole sites left out: each a fold of its own, or dealt to ``count`` folds where there are more.

    A group that was scanned at a site left out is not fitted to anywhere.
    """
    if task.kind == "multiclass" and task.sites is not None and len(np.unique(task.sites)) == len(task.classes):
        raise UserError(f"task {task.name}: its classes are the sites, which --leave-site-out would leave out")
    if task.sites is None or len(np.unique(task.sites)) < 2:
        raise UserError(
            f"task {task.name}: --leave-site-out needs scans of two sites or more; name their column as sites"
        )
    codes = np.unique(task.sites, return_inverse=True)[1]
    splitter = GroupKFold(min(count, codes.max() + 1), shuffle=True, random_state=seed)
    folds = []
    for fit, ask in splitter.split(task.labels, task.labels, codes):
        fit = fit[~np.isin(task.groups[fit], task.groups[ask])]
        if len(fit) < 2 or (task.kind != "regression" and len(np.unique(task.labels[fit])) < 2):
            names = ", ".join(np.unique(task.sites[ask]))
            raise UserError(f"task {task.name}: without {names} one class or none is left to fit; leave sites in")
        folds.append((fit, ask))
    return folds


def inner_folds(labels: Array, groups: Array, kind: str, seed: int, repeats: int = 1) -> list[Fold]:
    """Three folds of training scans, ``repeats`` times dealt anew; places among these scans."""
    return [fold for n in range(repeats) for fold in make_folds(labels, groups, kind, INNER, seed + 7919 * n)]


def curve_draws(task: Task, folds: list[Fold], sizes: list[int], draws: int, seed: int) -> list[Draw]:
    """``draws`` training sets of each size, dealt to the folds in turn; each is tested on its fold.

    They depend on the task, the folds and the seed alone, so that every checkpoint is judged on the same ones. A training
    set has one scan a group and the classes in the proportion of all; sizes that a fold cannot give are left out.
    """
    if task.kind != "binary":
        return []
    found: list[Draw] = []
    for size in sizes:
        for draw in range(draws):
            fit, ask = folds[draw % len(folds)]
            pool = fit[np.unique(task.groups[fit], return_index=True)[1]]
            classes = [pool[task.labels[pool] == code] for code in (0, 1)]
            counts = [round(size * len(members) / len(pool)) for members in classes]
            if size > len(pool) or min(counts) < INNER or len(np.unique(task.labels[ask])) < 2:
                found = [one for one in found if one.size != size]
                break
            # Keyed by size and number, so that asking for other sizes changes no draw.
            generator = random_streams.generator(seed, random_streams.FEW_SHOT_DRAWS, (0, 0, size, draw))
            parts = [generator.permutation(members)[:n] for members, n in zip(classes, counts, strict=True)]
            found.append(Draw(size, draw, np.concatenate(parts), ask))
    return found
