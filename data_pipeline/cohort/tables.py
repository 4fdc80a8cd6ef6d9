"""Tables of participants and sessions: rows of text, and the row of each scan."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import UserError

SESSION_COLUMNS = ("session", "session_id", "ses")  # names of the column that distinguishes a participant's rows


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        values: the text of each column.
        where: file and line, for messages.
        parent: the row that this row refines: a participant's row for a session's row.
    """

    values: dict[str, str]
    where: str
    parent: Row | None = None

    def cell(self, column: str) -> tuple[str, str]:
        """The text of a column, and its file and line; from the parent row if this row's table lacks the column."""
        if column not in self.values and self.parent is not None:
            return self.parent.cell(column)
        return self.values.get(column, ""), self.where

    def columns(self) -> Iterable[str]:
        """The columns of the parent rows and of this row."""
        inherited = self.parent.columns() if self.parent is not None else ()
        return dict.fromkeys([*inherited, *self.values])


def read_rows(path: Path, required: Sequence[str], delimiter: str = "\t") -> list[Row]:
    """Read all rows of a table with a header.

    Raises:
        UserError: the file is missing, is not such a table, or lacks a column of ``required``.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a cohort needs this table with a column {required[0]}")
    separator = "tab" if delimiter == "\t" else delimiter
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(lines, [])]
            records = [(lines.line_num, values) for values in lines if values]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a {separator}-separated table: {' '.join(str(error).split())}") from None
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not header or repeated:
        reason = f"column {repeated[0]!r} appears twice" if repeated else "it is empty"
        raise UserError(f"{path} is not a {separator}-separated table: {reason}")
    for column in required:
        if column not in header:
            raise UserError(f"{path} has no column {column}; found: {', '.join(header)}")
    rows = []
    for number, values in records:
        if len(values) > len(header):
            raise UserError(
                f"{path} is not a {separator}-separated table: line {number} has {len(values)} fields, the header has "
                f"{len(header)}"
            )
        # Some editors drop the empty fields at the end of a line.
        filled = [*values, *[""] * (len(header) - len(values))]
        rows.append(Row(dict(zip(header, filled, strict=True)), f"{path} line {number}"))
    return rows


@dataclass(frozen=True)
class ParticipantTable:
    """The participants' tables of a data set.

    Attributes:
        rows: each participant's rows.
        session: name of the column that distinguishes them by session; None if there is none.
        run: name of the column that distinguishes them by run; None if there is none.
    """

    rows: dict[str, list[Row]]
    session: str | None
    run: str | None

    def find(self, participant: str, session: str, run: str) -> Row | None:
        """The row of a scan: the participant's only row, or that of the session (and run); None if there is none."""
        rows = self.rows.get(participant, [])
        if len(rows) == 1:
            return rows[0]
        rows = [row for row in rows if self.session_of(row) == (session or "1")]
        if len(rows) > 1 and self.run:
            rows = [row for row in rows if row.values[self.run].strip().removeprefix("run-") == run]
        return rows[0] if len(rows) == 1 else None

    def session_of(self, row: Row) -> str:
        """A row's session, without ``ses-``; ``1`` if it names none."""
        return (row.values[self.session].strip().removeprefix("ses-") if self.session else "") or "1"


def read_participants(
    paths: Sequence[Path], key: str, session: str, run: str, delimiter: str = "\t"
) -> ParticipantTable:
    """Read the participants' tables of a data set as one.

    Args:
        paths: the tables.
        key: name of the column of participants' ids.
        session: name of the column of sessions; empty to look for one of ``SESSION_COLUMNS``.
        run: name of the column of runs, which need not exist.
        delimiter: separates the columns.

    Raises:
        UserError: a table is missing or damaged, an id is empty, or a row is repeated.
    """
    participants: dict[str, list[Row]] = {}
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
            session_text, run_text = (row.values[c].strip() if c else "" for c in (session_column, run_column))
            identity = (name, session_text, run_text)
            if identity in seen:
                fix = "keep one row each" if session_column else "keep one row each, or add a column session"
                raise UserError(f"{row.where}: {key} {name!r} appears twice; {fix}")
            seen.add(identity)
            participants.setdefault(name, []).append(row)
    return ParticipantTable(participants, session_column, run_column)


def read_sessions(path: Path, session: str) -> dict[str, Row]:
    """Read a participant's ``sub-X_sessions.tsv``: session without ``ses-`` -> row.

    Raises UserError if the table is damaged or a session is repeated.
    """
    rows: dict[str, Row] = {}
    for row in read_rows(path, [session]):
        name = row.values[session].strip().removeprefix("ses-")
        if name in rows:
            raise UserError(f"{row.where}: {session} {name!r} appears twice; keep one row each")
        rows[name] = row
    return rows
