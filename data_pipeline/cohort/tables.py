"""Tables of participants and sessions, as text: rows, where each stands, and which row a scan belongs to."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import UserError

SESSION_COLUMNS = ("session", "session_id", "ses")  # by what a table tells several rows of a participant apart


@dataclass(frozen=True)
class Row:
    """A line of a table: its texts by column, its file and line, and the row that it refines (a session's, a person's)."""

    values: dict[str, str]
    where: str
    under: Row | None = None

    def cell(self, column: str) -> tuple[str, str]:
        """Text and place of a column: this row's own where its table has the column, else that of the row beneath."""
        if column not in self.values and self.under is not None:
            return self.under.cell(column)
        return self.values.get(column, ""), self.where

    def columns(self) -> Iterable[str]:
        """Every column of this row and of those beneath."""
        beneath = self.under.columns() if self.under is not None else ()
        return dict.fromkeys([*beneath, *self.values])


def read_rows(path: Path, needed: Sequence[str], delimiter: str = "\t") -> list[Row]:
    """Every line of a table with a header; UserError where it is none or lacks a column of ``needed``."""
    if not path.is_file():
        raise UserError(f"{path} is missing; a cohort needs this table with a column {needed[0]}")
    kind = "tab" if delimiter == "\t" else delimiter
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(lines, [])]
            records = [(lines.line_num, values) for values in lines if values]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a {kind}-separated table: {' '.join(str(error).split())}") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        why = f"column {twice[0]!r} is there twice" if twice else "it is empty"
        raise UserError(f"{path} is not a {kind}-separated table: {why}")
    for column in needed:
        if column not in header:
            raise UserError(f"{path} has no column {column}; found: {', '.join(header)}")
    rows = []
    for number, values in records:
        if len(values) > len(header):
            raise UserError(
                f"{path} is not a {kind}-separated table: line {number} has {len(values)} fields, the header {len(header)}"
            )
        # Editors cut empty fields off the end of a line.
        filled = [*values, *[""] * (len(header) - len(values))]
        rows.append(Row(dict(zip(header, filled, strict=True)), f"{path} line {number}"))
    return rows


@dataclass(frozen=True)
class People:
    """The rows of a participants' table by participant, and the columns that tell a person's rows apart."""

    rows: dict[str, list[Row]]
    session: str | None
    run: str | None

    def find(self, participant: str, session: str, run: str) -> Row | None:
        """The row of a scan: the person's only one, or the one of that session (and run); None where there is none."""
        rows = self.rows.get(participant, [])
        if len(rows) == 1:
            return rows[0]
        rows = [row for row in rows if self.session_of(row) == (session or "1")]
        if len(rows) > 1 and self.run:
            rows = [row for row in rows if row.values[self.run].strip().removeprefix("run-") == run]
        return rows[0] if len(rows) == 1 else None

    def session_of(self, row: Row) -> str:
        """A row's session, without ``ses-``; ``1`` where it names none."""
        return (row.values[self.session].strip().removeprefix("ses-") if self.session else "") or "1"


def read_people(paths: Sequence[Path], key: str, session: str, run: str, delimiter: str = "\t") -> People:
    """The participants' tables of a data set as one. ``session``: its column's name, empty for the usual ones."""
    every: dict[str, list[Row]] = {}
    session_column: str | None = None
    run_column: str | None = None
    seen: set[tuple[str, str, str]] = set()
    for path in paths:
        rows = read_rows(path, [key, *([session] if session else [])], delimiter)
        columns = rows[0].values if rows else {}
        session_column = next((c for c in ([session] if session else SESSION_COLUMNS) if c in columns), None)
        run_column = run if run in columns else None
        for row in rows:
            name = row.values[key].strip().removeprefix("sub-")
            if not name:
                raise UserError(f"{row.where}: {key} is empty; every row needs one")
            its_session, its_run = (row.values[c].strip() if c else "" for c in (session_column, run_column))
            mark = (name, its_session, its_run)
            if mark in seen:
                apart = "keep one row each" if session_column else "keep one row each, or add a column session"
                raise UserError(f"{row.where}: {key} {name!r} is there twice; {apart}")
            seen.add(mark)
            every.setdefault(name, []).append(row)
    return People(every, session_column, run_column)


def read_sessions(path: Path, session: str) -> dict[str, Row]:
    """A participant's ``sub-X_sessions.tsv``: rows by session, without ``ses-``."""
    rows: dict[str, Row] = {}
    for row in read_rows(path, [session]):
        name = row.values[session].strip().removeprefix("ses-")
        if name in rows:
            raise UserError(f"{row.where}: {session} {name!r} is there twice; keep one row each")
        rows[name] = row
    return rows
