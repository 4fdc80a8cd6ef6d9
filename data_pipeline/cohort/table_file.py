"""Read a table with a header: its rows as text, with the file and line of each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.cohort.cells import known_name
from data_pipeline.cohort.texts import read_text
from infra.errors import UserError

SEPARATORS = {"\t": "tab"}  # names of separators that a message cannot show


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
        session: the session that the row names, without ``ses-``; empty if it names none.
        run: likewise.
    """

    values: dict[str, str]
    where: str
    table: Path
    parent: Row | None = None
    session: str = ""
    run: str = ""

    def cell(self, column: str) -> Cell:
        """The cell of a column; from the parent row if this row's table lacks the column."""
        return next(iter(self.cells(column)), Cell("", self.where, self.table))

    def cells(self, column: str) -> Iterator[Cell]:
        """The cells of a column in this row, its parent and so on, for the tables that have the column."""
        if column in self.values:
            yield Cell(self.values[column], self.where, self.table)
        if self.parent is not None:
            yield from self.parent.cells(column)

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
    return parse_rows(read_text(path, expected), path, str(path), required, delimiter)[1]


def parse_rows(
    text: str, table: Path, name: str, required: Sequence[str] = (), delimiter: str | None = "\t"
) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of the file ``table``, given its text; messages call it ``name``. See ``read_rows``.

    Raises UserError if the text is no such table or lacks a column of ``required``.
    """
    if delimiter is None:
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = "\t" if "\t" in first else "," if "," in first else ";"
    kind = f"{name} is not a {SEPARATORS.get(delimiter, delimiter)}-separated table"
    records = [(line, values) for line, values in _records(text, delimiter, kind) if any(v.strip() for v in values)]
    if not records:
        raise UserError(f"{kind}: it is empty")
    header = _header(records[0][1], kind)
    for column in required:
        if column not in header:
            raise UserError(f"{name} has no column {column}; found: {', '.join(header)}")
    rows = []
    for line, values in records[1:]:
        if len(values) > len(header):
            raise UserError(f"{kind}: line {line} has {len(values)} fields, the header has {len(header)}")
        # Some editors drop the empty fields at the end of a line.
        filled = [*values, *[""] * (len(header) - len(values))]
        rows.append(Row(dict(zip(header, filled, strict=True)), f"{name} line {line}", table))
    return header, rows


def _records(text: str, delimiter: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a table, each with the number of its last line.

    Raises UserError, which begins with ``kind``, for a quote that no later quote closes, or that takes the cells of other
    rows: a quoted cell may hold separators or line ends, not both.
    """
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    last = 0
    while True:
        first = last + 1
        try:
            values = next(lines, None)
        except csv.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{kind}: {reason}, in the record that begins on line {first}{QUOTE_ADVICE}") from None
        if values is None:
            return
        last = lines.line_num
        for value in values:
            ends = len(re.findall("\r\n|\r|\n", value))
            if ends and delimiter in value:
                raise UserError(f"{kind}: the quote that opens on line {first} takes in the cells of lines {first} to "
                                f"{first + ends}{QUOTE_ADVICE}")  # fmt: skip
            first += ends
        yield last, values


QUOTE_ADVICE = (
    "; a cell that begins with a quote ends at the next one: remove the quote, or double it inside a quoted cell"
)


def _header(cells: Sequence[str], kind: str) -> list[str]:
    """The names of the columns; raises UserError, which begins with ``kind``, if two are equal."""
    names = [known_name(cell) for cell in cells]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        written = [repr(cell.strip()) for cell, name in zip(cells, names, strict=True) if name == repeated[0]]
        if len(set(written)) > 1:
            raise UserError(f"{kind}: the columns {' and '.join(written)} are both {repeated[0]!r}; keep one of them")
        raise UserError(f"{kind}: column {repeated[0]!r} appears twice")
    return names
