"""The columns of a cohort's tables as they were read: types, missing values, ranges, and the cells that rules changed."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.cohort.cells import number_as_text
from data_pipeline.cohort.reading import Change
from data_pipeline.cohort.scan import Scan
from data_pipeline.cohort.texts import warn
from infra.files import atomic_write
from infra.page import STYLE

PAGE = "columns.html"  # beside the shards
FIXED = {"age": "years", "sex": "sex: F, M, O"}  # the types of columns that have one of their own
EXAMPLES = 5  # cells that the table of changes names for each rule
ORDER = ("session", "run", "site", "age", "sex")  # the first columns; the others follow by name


class Table(NamedTuple):
    """A table for the terminal and a page; all cells are text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def column_tables(
    scans: Sequence[Scan], changes: Iterable[Change], without_scan: Sequence[str] = (), unlisted: int = 0
) -> list[Table]:
    """The tables of a cohort's columns.

    They are: a row per column (read as what, missing, smallest, largest, changed cells), a row per rule that changed cells,
    and the rows without a scan and scans without a row.

    Args:
        scans: the cohort's scans.
        changes: the cells that a rule changed.
        without_scan: rows of the tables that belong to no scan.
        unlisted: the number of scans that no table lists.
    """
    values = {name: [_value(scan, name) for scan in scans] for name in _names(scans)}
    # A column that pseudonymisation removed may hold ids; it is not shown.
    by_rule: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        if change.column in values:
            by_rule.setdefault((change.column, change.rule), []).append(change)
    rows = []
    for name, column in values.items():
        known = [value for value in column if value is not None]
        changed = sum(len(cells) for (column_name, _), cells in by_rule.items() if column_name == name)
        rows.append([name, _type(name, known), str(len(column) - len(known)), *_range(known), str(changed)])
    head = ["column", "read as", "missing scans", "smallest", "largest", "changed cells"]
    changed_rows = [
        [name, rule, str(len(cells)), "; ".join(_example(cell) for cell in cells[:EXAMPLES])]
        for (name, rule), cells in sorted(by_rule.items())
    ]
    return [
        Table(f"Columns of {len(scans)} scans", head, rows),
        Table("Cells that a rule changed", ["column", "rule", "cells", "for example"], changed_rows),
        _unmatched(without_scan, unlisted),
    ]


def _unmatched(without_scan: Sequence[str], unlisted: int) -> Table:
    rows = []
    if without_scan:
        rows.append(["rows of tables without a scan", str(len(without_scan)), "; ".join(without_scan[:EXAMPLES])])
    if unlisted:
        rows.append(["scans without a row", str(unlisted), "see quarantine.tsv"])
    return Table("Rows and scans that do not match", ["what", "number", "for example"], rows)


def warn_of_unmatched(without_scan: Sequence[str]) -> None:
    """Print how many rows of a cohort's tables belong to no scan, if any does."""
    if without_scan:
        shown = "; ".join(without_scan[:EXAMPLES])
        warn(f"{len(without_scan)} rows of the tables have no scan that can be read, for example {shown}")


def write_columns(path: Path, dataset: str, tables: Sequence[Table]) -> None:
    """Write the tables as an HTML page."""
    title = html.escape(f"Columns of {dataset}")
    body = "".join(table_as_html(table) for table in tables)
    with atomic_write(path, "w") as stream:
        stream.write(f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>")
        stream.write(f"<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n")


def table_as_html(table: Table) -> str:
    """A table as HTML; empty if it has no rows."""
    if not table.rows:
        return ""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    head = f"<thead><tr>{top}</tr></thead>" if any(table.head) else ""
    title = f"<h2>{html.escape(table.title)}</h2>"
    return f"{title}<div class='scroll'><table>{head}<tbody>{body}</tbody></table></div>"


def _names(scans: Sequence[Scan]) -> list[str]:
    others = dict.fromkeys(name for scan in scans for name in scan.extra)
    return [*ORDER, *sorted(name for name in others if name not in ORDER)]


def _value(scan: Scan, name: str) -> Any:
    """A scan's value of a column, None if it is missing."""
    value = getattr(scan, name) if name in ORDER else scan.extra.get(name)
    return None if value is None or value == "" or value != value else value


def _type(name: str, values: Sequence[Any]) -> str:
    if not values:
        return "all missing"
    return FIXED.get(name) or ("number" if all(isinstance(value, int | float) for value in values) else "text")


def _range(values: Sequence[Any]) -> tuple[str, str]:
    """Smallest and largest value; texts in alphabetical order."""
    if not values:
        return "", ""
    ends = min(values), max(values)
    low, high = (number_as_text(round(float(v), 6)) if isinstance(v, int | float) else str(v) for v in ends)
    return low, high


def _example(change: Change) -> str:
    place = Path(change.where.partition(" line ")[0]).name
    line = change.where.partition(" line ")[2]
    where = f"{place} line {line}" if line else change.where
    return f"{where}: {change.before!r} is {change.after}" if change.before else f"{where} is {change.after}"
