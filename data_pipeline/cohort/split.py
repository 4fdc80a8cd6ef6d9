"""Splits by participant: every scan of a person lies on one side, sites and ages are spread alike over the sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from infra.errors import UserError
from infra.random_streams import SPLITS, generator

DEFAULT_SPLITS = {"pretrain": 0.7, "monitor": 0.1, "downstream": 0.2}
HEALTHY = {
    "control", "healthy", "hc", "cn", "none", "0", "0.0", "ctrl", "nc", "normal", "healthy control", "no_known_disorder",
}  # fmt: skip
YEARS_PER_STRATUM = 10


def parse_splits(text: str) -> dict[str, float]:
    """``pretrain=.7,monitor=.1,downstream=.2`` -> shares that sum to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise UserError(f"splits={text!r}: {part!r} is not of the form name=share, as in pretrain=0.7") from None
    if abs(sum(shares.values()) - 1.0) > 1e-6 or min(shares.values()) < 0:
        raise UserError(
            f"splits={text!r}: the shares sum to {sum(shares.values()):g}; they must be positive and sum to 1"
        )
    return shares


def is_healthy(diagnosis: Any) -> bool:
    """Whether a participants.tsv diagnosis means a healthy control; a cohort without the column is all healthy."""
    return diagnosis is None or str(diagnosis).strip().lower() in HEALTHY or diagnosis != diagnosis


def assign_splits(scans: pd.DataFrame, shares: dict[str, float], seed: int, dealt: int = 0) -> pd.Series[str]:
    """The split of every scan. A ``split`` column of the participants' table is kept as it is.

    Patients go to ``downstream``. Healthy participants are dealt out by ``shares`` within strata of site and ten years of
    age: each stratum is shuffled by ``seed``, and the strata are dealt as one line, so that small ones count too. ``dealt``:
    how many people went before these, after whom the dealing goes on; one person at a time gets the shares too.
    """
    if "split" in scans.columns and scans["split"].notna().all():
        return scans["split"].astype(str)
    people = scans.drop_duplicates("participant")
    healthy = people[[is_healthy(d) for d in people.get("diagnosis", pd.Series([None] * len(people)))]]
    draws = generator(seed, SPLITS)
    shuffled = healthy.iloc[draws.permutation(len(healthy))]
    decades = (shuffled["age"] // YEARS_PER_STRATUM).fillna(-1)
    line = shuffled.assign(decade=decades).sort_values(["site", "decade"], kind="stable")["participant"].to_list()
    names, edges = list(shares), np.cumsum(list(shares.values()))
    # Golden-ratio steps through [0, 1): neighbours in the line fall into different splits, in just the wanted shares.
    positions = (draws.random() + (dealt + np.arange(len(line))) * 0.6180339887498949) % 1.0
    places = np.minimum(np.searchsorted(edges, positions, side="right"), len(names) - 1)
    chosen = {person: names[place] for person, place in zip(line, places, strict=True)}
    return scans["participant"].map(lambda person: chosen.get(person, "downstream"))
