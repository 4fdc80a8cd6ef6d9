"""Which scans each step sees: a pure function of (scans, seed, step, global batch), the same for every number of ranks.

The order is an endless stream: the orders of the epochs, one after the other. In the plain order each epoch holds every scan
once; ``data_pipeline.loading.balance`` has other orders. Step s with global batch G takes positions s G to (s + 1) G - 1 of
the stream. Batches are therefore always full, no scan is dropped, and a run can continue at any step on any number of ranks:
the ranks only divide the batch among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infra.random_streams import EPOCH_ORDER, generator


class Order(Protocol):
    """An endless stream of scans: epochs of equal length, each a pure function of its number."""

    @property
    def length(self) -> int:
        """Number of positions in an epoch."""

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the scan numbers (length,) of an epoch."""

    def times_shown(self, number: int) -> NDArray[np.int64]:
        """Return how often each scan of an epoch was shown before, (length,). With the scan it keys the augmentation."""


@dataclass(frozen=True)
class EveryScan:
    """The plain order: each epoch holds every scan once, reshuffled each time."""

    scans: int
    seed: int
    batch: int

    @property
    def length(self) -> int:
        """Number of scans."""
        return self.scans

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the permutation (scans,) of an epoch."""
        return epoch_order(self.scans, self.seed, number, self.batch)

    def times_shown(self, number: int) -> NDArray[np.int64]:
        """Return the epoch's number for every scan, (scans,)."""
        return np.full(self.scans, number, dtype=np.int64)


def batch_of(order: Order, step: int, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the scan numbers of a step, (batch,), and how often each was shown before, (batch,)."""
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, places = np.divmod(positions, order.length)
    numbers, shown = np.empty(batch, dtype=np.int64), np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        numbers[in_epoch] = order.epoch(int(epoch))[places[in_epoch]]
        shown[in_epoch] = order.times_shown(int(epoch))[places[in_epoch]]
    return numbers, shown


def global_batch(scans: int, seed: int, step: int, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the scan numbers (batch,) of a step in the plain order, and how often each was shown before (batch,).

    A batch that spans two epochs holds no scan twice if there are at least 2 x batch scans.
    """
    return batch_of(EveryScan(scans, seed, batch), step, batch)


def replacements(order: Order, step: int, batch: int, place: int) -> Iterator[int]:
    """Yield candidates to replace the scan at ``place`` (0..batch-1) of a step if it is unreadable, in order of preference.

    The candidates are the scans that follow the batch in the epoch of its last position, continuing at that epoch's start,
    without the batch's own scans; place p takes every ``batch``-th of them, beginning with the p-th. Two places therefore
    never get the same replacement, no replacement is in the batch already, and the choice depends neither on the number of
    ranks nor on which other scans are unreadable. If the data set is too small for that, the batch's own scans follow.
    """
    numbers, _ = batch_of(order, step, batch)
    epoch, last = divmod((step + 1) * batch - 1, order.length)
    following = np.roll(order.epoch(epoch), -last - 1).tolist()
    in_batch = set(numbers.tolist())
    spare = [number for number in dict.fromkeys(following) if number not in in_batch]
    yield from spare[place::batch]
    yield from np.roll(numbers, -place - 1).tolist()


def rank_slice(batch: int, rank: int, world_size: int) -> slice:
    """Return the part of a global batch that a rank takes; the parts cover the batch once, in rank order."""
    return slice(batch * rank // world_size, batch * (rank + 1) // world_size)


@lru_cache(maxsize=3)
def epoch_order(scans: int, seed: int, epoch: int, batch: int) -> NDArray[np.int64]:
    """Return the permutation (scans,) of an epoch; its first ``batch`` scans are not among the last ``batch`` before it.

    If k of the first ``batch`` scans are, they are exchanged with scans at later places. Of the scans - batch later places,
    batch - k hold other scans of that kind, so scans - 2 batch + k remain: enough from scans = 2 x batch on. From 3 x batch
    on, the exchange never touches the last ``batch`` places, so an epoch depends only on the one before it. Below that, all
    epochs from the first are computed, which are short: fewer than three batches.
    """
    if scans >= 3 * batch:
        order = _shuffled(scans, seed, epoch)
        if epoch > 0:
            _keep_apart(order, _shuffled(scans, seed, epoch - 1)[-batch:], batch, end=scans - batch)
    elif scans >= 2 * batch:
        order = _shuffled(scans, seed, 0)
        for number in range(1, epoch + 1):
            last, order = order[-batch:], _shuffled(scans, seed, number)
            _keep_apart(order, last, batch, end=scans)
    else:
        order = _shuffled(scans, seed, epoch)
    order.setflags(write=False)
    return order


def _keep_apart(order: NDArray[np.int64], last: NDArray[np.int64], batch: int, end: int) -> None:
    """Exchange, in place, those of the first ``batch`` scans that are in ``last`` with others of [batch, end)."""
    is_last = np.zeros(len(order), dtype=bool)
    is_last[last] = True
    repeated = np.flatnonzero(is_last[order[:batch]])
    others = batch + np.flatnonzero(~is_last[order[batch:end]])[: len(repeated)]
    order[repeated], order[others] = order[others], order[repeated]


def _shuffled(scans: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return generator(seed, EPOCH_ORDER, (0, epoch, 0, 0)).permutation(scans).astype(np.int64)
