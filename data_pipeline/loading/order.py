"""Which scans each step sees: a pure function of (scans, seed, step, global batch), the same for every world size.

The order is one endless stream, the epochs' orders one after the other; in the plain order each epoch holds every scan
once (data_pipeline.loading.balance has others). Step s of global batch G takes the positions [s G, (s + 1) G) of the
stream, so no scan is ever dropped, batches are always full, and a run can go on at any step on any number of ranks: the ranks
only cut the batch between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from infra.random_streams import EPOCH_ORDER, generator

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Order(Protocol):
    """An endless stream of scans: epochs of one length, each a pure function of its number."""

    @property
    def length(self) -> int:
        """Positions in an epoch."""

    def epoch(self, number: int) -> Indices:
        """The scan numbers (length,) of an epoch."""

    def showings(self, number: int) -> Indices:
        """How often each of them (length,) was shown before: with the scan it decides what its augmentation is."""


@dataclass(frozen=True)
class EveryScan:
    """The plain order: each epoch holds every scan once, shuffled anew."""

    scans: int
    seed: int
    batch: int

    @property
    def length(self) -> int:
        """Scans."""
        return self.scans

    def epoch(self, number: int) -> Indices:
        """The permutation (scans,) of one epoch."""
        return epoch_order(self.scans, self.seed, number, self.batch)

    def showings(self, number: int) -> Indices:
        """The epoch's number, for every scan."""
        return np.full(self.scans, number, dtype=np.int64)


def batch_of(order: Order, step: int, batch: int) -> tuple[Indices, Indices]:
    """Scan numbers (batch,) of a step, and how often each was shown before (batch,): in the plain order, the epoch."""
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, places = np.divmod(positions, order.length)
    numbers, shown = np.empty(batch, dtype=np.int64), np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        numbers[here] = order.epoch(int(epoch))[places[here]]
        shown[here] = order.showings(int(epoch))[places[here]]
    return numbers, shown


def global_batch(scans: int, seed: int, step: int, batch: int) -> tuple[Indices, Indices]:
    """``batch_of`` the plain order. A batch that straddles two epochs holds no scan twice where scans >= 2 x batch."""
    return batch_of(EveryScan(scans, seed, batch), step, batch)


def replacements(order: Order, step: int, batch: int, place: int) -> Iterator[int]:
    """Scans that stand in for the one at ``place`` (0..batch-1) of a step, should it be bad; the first good one is taken.

    They are the next in order after the batch, in the epoch of its last position and round to that epoch's start, without
    the batch's own scans; place p takes every ``batch``-th from the p-th on. So the stand-ins of two places are never the
    same, none is in the batch already, and who replaces whom depends neither on the ranks nor on what else is bad. Where
    the data set is too small for that, scans of the batch itself follow.
    """
    numbers, _ = batch_of(order, step, batch)
    epoch, last = divmod((step + 1) * batch - 1, order.length)
    cycle = np.roll(order.epoch(epoch), -last - 1).tolist()
    taken = set(numbers.tolist())
    spare = [number for number in dict.fromkeys(cycle) if number not in taken]
    yield from spare[place::batch]
    yield from np.roll(numbers, -place - 1).tolist()


def rank_slice(batch: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that a rank takes; the ranks' parts cover it once, in rank order."""
    return slice(batch * rank // world_size, batch * (rank + 1) // world_size)


@lru_cache(maxsize=3)
def epoch_order(scans: int, seed: int, epoch: int, batch: int) -> Indices:
    """The permutation (scans,) of one epoch. Its first ``batch`` scans are none of the last ``batch`` of the one before.

    Those found there change places with later ones. That needs k of them, for k wrong ones; of the scans - batch later
    places batch - k hold the other last ones, and scans - 2 batch + k >= k are left: enough from scans = 2 x batch on.
    From 3 x batch on the exchange leaves the last ``batch`` places as shuffled, so no epoch needs a look at those before
    the last; below, the epochs are gone through from the first (they are short: fewer than three batches).
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


def _keep_apart(order: Indices, last: Indices, batch: int, end: int) -> None:
    """Exchange those of the first ``batch`` that are in ``last`` with others of [batch, end), in place."""
    before = np.zeros(len(order), dtype=bool)
    before[last] = True
    wrong = np.flatnonzero(before[order[:batch]])
    others = batch + np.flatnonzero(~before[order[batch:end]])[: len(wrong)]
    order[wrong], order[others] = order[others], order[wrong]


def _shuffled(scans: int, seed: int, epoch: int) -> Indices:
    return generator(seed, EPOCH_ORDER, (0, epoch, 0, 0)).permutation(scans).astype(np.int64)
