"""Orders beside the plain one: balanced over sites, flat over age, one session per subject, or pairs of a subject's scans.

Each is a pure function of (the manifest's columns, seed, epoch), like the plain order, so dividing batches among ranks,
resuming and replacing unreadable scans work in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.loading.order import EveryScan, Order, epoch_order
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError, nearest
from infra.random_streams import BALANCED_ORDER, generator

EpochDraw = tuple[NDArray[np.int64], NDArray[np.int64]]  # scan numbers, and how often each was shown before


@dataclass(frozen=True)
class EqualGroups:
    """Gives each group (a site, a bin of ages) the same number of places in an epoch, whatever its size.

    An epoch has ceil(scans / groups) rounds. Each round shows one scan of every group, in an order of groups drawn for the
    epoch, so within an epoch every batch holds each group equally often, within one. A group goes through its own scans in
    turn, reshuffled each time, and continues where the previous epoch stopped: over a few epochs, every scan of a large
    group is shown; in a small group scans repeat within the epoch, with new augmentation. No batch holds a scan twice if
    every group has at least ceil(batch / groups) + 1 scans.

    **Effect on the positives of the loss.** Balanced by site, pairs from one site become as rare as possible (1 in
    ``groups``), so the encoder gains less from telling sites apart. The ages in a batch follow the mean of the sites' own
    distributions, so small sites with unusual ages (children, the old) add anchors with few positives. Flat over age, the
    ages in a batch spread over the whole range: an anchor of a common age has fewer positives than before, one of a rare age
    more. A Gaussian kernel of bandwidth σ over a flat range R gives weight to a share of about √(2π) σ / R of the batch; the
    mean number of positives falls, the smallest rises. If `positives/below_2` in the metrics grows, use a larger batch or
    bandwidth. Small groups repeat: a bin of 5 scans in 600 rounds shows each scan 120 times per epoch; use wider bins, or
    exclude it with a query.
    """

    groups: tuple[NDArray[np.int64], ...]
    seed: int
    batch: int
    _recent: dict[int, EpochDraw] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rounds(self) -> int:
        """Number of places that each group has in an epoch."""
        return -(-sum(map(len, self.groups)) // len(self.groups))

    @property
    def length(self) -> int:
        """Number of positions in an epoch, rounds x groups: the number of scans rounded up."""
        return self.rounds * len(self.groups)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the scan numbers (length,) of an epoch; the order of groups repeats every ``len(groups)`` positions."""
        return self._draw(number)[0]

    def times_shown(self, number: int) -> NDArray[np.int64]:
        """Return how many turns each scan's group had before, (length,); each turn shows every scan of the group once."""
        return self._draw(number)[1]

    def _draw(self, number: int) -> EpochDraw:
        if number in self._recent:
            return self._recent[number]
        group_order = _generator(self.seed, number).permutation(len(self.groups))
        width = -(-self.batch // len(self.groups)) + 1
        numbers = np.empty((self.rounds, len(self.groups)), dtype=np.int64)
        shown = np.empty_like(numbers)
        for column, group in enumerate(group_order):
            members = self.groups[group]
            places, shown[:, column] = turns(
                len(members), seed=(self.seed << 16) + int(group), epoch=number, visits=self.rounds, width=width
            )
            numbers[:, column] = members[places]
        return _remember(self._recent, number, (numbers.ravel(), shown.ravel()))


@dataclass(frozen=True)
class OneSession:
    """Shows every subject once per epoch, with one of the subject's sessions.

    Subjects are shuffled like scans in the plain order. A subject's sessions take turns, starting at a session drawn for each
    subject: over as many epochs as a subject has sessions, each is shown once.

    **Effect on the positives of the loss.** Sessions of one subject have almost the same age and the same anatomy: as a pair
    they weigh nearly 1 and are nearly as easy as two views of one scan. In this order no epoch holds such a pair, nor does a
    batch that spans two epochs if there are at least 2 x batch subjects. All positives other than a scan's own second view
    are then other people. Studies with many sessions per subject (ADNI) lose the weight that they had by counting sessions,
    and with it the ages that they contribute.
    """

    sessions: tuple[NDArray[np.int64], ...]  # scan numbers of each subject
    seed: int
    batch: int
    _recent: dict[int, EpochDraw] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Number of subjects."""
        return len(self.sessions)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the scan numbers (subjects,) of an epoch."""
        if number in self._recent:
            return self._recent[number][0]
        subjects = epoch_order(len(self.sessions), self.seed, number, self.batch)
        first = _generator(self.seed, -1).integers(0, 1 << 32, len(self.sessions))
        chosen = np.array([self.sessions[s][(int(first[s]) + number) % len(self.sessions[s])] for s in subjects])
        return _remember(self._recent, number, (chosen, self.times_shown(number)))[0]

    def times_shown(self, number: int) -> NDArray[np.int64]:
        """Return the epoch's number for every scan, (subjects,)."""
        return np.full(self.length, number, dtype=np.int64)


@dataclass(frozen=True)
class SubjectPairs:
    """Shows every scan once per epoch, two scans of one subject after each other.

    Each epoch draws the pairs anew. A subject with an odd number of scans has one left over; those of different subjects are
    put together. With an odd number of scans in all, each epoch draws one that is shown twice. Pairs begin at even positions,
    so that an even batch holds both scans of a pair.

    **Effect on the positives of the loss.** Half of a batch of B scans has another scan of the same subject, if all subjects
    have several. With ``loss.subject_positives`` these are positives of weight 1, so that the encoder learns what does not
    change from scanner to scanner and from session to session. Without it, or without ``loss.mask_subjects``, the kernel
    weighs them like any other pair of this age. A batch that spans two epochs may hold a scan twice.
    """

    sessions: tuple[NDArray[np.int64], ...]  # scan numbers of each subject
    seed: int
    _recent: dict[int, EpochDraw] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        """Number of scans, rounded up to an even number."""
        scans = sum(map(len, self.sessions))
        return scans + scans % 2

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the scan numbers (length,) of an epoch; positions 2 k and 2 k + 1 are a pair."""
        return self._draw(number)[0]

    def times_shown(self, number: int) -> NDArray[np.int64]:
        """Return twice the epoch's number for every scan, (length,), and one more where a scan is shown again."""
        return self._draw(number)[1]

    def _draw(self, number: int) -> EpochDraw:
        if number in self._recent:
            return self._recent[number]
        draws = _generator(self.seed, number)
        shuffled = [draws.permutation(scans) for scans in self.sessions]
        paired = [scans[: len(scans) // 2 * 2] for scans in shuffled]
        single = draws.permutation(np.array([scans[-1] for scans in shuffled if len(scans) % 2], dtype=np.int64))
        # Of an odd number of single scans, the last one has any other scan as its partner, which is shown again.
        others = np.concatenate([*paired, single[:-1]])
        again = draws.choice(others if len(others) else single, len(single) % 2)
        numbers = np.concatenate([*paired, single, again]).astype(np.int64)
        shown = np.full(self.length, 2 * number, dtype=np.int64)
        shown[self.length - len(again) :] += 1
        order = draws.permutation(self.length // 2)
        drawn = numbers.reshape(-1, 2)[order].ravel(), shown.reshape(-1, 2)[order].ravel()
        return _remember(self._recent, number, drawn)


def turns(members: int, *, seed: int, epoch: int, visits: int, width: int) -> EpochDraw:
    """Return which members a group shows in an epoch, and the turn in which each is shown, both (visits,).

    One turn shows all members in a shuffled order. An epoch continues where the previous one stopped. A member comes back
    only after ``width`` other visits: a group with fewer than 2 x width members keeps one order for all turns.

    Args:
        members: number of scans in the group.
        seed: of the group.
        epoch: number of the epoch.
        visits: places of the group in an epoch.
        width: the most places of the group in one batch, plus one.
    """
    numbers, places = np.divmod(np.arange(epoch * visits, (epoch + 1) * visits, dtype=np.int64), members)
    shown = np.empty(visits, dtype=np.int64)
    for turn in np.unique(numbers):
        in_turn = numbers == turn
        order = epoch_order(members, seed, 0 if members < 2 * width else int(turn), width)
        shown[in_turn] = order[places[in_turn]]
    return shown, numbers


def build_order(
    manifest: Manifest, rows: NDArray[np.int64], *, seed: int, batch: int, by: str | None = None,
    bins: float | None = None, one_session_per_subject: bool = False,
) -> Order:  # fmt: skip
    """Return the order that a recipe's ``data.balance`` section selects, over places 0..len(rows)-1 of ``rows``.

    Args:
        manifest: the data set.
        rows: row numbers of the scans to show.
        seed: of the run.
        batch: the global batch.
        by: column whose values are the groups; ``subject``, which is no column: see ``SubjectPairs``.
        bins: for a numeric column, the width of a group in the column's unit.
        one_session_per_subject: show each subject once per epoch.

    Raises:
        UserError: if the column is unknown, has missing values or is not numeric, if ``subject`` is a column, or if the
            options exclude each other.
    """
    if by is None and bins is not None:
        raise UserError(f"data.balance.bins={bins:g} needs data.balance.by, the column to divide into bins")
    if by is not None and one_session_per_subject:
        raise UserError(
            "data.balance.by and data.balance.one_session_per_subject cannot be set together: a subject's sessions may "
            "belong to different groups; keep one session with data.query instead"
        )
    if by == "subject":
        return _subject_pairs(manifest, rows, seed=seed, batch=batch, bins=bins)
    if one_session_per_subject:
        return OneSession(_grouped(manifest.subjects()[rows]), seed, batch)
    if by is None:
        return EveryScan(len(rows), seed, batch)
    return EqualGroups(_grouped(_group_codes(manifest, rows, by, bins)), seed, batch)


def _subject_pairs(
    manifest: Manifest, rows: NDArray[np.int64], *, seed: int, batch: int, bins: float | None
) -> SubjectPairs:
    if "subject" in manifest.scans.columns:
        raise UserError(
            f"data.balance.by=subject shows the scans of a participant in pairs, but {manifest.url} has a column subject too; "
            "build the shards with another name for this column"
        )
    sessions = _grouped(manifest.subjects()[rows])
    if bins is not None:
        raise UserError(f"data.balance.bins={bins:g} does not go with data.balance.by=subject; leave it out")
    if batch % 2:
        raise UserError(
            f"data.balance.by=subject shows scans in pairs; batch.global={batch} is odd, give an even number"
        )
    if max(map(len, sessions)) < 2:
        raise UserError(
            f"data.balance.by=subject: none of the {len(sessions)} participants has two scans; leave it out"
        )
    return SubjectPairs(sessions, seed)


def _group_codes(manifest: Manifest, rows: NDArray[np.int64], by: str, bins: float | None) -> Any:
    columns = [str(name) for name in manifest.scans.columns]
    if by not in columns:
        raise UserError(f"data.balance.by={by!r} is not a column of the manifest{nearest(by, columns)}")
    column = manifest.scans[by].iloc[rows]
    numeric = pd.api.types.is_numeric_dtype(column)
    missing = int((column.isna() if numeric else column.isna() | (column.astype(str) == "")).sum())
    if missing:
        raise UserError(
            f"data.balance.by={by}: {missing} of {len(rows)} scans have no {by}; exclude them with data.query, "
            f"as in --data.query='{by} == {by}'" + ("" if numeric else f' and {by} != ""')
        )
    if bins is None:
        return pd.Categorical(column).codes
    if not numeric:
        raise UserError(f"data.balance.bins={bins:g}: {by} is not a numeric column; leave bins out")
    return np.floor(column.to_numpy(dtype=np.float64) / bins).astype(np.int64)


def _grouped(codes: Any) -> tuple[NDArray[np.int64], ...]:
    """Return the places of each code, ascending; one array per code."""
    order = np.argsort(codes, kind="stable")
    edges = np.flatnonzero(np.diff(codes[order])) + 1
    return tuple(part.astype(np.int64) for part in np.split(order, edges))


def _remember(recent: dict[int, EpochDraw], number: int, drawn: EpochDraw) -> EpochDraw:
    """Keep an epoch's draw and one earlier one: a batch reads at most two epochs."""
    while len(recent) > 1:
        del recent[next(iter(recent))]
    recent[number] = drawn
    return drawn


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return generator(seed, BALANCED_ORDER, (0, epoch + 1, 0, 0))
