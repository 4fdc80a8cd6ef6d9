"""Stratified folds of groups: those of scikit-learn's ``StratifiedGroupKFold`` (1.8 and later), in a quarter of the time.

A nested cross-validation divides some hundred training sets for every task. scikit-learn calls NumPy a dozen times for each
group and fold; here one array holds all folds to which a group could go. K = strata, N = scans.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def stratified_group_folds(
    strata: NDArray[Any], groups: NDArray[Any], count: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return what ``StratifiedGroupKFold(count, shuffle=True, random_state=seed)`` returns for these scans.

    The groups are shuffled, and those with the most unequal strata come first. Each goes to the fold that makes the shares of
    the strata in the folds most alike, or to the smaller of two such folds.

    Args:
        strata: (N,) stratum of each scan.
        groups: (N,) group of each scan.
        count: number of folds, at most the number of groups.
        seed: of the shuffling.

    Returns:
        ``count`` pairs of positions (train, test) among the N scans, in rising order.

    Raises ValueError if there are fewer groups than folds.
    """
    stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)[1:]
    group = np.unique(groups, return_inverse=True)[1]
    scans = np.zeros((group.max() + 1, len(sizes)))  # of each group in each stratum
    if len(scans) < count:
        raise ValueError(f"{len(scans)} groups cannot be divided into {count} folds")
    np.add.at(scans, (group, stratum), 1)
    order = np.arange(len(scans))
    np.random.RandomState(seed).shuffle(order)
    order = order[np.argsort(-scans[order].std(axis=1), kind="stable")]
    filled, fold_of_group = np.zeros((count, len(sizes))), np.empty(len(scans), dtype=np.int64)
    for number in order:
        fold = _best_fold(filled, scans[number], sizes)
        filled[fold] += scans[number]
        fold_of_group[number] = fold
    fold_of_scan = fold_of_group[group]
    return [(np.flatnonzero(fold_of_scan != fold), np.flatnonzero(fold_of_scan == fold)) for fold in range(count)]


def _best_fold(filled: NDArray[np.float64], added: NDArray[np.float64], sizes: NDArray[np.int64]) -> int:
    """Return the fold in which the ``added`` scans (K,) leave the strata most evenly divided.

    ``filled`` (folds, K) are the scans that the folds have, and ``sizes`` (K,) the scans of each stratum.
    """
    count = len(filled)
    every = np.arange(count)
    tried = np.broadcast_to(filled, (count, *filled.shape)).copy()  # [i]: the folds if the scans went to fold i
    tried[every, every] += added
    tried /= sizes
    # The deviation of each stratum's share over the folds, as NumPy's std computes it.
    tried -= tried.sum(axis=1, keepdims=True) / count
    np.square(tried, out=tried)
    uneven = np.sqrt(tried.sum(axis=1) / count).mean(axis=1).tolist()
    scans = filled.sum(axis=1).tolist()
    best = 0
    for fold in range(1, count):
        # Differences of rounding count as equal, by the limits of numpy.isclose.
        equal = abs(uneven[fold] - uneven[best]) <= 1e-8 + 1e-5 * abs(uneven[best])
        if uneven[fold] < uneven[best] or (equal and scans[fold] < scans[best]):
            best = fold
    return best
