"""Repeated and halved cross-validation, and permuted features: the folds from which statistics include the training sets.

A bootstrap over test participants takes the trained models as given. What a reader wants to know includes the choice of the
training participants, so the whole nested cross-validation is run again: with other folds (``repeat``), on the two halves
of the participants (``half``), and with the features of other participants (``permuted``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.tasks.folds import INNER_FOLDS, Fold, outer_folds
from evaluation.tasks.tasks import Task
from infra import random_streams
from infra.errors import UserError

KINDS = ("repeat", "half", "permuted")
MOST_TRIES = 20  # halvings that are drawn for one of which both halves can be cross-validated


@dataclass(frozen=True)
class Resample:
    """One more nested cross-validation of a task.

    Attributes:
        kind: ``repeat``: all scans, other folds; ``half``: the scans of half of the groups; ``permuted``: the folds of the
            first cross-validation, with the features of other groups.
        number: of the repeat, halving or permutation, from 0; repeat 0 is the first cross-validation itself.
        side: 0 or 1, the half; 0 for the other kinds.
        folds: positions of training and test scans in the task.
        seed: of the inner folds and models.
        rows: (N,) for each scan, the scan whose features it gets; None: its own.
    """

    kind: str
    number: int
    side: int
    folds: list[Fold]
    seed: int
    rows: NDArray[np.int64] | None = None


class Resampling(NamedTuple):
    """How many resamples are made: cross-validations of all scans, divisions into halves, permutations of the features."""

    repeats: int = 3
    halvings: int = 10
    permutations: int = 0


NO_RESAMPLING = Resampling(repeats=1, halvings=0)


def make_resamples(
    task: Task, folds: list[Fold], resampling: Resampling, *, count: int, seed: int, by_site: bool
) -> list[Resample]:
    """Return ``repeats`` - 1 repeats, ``halvings`` pairs of halves and ``permutations``; the first repeat is ``folds``.

    Everything depends only on the task and the seed, so resamples of equal kind, number and side are the same scans for
    every checkpoint. A task with a fixed test set or left-out sites may have fewer halvings than asked for, or none.

    Args:
        task: with N scans.
        folds: of the first cross-validation.
        resampling: how many of each.
        count: number of folds of a repeat or a half; a half with fewer groups in its smallest class uses that number.
        seed: of the evaluation.
        by_site: leave out whole sites.
    """
    made = []
    # The folds of a fixed test set are the same in every repeat, and so are folds that hold one site each.
    redrawn = task.test is None and not (by_site and task.sites is not None and len(np.unique(task.sites)) <= count)
    for number in range(1, resampling.repeats) if redrawn else ():
        new = _seed(seed, "repeat", number)
        made.append(Resample("repeat", number, 0, outer_folds(task, count, new, by_site), new))
    for number in range(resampling.halvings):
        made += _halving(task, count, seed, by_site, number)
    for number in range(resampling.permutations):
        made.append(Resample("permuted", number, 0, folds, seed, permuted_rows(task.groups, seed, number)))
    return made


def halves(task: Task, seed: int, number: int, attempt: int = 0) -> NDArray[np.int64]:
    """Return for each scan of a task in which half (0 or 1) its group is: (N,).

    Groups are dealt at random; within a class, and within a fixed test set, the halves differ by at most one group.
    Regression's labels are not balanced: the spread between halves must contain the chance of the labels.
    """
    groups, first, codes = np.unique(task.groups, return_index=True, return_inverse=True)
    strata = np.zeros(len(groups), np.int64) if task.kind == "regression" else task.labels[first].astype(np.int64)
    if task.test is not None:
        strata = 2 * strata + task.test[first]
    generator = random_streams.generator(seed, random_streams.RESAMPLES, (0, KINDS.index("half"), number, attempt))
    side = np.empty(len(groups), np.int64)
    for stratum in np.unique(strata):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        side[members] = (np.arange(len(members)) + generator.integers(2)) % 2
    return side[codes.reshape(-1)]


def permuted_rows(groups: NDArray[Any], seed: int, number: int) -> NDArray[np.int64]:
    """Return for each scan the scan whose features it gets: (N,), where groups exchange their scans.

    A group's scans get the scans of another group in their order, starting again if that group has fewer.
    """
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    order = np.argsort(codes, kind="stable")
    scans = np.bincount(codes)
    starts = np.cumsum(scans) - scans
    index = np.empty(len(codes), np.int64)  # of a scan within its group
    index[order] = np.arange(len(codes)) - starts[codes[order]]
    generator = random_streams.generator(seed, random_streams.RESAMPLES, (0, KINDS.index("permuted"), number, 0))
    donor = generator.permutation(len(scans))[codes]
    return np.asarray(order[starts[donor] + index % scans[donor]])


def _halving(task: Task, count: int, seed: int, by_site: bool, number: int) -> list[Resample]:
    """Return two resamples, the halves of one division of the groups; none if no division of MOST_TRIES has folds."""
    for attempt in range(MOST_TRIES):
        side = halves(task, seed, number, attempt)
        made = []
        for each in (0, 1):
            positions = np.flatnonzero(side == each)
            new = _seed(seed, "half", number, each)
            folds = _folds_of(task, positions, count, new, by_site)
            if folds:
                made.append(Resample("half", number, each, folds, new))
        if len(made) == 2:
            return made
    return []


def _folds_of(task: Task, positions: NDArray[np.int64], count: int, seed: int, by_site: bool) -> list[Fold]:
    """Return the folds of some scans of a task as positions in the task; none if there are too few scans for folds."""
    subset = _subset(task, positions)
    groups = len(np.unique(subset.groups))
    codes = (0, 1) if task.kind == "binary" else np.unique(subset.labels) if task.kind == "multiclass" else ()
    smallest = min((len(np.unique(subset.groups[subset.labels == code])) for code in codes), default=groups)
    if task.kind == "binary" or smallest > 1:  # a class with one group has no folds; other classes may
        groups = smallest
    if groups < 2:
        return []
    try:
        folds = outer_folds(subset, min(count, groups), seed, by_site)
    except UserError:  # too few sites in this half
        return []
    for train, test in folds:
        if task.kind != "regression" and len(np.unique(subset.labels[train])) < 2:
            return []
        if not len(test) or len(np.unique(subset.groups[train])) < INNER_FOLDS:
            return []
    return [(positions[train], positions[test]) for train, test in folds]


def _subset(task: Task, positions: NDArray[np.int64]) -> Task:
    """Return the task with some of its scans."""
    per_scan = ("rows", "labels", "groups", "participants", "strata", "sites", "test", "covariates", "confounds")
    arrays = {name: getattr(task, name) for name in per_scan}
    return replace(task, **{name: values[positions] for name, values in arrays.items() if values is not None})


def _seed(seed: int, kind: str, number: int, side: int = 0) -> int:
    """Return a seed for scikit-learn, which takes 32 bits."""
    generator = random_streams.generator(seed, random_streams.RESAMPLES, (1 << 32, KINDS.index(kind), number, side))
    return int(generator.integers(2**31))
