"""Which scans each step sees: a pure function of (scans, seed, step, global batch), the same for every world size.

The order is one endless stream, the epochs' permutations one after the other; each epoch holds every scan once. Step s of
global batch G takes the positions [s G, (s + 1) G) of the stream, so no scan is ever dropped, batches are always full, and
a run can go on at any step on any number of ranks: the ranks only cut the batch between them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]
_STREAM = 0x04DE4  # tells this use of the generator from others with the same seed


def global_batch(scans: int, seed: int, step: int, batch: int) -> tuple[Indices, Indices]:
    """Scan numbers (batch,) of a step, 0..scans-1, and the epoch (batch,) to which each belongs.

    A batch that straddles two epochs holds no scan twice where scans >= 3 x batch; in smaller data sets it may.
    """
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, places = np.divmod(positions, scans)
    numbers = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        numbers[here] = epoch_order(scans, seed, int(epoch), batch)[places[here]]
    return numbers, epochs


def rank_slice(batch: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that a rank takes; the ranks' parts cover it once, in rank order."""
    return slice(batch * rank // world_size, batch * (rank + 1) // world_size)


@lru_cache(maxsize=3)
def epoch_order(scans: int, seed: int, epoch: int, batch: int) -> Indices:
    """The permutation (scans,) of one epoch.

    Its first ``batch`` scans are none of the last ``batch`` of the epoch before: those found there change places with
    later ones, outside the last ``batch``, which thus stay as shuffled and need no look at earlier epochs.
    """
    order = _shuffled(scans, seed, epoch)
    if epoch > 0 and scans >= 3 * batch:
        before = np.zeros(scans, dtype=bool)
        before[_shuffled(scans, seed, epoch - 1)[-batch:]] = True
        wrong = np.flatnonzero(before[order[:batch]])
        middle = batch + np.flatnonzero(~before[order[batch:-batch]])[: len(wrong)]
        order[wrong], order[middle] = order[middle], order[wrong]
    order.setflags(write=False)
    return order


def _shuffled(scans: int, seed: int, epoch: int) -> Indices:
    bits = np.random.Philox(key=[seed, _STREAM], counter=[0, epoch, 0, 0])
    return np.random.Generator(bits).permutation(scans).astype(np.int64)
