"""Tables of participants and sessions: the row of each scan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.table_file import Row, read_rows
from infra.errors import UserError

SESSION_COLUMNS = ("session", "session_id", "ses")  # names of the column that distinguishes a participant's rows


@dataclass(frozen=True)
class ParticipantTable:
    """The participants' tables of a data set.

    Attributes:
        rows: each participant's rows.
        person: columns that hold for every session of a participant, also for those without a row.
    """

    rows: dict[str, list[Row]]
    person: tuple[str, ...] = ()

    def find(self, participant: str, session: str, run: str) -> Row | None:
        """The row of a scan, or None: the row of its session (and run), or a participant's only row if it names neither.

        A scan without a row of its own takes the columns ``person`` of the participant's other rows.
        """
        everything = self.rows.get(participant, [])
        if len(everything) == 1 and (not session or not everything[0].session):
            rows = everything
        else:
            rows = [row for row in everything if self.session_of(row) == (session or "1")]
        if len(rows) > 1 or run:
            exact = [row for row in rows if row.run == run]
            rows = exact or [row for row in rows if not row.run]
        if len(rows) == 1:
            return rows[0]
        return None if rows else self.person_row(everything)

    def why_missing(self, participant: str, session: str, run: str) -> str:
        """Why ``find`` has no row; empty if no table lists the participant."""
        rows = self.rows.get(participant, [])
        if not rows:
            return ""
        run_text = f" run-{run}" if run else ""
        names = [self.session_of(row) + (f" run-{row.run}" if row.run else "") for row in rows]
        return no_session_row(rows[0].table.name, (session or "1") + run_text, names)

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
        return row.session or "1"


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
    seen: set[tuple[str, str, str]] = set()
    for path in paths:
        rows = read_rows(path, [key, *([session] if session else [])], delimiter)
        columns = rows[0].values if rows else {}
        session_column = session or session_column_of(path, columns)
        for row in rows:
            written = row.values[key].strip()
            name = written.removeprefix("sub-")
            if written in MISSING or not name:
                raise UserError(f"{row.where}: {key} is empty; every row needs one")
            session_text = without_prefix(row.values.get(session_column, ""), "ses-")
            run_text = without_prefix(row.values.get(run, ""), "run-")
            identity = (name, session_text, run_text)
            if identity in seen:
                fix = "keep one row each" if session_column else "keep one row each, or add a column session"
                raise UserError(f"{row.where}: {key} {name!r} appears twice; {fix}")
            seen.add(identity)
            participants.setdefault(name, []).append(replace(row, session=session_text, run=run_text))
    return ParticipantTable(participants, person)


def session_column_of(path: Path, columns: Iterable[str]) -> str:
    """The column of sessions of the table ``path``; empty if it has none. Raises UserError if it has several."""
    found = [column for column in SESSION_COLUMNS if column in columns]
    if len(found) > 1:
        raise UserError(
            f"{path} has the columns {' and '.join(found)}, which all name sessions; keep one, or declare it, as in "
            f"`columns: {{session: {found[0]}}}`"
        )
    return found[0] if found else ""


def read_sessions(path: Path, session: str) -> dict[str, Row]:
    """Read a participant's ``sub-X_sessions.tsv``: session without ``ses-`` -> row.

    Raises UserError if the table is damaged or a session is repeated.
    """
    rows: dict[str, Row] = {}
    for row in read_rows(path, [session]):
        name = without_prefix(row.values[session], "ses-")
        if name in rows:
            raise UserError(f"{row.where}: {session} {name!r} appears twice; keep one row each")
        rows[name] = replace(row, session=name)
    return rows
