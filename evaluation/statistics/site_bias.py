"""The bias of predicted numbers at each site, and how many true values their intervals hold before and after it is removed.

A scanner that the fit has not seen may shift all predictions of its people. An interval that is calibrated on the people of
the fit cannot know that, so the shift is estimated from healthy people of the new site and subtracted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

COLUMNS = ["site", "people", "scans", "bias", "bias_low", "bias_high", "coverage", "corrected_coverage"]


def site_bias(
    true: NDArray[Any], predicted: NDArray[Any], low: NDArray[Any], high: NDArray[Any], *, sites: NDArray[Any],
    participants: NDArray[Any],
) -> pd.DataFrame:  # fmt: skip
    """Return a row for each site, and one for ``all``, with the bias of the predictions and the coverage of their intervals.

    Args:
        true: (n,) true values of healthy people, such as ages in years. Scans without one (NaN) are left out.
        predicted: (n,) predicted values.
        low: (n,) lower limits of the intervals.
        high: (n,) upper limits.
        sites: (n,) site of each scan.
        participants: (n,) participant of each scan; all of a person's scans together count as one person.

    Returns:
        A table with these columns. ``bias``: mean over people of predicted minus true values, with its 95 % interval
        ``bias_low`` to ``bias_high`` (Student's t). ``coverage``: share of people (of their scans) whose interval holds the
        true value. ``corrected_coverage``: the same after the bias is subtracted, which for each person is that of the other
        people of the site; NaN at a site of one person. And ``site``, ``people`` and ``scans``.

    Raises:
        ValueError: if the arrays differ in length, or no true value is known.
    """
    table = pd.DataFrame({
        "true": np.asarray(true, float), "predicted": np.asarray(predicted, float), "low": np.asarray(low, float),
        "high": np.asarray(high, float), "site": np.asarray(sites), "person": np.asarray(participants),
    })  # fmt: skip
    table = table[table["true"].notna()]
    if table.empty:
        raise ValueError("no scan has a true value; the bias of a site needs some")
    table["error"] = table["predicted"] - table["true"]
    # Of a person with several scans at a site the mean error counts.
    people = table.groupby(["site", "person"], sort=True)["error"].mean()
    total, count = people.groupby("site").transform("sum"), people.groupby("site").transform("size")
    others = ((total - people) / (count - 1).where(count > 1)).rename("others").reset_index()
    table = table.merge(others, on=["site", "person"])
    table["held"] = (table["low"] <= table["true"]) & (table["true"] <= table["high"])
    moved = table["true"] + table["others"]
    table["corrected"] = ((table["low"] <= moved) & (moved <= table["high"])).astype(float).where(moved.notna())
    rows = [_row(str(site), site_rows) for site, site_rows in table.groupby("site", sort=True)]
    return pd.DataFrame([*rows, _row("all", table)], columns=COLUMNS)


def _row(site: str, scans: pd.DataFrame) -> tuple[Any, ...]:
    people = scans.groupby(["site", "person"])[["error", "held", "corrected"]].mean()
    bias, count = float(people["error"].mean()), len(people)
    half = float(t.ppf(0.975, count - 1) * people["error"].std() / np.sqrt(count)) if count > 1 else np.nan
    return (
        site, count, len(scans), bias, bias - half, bias + half, float(people["held"].mean()),
        float(people["corrected"].mean()),
    )  # fmt: skip
