"""Who was scanned how often on which scanner: the blocks of complete repeats that reliability is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError, nearest
from pretrain.weights.seen_scans import participants_of

FEWEST_PEOPLE = 5  # in a block; an intraclass correlation of fewer people says nothing
Codes = NDArray[np.int64]


class Block(NamedTuple):
    """People who all have the same k measurements: ``people`` (n,) codes, ``scans`` (n, k) positions in the design."""

    people: Codes
    scans: Codes


@dataclass(frozen=True)
class Design:
    """The N scans of the people who were scanned more than once.

    Attributes:
        rows: (N,) rows of the manifest.
        people: (N,) codes from 0.
        scanners: (N,) codes into ``scanner_names``.
        sessions: (N,) codes of a person's sessions.
        ages: (N,) in years; NaN where missing.
        scanner_names: of the codes.
        blocks: ``scanners``: people by scanners, one block for each repeat; ``repeats``: people by repeats, one block for
            each scanner. What the scans do not have is left out.
        notes: lines about people and scanners that are left out.
    """

    rows: Codes
    people: Codes
    scanners: Codes
    sessions: Codes
    ages: NDArray[np.float64]
    scanner_names: list[str]
    blocks: dict[str, list[Block]]
    notes: list[str]

    @property
    def crossed(self) -> Codes:
        """Positions of the scans of the blocks ``scanners``, ascending."""
        found = [block.scans.ravel() for block in self.blocks.get("scanners", [])]
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def describe(self) -> str:
        """Return one line about people, scans and blocks."""
        parts = [f"{len(self.rows)} scans of {len(np.unique(self.people))} people who were scanned more than once"]
        for name, blocks in self.blocks.items():
            people = len(np.unique(np.concatenate([block.people for block in blocks])))
            several = f"{blocks[0].scans.shape[1]} {name}" if name == "scanners" else "repeats on one scanner"
            parts.append(f"{people} of them with {several}")
        return ", ".join(parts)


def design_of(manifest: Manifest, *, scanner: str = "site", query: str | None = None) -> Design:
    """Find the people of the shards who were scanned more than once, and the complete blocks of their scans.

    Args:
        manifest: of the shards.
        scanner: the column that tells scanners apart.
        query: pandas query over scans.parquet that selects the scans; None: all.

    Raises:
        UserError: if a column is unknown, a scan has no scanner, or too few people were scanned more than once.
    """
    table = manifest.scans.loc[manifest.rows(query=query)]
    if scanner not in table:
        raise UserError(f"scanner={scanner!r} is not a column of the shards{nearest(scanner, map(str, table.columns))}")
    table = table.assign(
        row=table.index, person=participants_of(manifest, table.index.to_numpy()), scanner=table[scanner].astype(object)
    )
    table = table[table.groupby("person")["person"].transform("size") > 1]
    missing = table["scanner"].isna() | (table["scanner"].astype(str) == "")
    if missing.any():
        raise UserError(
            f"scanner={scanner}: {int(missing.sum())} of {len(table)} scans of repeatedly scanned people have no {scanner} "
            f"(such as {table['key'][missing].iloc[0]}); fill the column in, or leave them out with --query"
        )
    if table["person"].nunique() < FEWEST_PEOPLE:
        raise UserError(
            f"{table['person'].nunique()} people of these shards were scanned more than once; reliability needs at least "
            f"{FEWEST_PEOPLE} (yaware cohort simulate --travelling makes some)"
        )
    table = _in_order(table.assign(scanner=table["scanner"].astype(str)))
    return _design(table)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort the scans of each person and scanner by age, session and run, and number them (``repeat``, from 0)."""
    age = pd.to_numeric(table["age"], errors="coerce") if "age" in table else np.nan
    keys = [name for name in ("session", "run") if name in table]
    table = table.assign(age=age).sort_values(["person", "scanner", "age", *keys], kind="stable")
    return table.assign(repeat=table.groupby(["person", "scanner"]).cumcount()).reset_index(drop=True)


def _design(table: pd.DataFrame) -> Design:
    people, _ = pd.factorize(table["person"])
    scanners, names = pd.factorize(table["scanner"], sort=True)
    session = table["session"].astype(str) if "session" in table else table["repeat"].astype(str)
    sessions, _ = pd.factorize(table["person"] + "\n" + session)
    places = table.assign(person=people, scanner=scanners, place=np.arange(len(table)))
    across, notes = _across_scanners(places, list(names))
    blocks = {"scanners": across, "repeats": _within_scanners(places)}
    found = {name: each for name, each in blocks.items() if each}
    if not found:
        raise UserError(
            f"no {FEWEST_PEOPLE} people were scanned on the same two scanners, or twice on the same one; reliability needs "
            f"complete repeats (people by scanner: {_counts(table)})"
        )
    return Design(
        rows=table["row"].to_numpy(np.int64), people=_as_codes(people), scanners=_as_codes(scanners),
        sessions=_as_codes(sessions), ages=table["age"].to_numpy(np.float64), scanner_names=[str(name) for name in names],
        blocks=found, notes=notes,
    )  # fmt: skip


def _across_scanners(places: pd.DataFrame, names: list[str]) -> tuple[list[Block], list[str]]:
    """Return a block for each repeat of people by scanners, and notes.

    The scanners are those on which at least half of the people with several scanners were scanned. If fewer than
    ``FEWEST_PEOPLE`` have all of them, the least common is dropped until enough have; else the two that most people share.
    """
    seen = places.pivot_table(index="person", columns="scanner", values="repeat", aggfunc="size").notna()
    several = seen[seen.sum(axis=1) > 1]
    if not len(several):
        return [], []
    codes = [int(str(scanner)) for scanner in several.columns]
    chosen = [scanner for scanner in codes if several[scanner].mean() >= 0.5]
    while len(chosen) > 2 and several[chosen].all(axis=1).sum() < FEWEST_PEOPLE:
        least = min(reversed(chosen), key=lambda scanner: several[scanner].sum())
        chosen = [scanner for scanner in chosen if scanner != least]
    if len(chosen) < 2 or several[chosen].all(axis=1).sum() < FEWEST_PEOPLE:
        pairs = [(int((several[a] & several[b]).sum()), a, b) for a in codes for b in codes if a < b]
        chosen = list(max(pairs, key=lambda pair: (pair[0], -pair[1], -pair[2]))[1:])
    complete = several.index[several[chosen].all(axis=1)]
    notes = []
    if len(complete) < len(several) or len(chosen) < seen.any().sum():
        notes.append(
            f"between scanners: {len(complete)} of {len(several)} people with several scanners have all of the {len(chosen)} "
            f"that are compared ({', '.join(names[scanner] for scanner in chosen[:8])})"
        )
    blocks: list[Block] = []
    for _, scans in places[places["scanner"].isin(chosen)].groupby("repeat"):
        grid = scans.pivot(index="person", columns="scanner", values="place").reindex(columns=chosen)
        blocks += _complete(grid[grid.index.isin(complete)])
    return blocks, notes


def _within_scanners(places: pd.DataFrame) -> list[Block]:
    """Return a block of people by repeats for each scanner: as many repeats as at least half of its repeated people have."""
    blocks: list[Block] = []
    for _, scans in places.groupby("scanner"):
        grid = scans.pivot(index="person", columns="repeat", values="place")
        counts = grid.notna().sum(axis=1)
        counts = counts[counts > 1]
        if len(counts):
            repeats = max(2, int(np.floor(counts.median())))
            blocks += _complete(grid[list(range(repeats))])
    return blocks


def _complete(grid: pd.DataFrame) -> Iterable[Block]:
    """Yield the block of the people (rows) who have every measurement (columns), if there are enough."""
    grid = grid.dropna()
    if len(grid) >= FEWEST_PEOPLE:
        yield Block(_as_codes(grid.index), grid.to_numpy(np.int64))


def _as_codes(codes: Any) -> Codes:
    return np.asarray(codes, dtype=np.int64)


def _counts(table: pd.DataFrame) -> str:
    counts = table.groupby("scanner")["person"].nunique().sort_values(ascending=False)
    return ", ".join(f"{name} {count}" for name, count in counts.iloc[:8].items())
