"""Orders that do not show every scan equally often: balanced over sites, flat over age, one session of each subject.

Each is a pure function of (the manifest's columns, seed, epoch), as the plain order is, so ranks, resuming and replacing
bad scans work as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.loading.order import EveryScan, Indices, Order, epoch_order
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError, nearest
from infra.random_streams import BALANCED_ORDER, generator

Drawn = tuple[Indices, Indices]


@dataclass(frozen=True)
class EqualGroups:
    """Each group (a site, a bin of ages) has the same number of places in an epoch, whatever its size.

    An epoch has ceil(scans / groups) rounds; each round shows one scan of every group, the groups in an order drawn for
    the epoch. So a batch within an epoch holds every group equally often, within one. A group goes through its own
    scans in turn, shuffled each time and going on where the epoch before stopped: in a large group every scan comes,
    over a few epochs; in a small one scans repeat within the epoch, augmented anew. No batch holds a scan twice where
    every group has at least ceil(batch / groups) + 1 scans.

    **What this does to the loss's positives.** By site: scans of one site are spread as widely as can be, so pairs of
    one site get rarer (1 in ``groups``) and the encoder gains less by telling sites apart; ages in a batch follow the
    mean of the sites' own distributions, so small sites of unusual age (children, the old) add anchors with few
    positives. Flat over age: the ages in a batch spread over the whole range, so an anchor at a common age has fewer
    positives than before and one at a rare age more (a Gaussian of bandwidth σ over a flat range R weighs a share of
    about √(2π) σ / R of the batch); the mean falls, the least rises. Where `positives/below_2` in the metrics grows,
    raise the batch or the bandwidth. Small groups repeat: a bin of 5 scans in 600 rounds shows each 120 times an epoch;
    choose wider bins, or leave it out by a query.
    """

    groups: tuple[Indices, ...]
    seed: int
    batch: int
    _last: dict[int, Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rounds(self) -> int:
        """Places of every group in an epoch."""
        return -(-sum(map(len, self.groups)) // len(self.groups))

    @property
    def length(self) -> int:
        """Positions in an epoch: rounds x groups, the number of scans rounded up."""
        return self.rounds * len(self.groups)

    def epoch(self, number: int) -> Indices:
        """The scan numbers (length,) of an epoch; its drawn order of groups repeats every ``len(groups)`` positions."""
        return self._drawn(number)[0]

    def showings(self, number: int) -> Indices:
        """The turns that a scan's group had before: in each the scan is shown once."""
        return self._drawn(number)[1]

    def _drawn(self, number: int) -> Drawn:
        if number in self._last:
            return self._last[number]
        turn = _generator(self.seed, number).permutation(len(self.groups))
        width = -(-self.batch // len(self.groups)) + 1
        numbers = np.empty((self.rounds, len(self.groups)), dtype=np.int64)
        shown = np.empty_like(numbers)
        for column, group in enumerate(turn):
            members = self.groups[group]
            places, shown[:, column] = turns(len(members), (self.seed << 16) + int(group), number, self.rounds, width)
            numbers[:, column] = members[places]
        return _keep(self._last, number, (numbers.ravel(), shown.ravel()))


@dataclass(frozen=True)
class OneSession:
    """Each epoch holds every subject once, by one of the subject's sessions.

    Subjects are shuffled as scans are in the plain order. A subject's sessions take turns, from one drawn for each subject
    on: over as many epochs as a subject has sessions, each comes once.

    **What this does to the loss's positives.** Sessions of one subject have almost the same age and the same anatomy:
    as a pair they weigh nearly 1 and are nearly as easy as two views. Here no epoch holds such a pair (nor does a batch
    that straddles two, where subjects >= 2 x batch), so all positives but a scan's own second view are other people.
    Studies with many sessions a subject (ADNI) lose the weight that they had by counting sessions, and with it the
    ages that they stand for.
    """

    sessions: tuple[Indices, ...]  # of each subject
    seed: int
    batch: int
    _last: dict[int, Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Subjects."""
        return len(self.sessions)

    def epoch(self, number: int) -> Indices:
        """The scan numbers (subjects,) of an epoch."""
        if number in self._last:
            return self._last[number][0]
        subjects = epoch_order(len(self.sessions), self.seed, number, self.batch)
        first = _generator(self.seed, -1).integers(0, 1 << 32, len(self.sessions))
        chosen = np.array([self.sessions[s][(int(first[s]) + number) % len(self.sessions[s])] for s in subjects])
        return _keep(self._last, number, (chosen, self.showings(number)))[0]

    def showings(self, number: int) -> Indices:
        """The epoch's number, for every scan."""
        return np.full(self.length, number, dtype=np.int64)


def turns(members: int, seed: int, epoch: int, visits: int, width: int) -> tuple[Indices, Indices]:
    """What a group shows in an epoch of ``visits``, going on where the epoch before stopped: members, and their turns.

    One turn goes through all members in a shuffled order. A member comes back only after ``width`` visits: where there
    are fewer than 2 x width members, all turns keep one order, in which it comes back after all others.
    """
    numbers, places = np.divmod(np.arange(epoch * visits, (epoch + 1) * visits, dtype=np.int64), members)
    shown = np.empty(visits, dtype=np.int64)
    for turn in np.unique(numbers):
        here = numbers == turn
        shown[here] = epoch_order(members, seed, 0 if members < 2 * width else int(turn), width)[places[here]]
    return shown, numbers


def build_order(
    manifest: Manifest, rows: Indices, *, seed: int, batch: int, by: str | None = None,
    bins: float | None = None, one_session_per_subject: bool = False,
) -> Order:  # fmt: skip
    """The order that a recipe's ``data.balance`` asks for, over places 0..len(rows)-1 of ``rows``.

    ``by``: a column whose values are the groups; for a column of numbers, ``bins`` is the width of a group in its unit.
    UserError for an unknown column, missing values, or wishes that contradict each other.
    """
    if by is None and bins is not None:
        raise UserError(f"data.balance.bins={bins:g} needs data.balance.by: the column to cut into bins")
    if by is not None and one_session_per_subject:
        raise UserError(
            "data.balance.by and data.balance.one_session_per_subject cannot be set together: a subject's sessions may "
            "belong to different groups; keep one session by data.query instead"
        )
    if one_session_per_subject:
        return OneSession(_grouped(manifest.subjects()[rows]), seed, batch)
    if by is None:
        return EveryScan(len(rows), seed, batch)
    return EqualGroups(_grouped(_group_codes(manifest, rows, by, bins)), seed, batch)


def _group_codes(manifest: Manifest, rows: Indices, by: str, bins: float | None) -> Any:
    columns = [str(name) for name in manifest.scans.columns]
    if by not in columns:
        raise UserError(f"data.balance.by={by!r} is no column of the manifest{nearest(by, columns)}")
    column = manifest.scans[by].iloc[rows]
    numeric = pd.api.types.is_numeric_dtype(column)
    missing = int((column.isna() if numeric else column.isna() | (column.astype(str) == "")).sum())
    if missing:
        raise UserError(
            f"data.balance.by={by}: {missing} of {len(rows)} scans have no {by}; leave them out by data.query, "
            f"as in --data.query='{by} == {by}'" + ("" if numeric else f' and {by} != ""')
        )
    if bins is None:
        return pd.Categorical(column).codes
    if not numeric:
        raise UserError(f"data.balance.bins={bins:g}: {by} is no column of numbers; leave bins out")
    return np.floor(column.to_numpy(dtype=np.float64) / bins).astype(np.int64)


def _grouped(codes: Any) -> tuple[Indices, ...]:
    """Places of equal code, one array a code, ascending."""
    order = np.argsort(codes, kind="stable")
    edges = np.flatnonzero(np.diff(codes[order])) + 1
    return tuple(part.astype(np.int64) for part in np.split(order, edges))


def _keep(last: dict[int, Drawn], number: int, drawn: Drawn) -> Drawn:
    """Remember an epoch's draw, and forget all but one before it: a batch looks at one after the other."""
    while len(last) > 1:
        del last[next(iter(last))]
    last[number] = drawn
    return drawn


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return generator(seed, BALANCED_ORDER, (0, epoch + 1, 0, 0))
