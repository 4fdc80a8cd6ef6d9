"""Group-disjoint train and test folds, and the training sets of learning curves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedKFold

from evaluation.tasks.columns import quintiles
from evaluation.tasks.group_folds import stratified_group_folds
from evaluation.tasks.tasks import Task
from infra import random_streams
from infra.errors import UserError

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # positions of the training and of the test scans in the task
INNER_FOLDS = 3


class Draw(NamedTuple):
    """One training set of a learning curve, drawn from the training scans of a fold; the fold's test scans are its test set.

    ``size`` is the number of training scans and ``number`` counts the draws of one size. ``train`` and ``test`` are
    positions in the task.
    """

    size: int
    number: int
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def make_folds(
    labels: NDArray[Any], groups: NDArray[Any], kind: str, count: int, seed: int, strata: NDArray[Any] | None = None
) -> list[Fold]:
    """Return ``count`` stratified folds in which no group is both in training and in test.

    Args:
        labels: (N,) labels.
        groups: (N,) codes of the groups, usually participants.
        kind: ``binary``, ``multiclass`` or ``regression``.
        count: number of folds.
        seed: of the shuffling.
        strata: (N,) codes to stratify by; by default the classes, or the quintiles of a regression's labels. A stratum
            with fewer than ``count`` scans joins the largest stratum of its class. If a class itself is smaller than
            that, the folds are not stratified.

    Raises ValueError if there are fewer than ``count`` groups.
    """
    classes = quintiles(labels) if kind == "regression" else labels
    strata = classes if strata is None else _merge_small_strata(strata, classes, count)
    smallest = np.bincount(np.unique(strata, return_inverse=True)[1]).min()
    if smallest >= count and len(np.unique(groups)) == len(groups):
        # With one scan per group StratifiedKFold is equivalent, and thirty times as fast.
        return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, strata))
    if smallest >= count:
        return stratified_group_folds(strata, groups, count, seed)
    return list(GroupKFold(count, shuffle=True, random_state=seed).split(labels, strata, groups))


def _merge_small_strata(strata: NDArray[Any], classes: NDArray[Any], count: int) -> NDArray[Any]:
    """Put strata with fewer than ``count`` scans into the largest stratum of their class."""
    codes, merged = np.unique(classes, return_inverse=True)[1], strata.copy()
    small = np.bincount(strata)[strata] < count
    for code in np.unique(codes[small]):
        merged[small & (codes == code)] = np.argmax(np.bincount(strata[codes == code]))
    return merged


def outer_folds(task: Task, count: int, seed: int, by_site: bool = False) -> list[Fold]:
    """Return the outer folds of a task: its fixed test set if it has one, else its sites or ``count`` stratified folds.

    Raises UserError if ``by_site`` and the sites cannot be left out (see ``site_folds``).
    """
    if task.test is not None:
        return [(np.flatnonzero(~task.test), np.flatnonzero(task.test))]
    if by_site:
        return site_folds(task, count, seed)
    return make_folds(task.labels, task.groups, task.kind, count, seed, task.strata)


def site_folds(task: Task, count: int, seed: int) -> list[Fold]:
    """Return folds that leave out whole sites: one fold per site, or ``count`` folds of several sites each.

    A participant who was scanned at a left-out site is removed from that fold's training scans at every site.

    Raises:
        UserError: if a scan has no site, the task has fewer than two sites, its classes
            are the sites, or a training set has only one class.
    """
    if task.kind == "multiclass" and task.sites is not None and len(np.unique(task.sites)) == len(task.classes):
        raise UserError(
            f"task {task.name}: its classes are the sites, so a left-out site has no training scans; run it without "
            "--leave-site-out"
        )
    if task.sites is None or len(np.unique(task.sites)) < 2:
        raise UserError(
            f"task {task.name}: --leave-site-out needs scans of two sites or more; name the column of the sites under "
            "sites in the task file"
        )
    missing = task.sites == ""
    if missing.any():
        # As a site of their own, scans of one unknown site could be in the training and in the test scans.
        raise UserError(
            f"task {task.name}: --leave-site-out: {missing.sum()} of {len(missing)} scans have no site (the first is of "
            f"{task.participants[missing][0]}); add their sites to the shards with `yaware shards annotate --replace`, or "
            "leave these scans out with a query in the task file, such as query: "
            f"{task.sites_column} == {task.sites_column} and {task.sites_column} != ''"
        )
    codes = np.unique(task.sites, return_inverse=True)[1]
    splitter = GroupKFold(min(count, codes.max() + 1), shuffle=True, random_state=seed)
    folds = []
    for train, test in splitter.split(task.labels, task.labels, codes):
        train = train[~np.isin(task.groups[train], task.groups[test])]
        if len(train) < 2 or (task.kind != "regression" and len(np.unique(task.labels[train])) < 2):
            names = ", ".join(np.unique(task.sites[test]))
            raise UserError(
                f"task {task.name}: without {names} the training scans have fewer than two classes; run it without "
                "--leave-site-out"
            )
        folds.append((train, test))
    return folds


def inner_folds(labels: NDArray[Any], groups: NDArray[Any], kind: str, seed: int, repeats: int = 1) -> list[Fold]:
    """Return three folds of n training scans for each of ``repeats`` shuffles.

    Args:
        labels: (n,) labels of the training scans.
        groups: (n,) their groups; no group is on both sides of a fold.
        kind: kind of the task, as in ``make_folds``.
        seed: of the shuffling.
        repeats: number of shuffles.

    Returns:
        3 x repeats pairs of positions (train, test) among the n scans.

    Raises ValueError if there are fewer than three groups.
    """
    return [
        fold
        for repeat in range(repeats)
        for fold in make_folds(labels, groups, kind, INNER_FOLDS, random_streams.inner_fold_seed(seed, repeat))
    ]


def curve_draws(task: Task, folds: list[Fold], sizes: list[int], draws: int, seed: int) -> list[Draw]:
    """Return the training sets of a learning curve: ``draws`` of each size, assigned to the folds in turn.

    They depend only on the task, the folds and the seed, so every checkpoint is trained on the same sets. A training set has
    one scan per group and the classes in the proportion of its fold. Sizes for which a fold has too few scans are left out;
    tasks that are not binary have no learning curve.
    """
    if task.kind != "binary":
        return []
    result: list[Draw] = []
    for size in sizes:
        for number in range(draws):
            train, test = folds[number % len(folds)]
            pool = train[np.unique(task.groups[train], return_index=True)[1]]
            classes = [pool[task.labels[pool] == code] for code in (0, 1)]
            counts = [round(size * len(members) / len(pool)) for members in classes]
            if size > len(pool) or min(counts) < INNER_FOLDS or len(np.unique(task.labels[test])) < 2:
                result = [draw for draw in result if draw.size != size]
                break
            # The generator is keyed by size and number, so a draw does not depend on which other sizes are drawn.
            generator = random_streams.generator(seed, random_streams.FEW_SHOT_DRAWS, (0, 0, size, number))
            chosen = [generator.permutation(members)[:n] for members, n in zip(classes, counts, strict=True)]
            result.append(Draw(size, number, np.concatenate(chosen), test))
    return result
