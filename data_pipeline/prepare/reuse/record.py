"""How the training scans of an encoder were prepared: recipe, libraries, and the ranges of their figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.prepare.settings import COLUMNS, VERSION, PrepareRecipe, load_recorded
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.settings import flatten

PASSIVE = ("limits", "keep_warp")  # parts of a recipe that change no voxel of the prepared image
FIRST = ("pipeline", "version", "spacing")  # of several differences the one that is named
SLACK = 0.1  # share of the training scans' range by which a figure may lie outside
# Figures for which only one side is bad: the other one is a better registration.
LOW_ONLY, HIGH_ONLY = ("correlation", "overlap"), ("rotation",)
FEWEST = 2  # scans that have a range


def training_preparation(manifest: Manifest, rows: NDArray[np.integer[Any]] | None = None) -> dict[str, Any] | None:
    """Return how the scans ``rows`` of a manifest (None: all) were prepared; None if that is unknown or differs among them.

    Returns:
        ``recipe``: as ``settings.recorded`` gives it; ``libraries``: name -> version; ``figures``: name -> lowest and highest
        value of the scans.
    """
    parts = (manifest.settings, *manifest.settings.get("appended", []))
    table = manifest.scans if rows is None else manifest.scans.iloc[rows]
    found = []
    for name in table["dataset"].astype(str).unique():
        known = [part.get("preparations", {}) for part in parts]
        own = [
            stated.get(name) for part, stated in zip(parts, known, strict=True) if name in (*stated, part["dataset"])
        ]
        found += own or [None]
    if not found or any(one is None or difference(one["recipe"], found[0]["recipe"]) for one in found):
        return None
    libraries = {
        name: version for name, version in found[0]["libraries"].items()
        if all(one["libraries"].get(name) == version for one in found)
    }  # fmt: skip
    return {"recipe": found[0]["recipe"], "libraries": libraries, "figures": _ranges(table)}


def _ranges(table: pd.DataFrame) -> dict[str, list[float]]:
    """The lowest and highest value of each figure in a table of scans."""
    ranges = {}
    for column, (figure, _, _) in COLUMNS.items():
        if column not in table or not pd.api.types.is_numeric_dtype(table[column]):
            continue
        values = table[column].to_numpy(dtype=np.float64, na_value=np.nan)
        values = values[np.isfinite(values)]
        if len(values) >= FEWEST:
            ranges[figure] = [float(f"{value:.6g}") for value in (values.min(), values.max())]
    return ranges


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the first parameter in which two recorded recipes differ, and its values; empty if they prepare alike."""
    parts = [flatten({key: value for key, value in recipe.items() if key not in PASSIVE}) for recipe in (one, other)]
    names = [*FIRST, *sorted({*parts[0], *parts[1]})]
    for name in names:
        values = [part.get(name) for part in parts]
        if values[0] != values[1]:
            return f"{name} {values[0]!r:.80} instead of {values[1]!r:.80}"
    return ""


def recipe_of(recorded: Mapping[str, Any], source: str) -> PrepareRecipe:
    """Return the recipe that a preparation recorded.

    Raises UserError, naming ``source``, if another version of the pipelines recorded it, or if it is damaged.
    """
    if recorded.get("version") != VERSION:
        raise UserError(
            f"{source}: its training scans were prepared by version {recorded.get('version')!r:.40} of the pipelines, this "
            f"yaware has version {VERSION}; prepare the scans with the yaware that prepared the training scans"
        )
    values = {key: value for key, value in recorded.items() if key != "version"}
    return load_recorded(values, source)


def unusual(figures: Mapping[str, float], ranges: Mapping[str, list[float]]) -> str:
    """Return which figure of a scan is outside the range of the training scans; empty if none is.

    A figure may lie outside by ``SLACK`` of the range's width.
    """
    for name, (low, high) in ranges.items():
        value, slack = figures.get(name), SLACK * (high - low)
        if value is None:
            continue
        below = value < low - slack and name not in HIGH_ONLY
        above = value > high + slack and name not in LOW_ONLY
        if below or above or not math.isfinite(value):
            return f"{name} is {value:.4g}, that of training scans {low:.4g} to {high:.4g}"
    return ""
