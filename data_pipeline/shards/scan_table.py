"""The rows of ``scans.parquet``: what the manifest records of each scan."""

from __future__ import annotations

from typing import Any

import pandas as pd

from data_pipeline.cohort.cells import TEXT_COLUMNS
from data_pipeline.cohort.scan import Scan
from data_pipeline.cohort.split import assign_splits
from data_pipeline.quality.rules import COLUMNS as QUALITY_COLUMNS

LOCATION_COLUMNS = ("key", "shard", "offset", "size", "crc32c")
"""Columns that say where a scan's bytes are. A column of the participants' table with such a name is left out."""


def describe(scan: Scan) -> dict[str, Any]:
    """Return what a sample's .json and the scan table say of a scan; no path, since a path may contain a person's name."""
    standard = {
        "participant_id": scan.participant_id, "session": scan.session, "run": scan.run, "dataset": scan.dataset,
        "site": scan.site, "age": None if scan.age != scan.age else scan.age, "sex": scan.sex,
    }  # fmt: skip
    reserved = (*LOCATION_COLUMNS, *QUALITY_COLUMNS)
    return {**{name: value for name, value in scan.extra.items() if name not in reserved}, **standard}


def scan_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> pd.DataFrame:
    """Return a table with a row per scan, in the order of ``rows``, with a column ``split``.

    Args:
        rows: a dict per scan: the location columns and what ``describe`` returns.
        settings: the manifest's settings, of which ``splits`` and ``seed`` are used.
    """
    table = pd.DataFrame(rows)
    table["age"] = pd.to_numeric(table["age"])
    # Participants are counted per data set: two data sets may both have a sub-01.
    people = table.assign(participant=table["dataset"] + "/" + table["participant_id"])
    table["split"] = assign_splits(people, settings["splits"], settings["seed"])
    first = [*LOCATION_COLUMNS, "participant_id", "session", "run", "dataset", "site", "age", "sex"]
    return table[[*first, *(column for column in table.columns if column not in first)]]


def text_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a scan table that hold text. Numbers of a cohort join them as they are written."""
    return [
        str(name)
        for name, column in table.items()
        if not column.isna().all() and pd.api.types.is_string_dtype(column.dropna())
    ]


def number_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a scan table that come from a cohort's tables and hold numbers."""
    return [
        str(name)
        for name, column in table.items()
        if name not in (*LOCATION_COLUMNS, *TEXT_COLUMNS)
        and not column.isna().all()
        and pd.api.types.is_numeric_dtype(column)
    ]
