"""Tables of participants and sessions: rows of text, and the row of each scan."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.texts import read_text
from infra.errors import UserError

SEPARATORS = {"\t": "tab"}  # names of separators that a message cannot show
SESSION_COLUMNS = ("session", "session_id", "ses")  # names of the column that distinguishes a participant's rows


class Cell(NamedTuple):
    """A cell of a table: its text, its file and line for messages, and its file."""

    text: str
    where: str
    table: Path


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        values: the text of each column.
        where: file and line, for messages.
        table: the file.
        parent: the row that this row refines: a participant's row for a session's row.
    """

    values: dict[str, str]
    where: str
    table: Path
    parent: Row | None = None

    def cell(self, column: str) -> Cell:
        """The cell of a column; from the parent row if this row's table lacks the column."""
        if column not in self.values and self.parent is not None:
            return self.parent.cell(column)
        return Cell(self.values.get(column, ""), self.where, self.table)

    def columns(self) -> Iterable[str]:
        """The columns of the parent rows and of this row."""
        inherited = self.parent.columns() if self.parent is not None else ()
        return dict.fromkeys([*inherited, *self.values])


def read_rows(path: Path, required: Sequence[str], delimiter: str | None = "\t") -> list[Row]:
    """Read all rows of a table with a header.

    Args:
        path: the table, in UTF-8 or UTF-16.
        required: columns that it must have.
        delimiter: separates the columns; None to take the tab, comma or semicolon that the header holds.

    Raises:
        UserError: the file is missing, is not such a table, or lacks a column of ``required``.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a cohort needs this table with a column {required[0]}")
    expected = "a table" if delimiter is None else f"a {SEPARATORS.get(delimiter, delimiter)}-separated table"
    text = read_text(path, expected)
    if delimiter is None:
        first = text.partition("\n")[0]
        delimiter = "\t" if "\t" in first else "," if "," in first else ";"
    separator = SEPARATORS.get(delimiter, delimiter)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(lines, [])]
        records = [(lines.line_num, values) for values in lines if any(value.strip() for value in values)]
    except csv.Error as error:
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
        rows.append(Row(dict(zip(header, filled, strict=True)), f"{path} line {number}", path))
    return rows


@dataclass(frozen=True)
class ParticipantTable:
    """The participants' tables of a data set.

    Attributes:
        rows: each participant's rows.
        session: name of the column that distinguishes them by session; None if there is none.
        run: name of the column that distinguishes them by run; None if there is none.
        person: columns that hold for every session of a participant, also for those without a row.
    """

    rows: dict[str, list[Row]]
    session: str | None
    run: str | None
    person: tuple[str, ...] = ()

    def find(self, participant: str, session: str, run: str) -> Row | None:
        """The row of a scan, or None: the row of its session (and run), or a participant's only row if it names neither.

        A scan without a row of its own takes the columns ``person`` of the participant's other rows.
        """
        everything = self.rows.get(participant, [])
        if len(everything) == 1 and (not session or not self._named_session(everything[0])):
            rows = everything
        else:
            rows = [row for row in everything if self.session_of(row) == (session or "1")]
        if self.run and (len(rows) > 1 or run):
            exact = [row for row in rows if self._run(row) == run]
            rows = exact or [row for row in rows if not self._run(row)]
        if len(rows) == 1:
            return rows[0]
        return None if rows else self.person_row(everything)

    def why_missing(self, participant: str, session: str, run: str) -> str:
        """Why ``find`` has no row; empty if no table lists the participant."""
        rows = self.rows.get(participant, [])
        if not rows:
            return ""
        run_text = f" run-{run}" if run else ""
        return no_session_row(rows[0].table.name, (session or "1") + run_text, [self.session_of(row) for row in rows])

    def person_row(self, rows: Sequence[Row]) -> Row | None:
        """The columns ``person`` of a participant's rows; None without such columns or rows.

        Raises UserError if the rows differ in such a column.
        """
        if not rows or not self.person:
            return None
        for row in rows[1:]:
            for column in self.person:
                if row.cell(column).text.strip() != rows[0].cell(column).text.strip():
                    raise UserError(
                        f"{row.where}: {column}={row.cell(column).text!r} differs from {rows[0].cell(column).text!r} in the "
                        f"participant's other row; a column of `person:` must not change between sessions"
                    )
        values = {column: rows[0].cell(column).text for column in self.person}
        return Row(dict.fromkeys(rows[0].values, "") | values, rows[0].where, rows[0].table)

    def session_of(self, row: Row) -> str:
        """A row's session, without ``ses-``; ``1`` if it names none."""
        return self._named_session(row) or "1"

    def _named_session(self, row: Row) -> str:
        return without_prefix(row.values.get(self.session, ""), "ses-") if self.session else ""

    def _run(self, row: Row) -> str:
        return without_prefix(row.values.get(self.run, ""), "run-") if self.run else ""


def without_prefix(text: str, prefix: str) -> str:
    """A session or run without its prefix; empty if it is missing."""
    text = text.strip()
    return "" if text in MISSING else text.removeprefix(prefix)


def no_session_row(table: str, session: str, sessions: Sequence[str]) -> str:
    """Why a scan has no row in a table that has rows for other ``sessions`` of its participant."""
    names = ", ".join(f"ses-{name}" for name in dict.fromkeys(sessions))
    alike = next((name for name in sessions if name != session and name.lstrip("0") == session.lstrip("0")), None)
    hint = f"; ses-{alike} and ses-{session} are different names, write them alike" if alike is not None else ""
    return (
        f"{table} has no row for ses-{session} of the participant, only for {names}{hint}; add the row, or declare the "
        "columns that hold for all sessions, as in `person: [sex]`"
    )


def read_participants(
    paths: Sequence[Path], key: str, session: str, run: str, delimiter: str = "\t", person: tuple[str, ...] = ()
) -> ParticipantTable:
    """Read the participants' tables of a data set as one.

    Args:
        paths: the tables.
        key: name of the column of participants' ids.
        session: name of the column of sessions; empty to look for one of ``SESSION_COLUMNS``.
        run: name of the column of runs, which need not exist.
        delimiter: separates the columns.
        person: columns that hold for every session of a participant.

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
            written = row.values[key].strip()
            name = written.removeprefix("sub-")
            if written in MISSING or not name:
                raise UserError(f"{row.where}: {key} is empty; every row needs one")
            session_text = without_prefix(row.values[session_column], "ses-") if session_column else ""
            run_text = without_prefix(row.values[run_column], "run-") if run_column else ""
            identity = (name, session_text, run_text)
            if identity in seen:
                fix = "keep one row each" if session_column else "keep one row each, or add a column session"
                raise UserError(f"{row.where}: {key} {name!r} appears twice; {fix}")
            seen.add(identity)
            participants.setdefault(name, []).append(row)
    return ParticipantTable(participants, session_column, run_column, person)


def read_sessions(path: Path, session: str) -> dict[str, Row]:
    """Read a participant's ``sub-X_sessions.tsv``: session without ``ses-`` -> row.

    Raises UserError if the table is damaged or a session is repeated.
    """
    rows: dict[str, Row] = {}
    for row in read_rows(path, [session]):
        name = without_prefix(row.values[session], "ses-")
        if name in rows:
            raise UserError(f"{row.where}: {session} {name!r} appears twice; keep one row each")
        rows[name] = row
    return rows
