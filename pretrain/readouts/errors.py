"""Errors of a readout on people whom it is not fitted to, over all scans, by age band and by site. n = scans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

BAND_YEARS = 10
FEWEST_IN_GROUP = 5  # people; errors of fewer could be told apart, and say little


def summarise(true: NDArray[np.float64], predicted: NDArray[np.float64], is_number: bool) -> dict[str, float]:
    """Return mae and r2 of predictions (n,), and slope and offset of the line of predicted over true values of a number."""
    error = predicted - true
    summary = {
        "mae": float(np.abs(error).mean()),
        "r2": float(1.0 - np.square(error).sum() / np.square(true - true.mean()).sum()),
    }
    if is_number:
        slope, offset = np.polyfit(true, predicted, 1)
        summary |= {"slope": float(slope), "offset": float(offset)}
    return summary


def error_rows(
    error: NDArray[np.float64], people: NDArray[np.int64], columns: Mapping[str, pd.Series[Any]]
) -> list[dict[str, Any]]:
    """Return rows of by, group, people, scans, mae and bias (mean of predicted minus true).

    Args:
        error: (n,) predicted minus true values of people who are not fitted to.
        people: (n,) participant of each scan.
        columns: ``age`` (bands of ten years) and ``site``, those that the shards have. Groups of fewer than
            ``FEWEST_IN_GROUP`` people are left out.
    """
    groups = {"all": pd.Series("all", index=range(len(error)))}
    if "age" in columns and pd.api.types.is_numeric_dtype(columns["age"]):
        groups["age"] = _bands(columns["age"])
    if "site" in columns:
        sites = columns["site"].astype("string")
        groups["site"] = sites.mask(sites.str.strip() == "")
    table = pd.DataFrame({"error": error, "person": people})
    rows = []
    for by, group in groups.items():
        for name, group_rows in table.groupby(np.asarray(group.astype(object)), sort=True):
            count = int(group_rows["person"].nunique())
            if count >= FEWEST_IN_GROUP or by == "all":
                rows.append({
                    "by": by, "group": str(name)[:1000], "people": count, "scans": len(group_rows),
                    "mae": float(group_rows["error"].abs().mean()), "bias": float(group_rows["error"].mean()),
                })  # fmt: skip
    return rows


def _bands(ages: pd.Series[Any]) -> pd.Series[Any]:
    """Return bands such as 20-29; missing ages stay missing."""
    lower = pd.Series(ages.to_numpy(dtype=np.float64, na_value=np.nan) // BAND_YEARS * BAND_YEARS)
    return lower.map(lambda age: None if not np.isfinite(age) else f"{int(age):02d}-{int(age) + BAND_YEARS - 1:02d}")
