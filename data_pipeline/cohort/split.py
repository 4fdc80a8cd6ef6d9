"""Splits by participant: all scans of a participant are in one split, and sites and ages are balanced over the splits."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.cohort.cells import folded
from infra.errors import UserError
from infra.random_streams import SPLITS, generator

SPLIT = "split"  # the column in which a table may declare the splits itself
DEFAULT_SPLITS = {"pretrain": 0.7, "monitor": 0.1, "downstream": 0.2}
KNOWN_SPLITS = ("pretrain", "monitor", "downstream", "test", "train", "val")  # written in any case in a table
TRAINED = ("pretrain", "train", "monitor")  # splits that a run trains on, or chooses its checkpoint by
PATIENT_SPLIT = "downstream"
HEALTHY = {
    "control", "healthy", "hc", "cn", "none", "0", "0.0", "ctrl", "nc", "normal", "healthy control", "no_known_disorder",
}  # fmt: skip
YEARS_PER_STRATUM = 10
GOLDEN_RATIO = 0.6180339887498949


def parse_splits(text: str) -> dict[str, float]:
    """Parse ``pretrain=.7,monitor=.1,downstream=.2`` to the share of each split.

    Raises:
        UserError: the text has another form, or the shares are not positive or do not sum to 1.
    """
    shares: dict[str, float] = {}
    for pair in text.split(","):
        name, _, share = pair.partition("=")
        try:
            shares[split_name(name)] = float(share)
        except ValueError:
            raise UserError(f"splits={text!r}: {pair!r} is not of the form name=share, as in pretrain=0.7") from None
    check_shares(shares, text)
    return shares


def check_shares(shares: Mapping[str, float], given: Any) -> None:
    """Raise UserError, which shows what was ``given``, if shares are no numbers, are negative or do not sum to 1."""
    if not isinstance(shares, Mapping) or not all(
        isinstance(name, str) and isinstance(share, numbers.Real) for name, share in shares.items()
    ):
        raise UserError(f"splits={given!r} must map names to shares, as in {{'pretrain': 0.8, 'downstream': 0.2}}")
    if not shares or abs(sum(shares.values()) - 1.0) > 1e-6 or min(shares.values()) < 0:
        raise UserError(
            f"splits={given!r}: the shares sum to {sum(shares.values()):g}; they must be positive and sum to 1"
        )


def split_name(text: str) -> str:
    """The name of a split: one of ``KNOWN_SPLITS`` without regard to case, blanks and hyphens, others as written."""
    plain = folded(text)
    return plain if plain in KNOWN_SPLITS else text.strip()


def is_healthy(diagnosis: Any) -> bool:
    """Whether a diagnosis means a healthy control; a missing diagnosis does."""
    return diagnosis is None or str(diagnosis).strip().lower() in HEALTHY or diagnosis != diagnosis


def assign_splits(
    scans: pd.DataFrame, shares: dict[str, float], seed: int, already_assigned: int = 0
) -> pd.Series[str]:
    """Assign every scan to a split.

    A declared ``split`` is kept. Of the other participants, patients go to ``downstream``, and healthy ones are distributed
    by ``shares``, stratified by site and ten years of age. Each stratum is shuffled, and all strata form one sequence, so that
    small strata are balanced too.

    Args:
        scans: one row per scan, with ``participant`` (unique over data sets), ``site``, ``age``, and optionally
            ``diagnosis`` and ``split``.
        shares: the share of each split; they sum to 1.
        seed: of the shuffle.
        already_assigned: the number of healthy participants assigned before, after whom the sequence continues. Participants
            that arrive one at a time get the shares too.

    Returns:
        The name of each scan's split.

    Raises:
        UserError: a participant has scans in two declared splits.
    """
    declared: dict[str, str] = {}
    if SPLIT in scans.columns:
        declared = check_declared_splits(zip(scans["participant"], scans[SPLIT], strict=True))
    people = scans.drop_duplicates("participant")
    people = people[~people["participant"].isin(declared)]
    diagnoses = people.get("diagnosis", pd.Series([None] * len(people)))
    healthy = people[np.array([is_healthy(diagnosis) for diagnosis in diagnoses], dtype=bool)]
    draws = generator(seed, SPLITS)
    shuffled = healthy.iloc[draws.permutation(len(healthy))]
    decades = (shuffled["age"] // YEARS_PER_STRATUM).fillna(-1)
    sequence = shuffled.assign(decade=decades).sort_values(["site", "decade"], kind="stable")["participant"].to_list()
    names, edges = list(shares), np.cumsum(list(shares.values()))
    # Golden-ratio steps through [0, 1) put neighbours into different splits and yield exactly the given shares.
    positions = (draws.random() + (already_assigned + np.arange(len(sequence))) * GOLDEN_RATIO) % 1.0
    indices = np.minimum(np.searchsorted(edges, positions, side="right"), len(names) - 1)
    split_of = {participant: names[index] for participant, index in zip(sequence, indices, strict=True)}
    split_of |= declared
    return scans["participant"].map(lambda participant: split_of.get(participant, PATIENT_SPLIT))


def check_declared_splits(scans: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return the declared split of each participant of scans, given as (participant, split or missing).

    Raises:
        UserError: a participant has two, and would be trained on and tested; or two splits differ in spelling only.
    """
    declared: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for participant, split in scans:
        if split is None or split != split:
            continue
        other = spellings.setdefault(folded(str(split)), str(split))
        if other != str(split):
            raise UserError(
                f"participant {participant}: split={split!r}, but other participants have split={other!r}; write both alike"
            )
        if declared.setdefault(participant, str(split)) != str(split):
            raise UserError(
                f"participant {participant}: split is {declared[participant]!r} for one scan and {split!r} for another; "
                "all scans of a participant belong to one split"
            )
    return declared
