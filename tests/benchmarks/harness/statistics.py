"""Medians, ranges and ratios of a row's result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Rounds = Sequence[Mapping[str, Mapping[str, Any]]]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest value, and the spread: their distance relative to the median."""
    median = statistics.median(values)
    low, high = min(values), max(values)
    return {"median": median, "min": low, "max": high, "spread": (high - low) / median if median > 0 else 0.0}


def spread_of(rounds: Rounds, key: str = "cpu") -> float:
    """Return the largest spread of a number (the CPU seconds) over the sides of an attempt; 0 if nothing was measured."""
    sides: dict[str, list[float]] = {}
    for found in rounds:
        for name, result in found.items():
            sides.setdefault(name, []).append(result[key])
    return max((summary(values)["spread"] for values in sides.values()), default=0.0)


def chosen(row: Mapping[str, Any]) -> Rounds:
    """Return the rounds of the attempt that counts."""
    rounds: Rounds = row["attempts"][row["chosen"]]["rounds"]
    return rounds


def values_of(row: Mapping[str, Any] | None, side: str, key: str) -> list[float]:
    """Return a number of a side in every round of the attempt that counts; empty if the side has none."""
    found = chosen(row) if row is not None else []
    return [float(results[side][key]) for results in found if side in results and key in results[side]]


def median_of(row: Mapping[str, Any] | None, side: str, key: str) -> float | None:
    """Return the median of a number of a side, or None."""
    values = values_of(row, side, key)
    return statistics.median(values) if values else None


def ratios(row: Mapping[str, Any], side: str) -> list[float]:
    """Return ours / theirs for the row's metric in each round in which both ran."""
    first, metric = row["sides"][0]["name"], row["metric"]
    return [found[first][metric] / found[side][metric] for found in chosen(row) if {first, side} <= found.keys()]


def ratio(row: Mapping[str, Any], side: str) -> float | None:
    """Return ours / theirs for the row's metric; None for our own side, and if one of them has no result."""
    first = row["sides"][0]["name"]
    ours, theirs = median_of(row, first, row["metric"]), median_of(row, side, row["metric"])
    return None if side == first or not ours or not theirs else ours / theirs
