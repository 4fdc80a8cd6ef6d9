"""Convert the texts of tables to the values of scans, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from data_pipeline.cohort.cells import MISSING, folded, is_numeric, parse_number, same
from data_pipeline.cohort.column_names import TEST_WORDS, check_similar_columns, columns_to_read
from data_pipeline.cohort.declarations import ALL, DataSet
from data_pipeline.cohort.reading import AT_LEAST, Change, Reading, in_years
from data_pipeline.cohort.sidecars import DAYS_PER_YEAR, Sidecars, describing_words
from data_pipeline.cohort.split import SPLIT, TRAINED, split_name
from data_pipeline.cohort.table_file import Cell, Row
from data_pipeline.cohort.texts import warn
from infra.errors import UserError

OLD = 100  # years; several ages above it are more likely months


@dataclass(frozen=True)
class RowOwners:
    """To whom rows belong: the participant of each row, and all rows of each participant, also those without a scan."""

    of_row: Sequence[str]
    rows: Mapping[str, Sequence[Row]]


PERSONAL = (SPLIT, "sex")  # columns of a person: a session's row without a value takes that of the participant's row


def typed_values(
    rows: Sequence[Row], source: DataSet, sidecars: Sidecars | None = None, people: RowOwners | None = None
) -> tuple[list[dict[str, Any]], list[Change]]:
    """Convert the texts of rows to values by the declared rules.

    Args:
        rows: the row of each scan.
        source: the data set with its rules.
        sidecars: of its tables, if they have been read already.
        people: whose rows these are, so that a split that any row of a participant declares holds for all their scans; None
            if a split is a column like others.

    Returns:
        For each row, our column name -> value: age in years, sex F, M or O, numbers as float, text as str, missing None.
        And the cells that a rule changed.

    Raises:
        UserError: a value is not allowed or has no rule, a column of numbers has a text, a split is missing, or a declared
            column does not exist.
    """
    reading = Reading(source, replace(sidecars or Sidecars(), place=source.place))
    others = [row for own in people.rows.values() for row in own] if people else []
    columns = columns_to_read(source, rows, others)
    if people:
        check_similar_columns(source, columns, [*rows, *others])
    personal = {*PERSONAL, *source.person}
    values = [dict[str, Any]() for _ in rows]
    for name, theirs in columns.items():
        if isinstance(source.values.get(name), str):
            continue
        cells = [_cell(reading, name, theirs, row) if name in personal else row.cell(theirs) for row in rows]
        texts = [reading.recode(name, theirs, cell) for cell in cells]
        if name == SPLIT:
            texts = _splits(reading, theirs, texts, cells, rows, people)
        numeric = _is_numeric(reading, name, texts, cells)
        for row_values, text, cell in zip(values, texts, cells, strict=True):
            row_values[name] = None if text is None else reading.value(name, theirs, cell, text, numeric)
        reading.warn_of_unlabelled(name)
        if name == "age":
            _warn_of_months(reading, theirs, cells, texts)
    for name, rule in source.values.items():
        if isinstance(rule, str):
            constant = _constant(reading, name, rule)
            for row_values in values:
                row_values[name] = constant
    if source.age:
        for row_values, row in zip(values, rows, strict=True):
            row_values["age"] = _age_from_dates(reading, row)
    return values, list(reading.changes.values())


def _is_numeric(reading: Reading, name: str, texts: Sequence[str | None], cells: Sequence[Cell]) -> bool:
    """``is_numeric`` of a column; lower bounds such as 89+ count as numbers if the column has a cap."""
    capped = name in reading.source.cap
    checked = [
        ("0" if capped and text is not None and AT_LEAST.fullmatch(text.lower()) else text, cell.where)
        for text, cell in zip(texts, cells, strict=True)
    ]
    declared = "number" if capped else reading.source.type_of(name)
    return is_numeric(name, checked, declared, stored=name in reading.source.number)


def _constant(reading: Reading, name: str, rule: str) -> Any:
    source = reading.source
    cell = Cell(rule, source.declared_in, source.path / "constant")
    constant = None
    if rule not in MISSING:
        numeric = is_numeric(name, [(rule, cell.where)], source.type_of(name))
        constant = reading.value(name, name, cell, rule, numeric)
    reading.changes[name, cell.where] = Change(name, "every row", "", rule, "constant")
    return constant


def _cell(reading: Reading, name: str, theirs: str, row: Row) -> Cell:
    """Return the cell of a column for a person: that of the session's row, or of the participant's row if it is missing."""
    cells = list(row.cells(theirs))
    known = (cell for cell in cells if not reading.is_missing(name, cell.text.strip()))
    return next(known, cells[0] if cells else row.cell(theirs))


def _splits(
    reading: Reading, theirs: str, texts: Sequence[str | None], cells: Sequence[Cell], rows: Sequence[Row],
    people: RowOwners | None,
) -> list[str | None]:  # fmt: skip
    """The split of each scan: the one that any row of its participant declares, else the declared default.

    Args:
        reading: the conversion of the data set.
        theirs: the column.
        texts: of ``cells`` after the declared rules, with the default.
        cells: of the scans' rows.
        rows: of the scans.
        people: see ``typed_values``; None if every row is a participant of its own.

    Raises:
        UserError: a participant has two splits, some scans have none, or a rule hides that a participant is declared as test.
    """
    owners = people.of_row if people else [str(n) for n in range(len(rows))]
    declared: dict[str, tuple[str, Cell]] = {}
    of_person = {} if people is None else people.rows
    first_rows = dict(zip(owners, rows, strict=True))
    # Cells of rows without a scan are not changes of scans; and a default is not a declaration of the table.
    quiet = Reading(replace(reading.source, default={}), reading.sidecars)
    for owner, row in [*zip(owners, rows, strict=True), *((o, r) for o in first_rows for r in of_person.get(o, ()))]:
        for cell in row.cells(theirs):
            split = _declared_split(quiet, theirs, cell)
            if split is None:
                continue
            other, place = declared.setdefault(owner, (split, cell))
            if other != split:
                raise UserError(
                    f"{cell.where}: split={cell.text.strip()!r}, but {place.where}: split={place.text.strip()!r} for the same "
                    "participant; all scans of a participant belong to one split, write it alike in every row"
                )
    splits = []
    for owner, text, cell in zip(owners, texts, cells, strict=True):
        split = declared[owner][0] if owner in declared else None if text is None else split_name(text)
        if split is not None and text != split:
            reading.note(
                SPLIT, cell.where, cell.text, split, "names of splits" if text else "the participant's other row"
            )
        splits.append(split)
    missing = [cell for split, cell in zip(splits, cells, strict=True) if split is None]
    if missing and (declared or len(missing) < len(cells)):
        raise UserError(
            f"{missing[0].where}: split={missing[0].text!r} is missing, while other rows have one; write it, or declare "
            f"a split for such rows, as in `default: {{split: downstream}}`, {reading.source.place}"
        )
    return splits


def _declared_split(reading: Reading, theirs: str, cell: Cell) -> str | None:
    """The split that a cell declares; None if it is missing. Raises UserError if a rule turns test into anything else."""
    text = cell.text.strip()
    if text in MISSING:
        return None
    value = reading.recode(SPLIT, theirs, cell)
    split = None if value is None else split_name(value)
    if folded(text) in TEST_WORDS and (split is None or split in TRAINED):
        raise UserError(
            f"{cell.where}: split={text!r} is read as {'missing' if split is None else repr(split)} by a rule of "
            f"{reading.source.declared_in}; nobody whom a table declares as test is trained on: remove the rule, or map it to "
            "another split, as in `values: {split: {test: downstream}}`"
        )
    return split


def _warn_of_months(reading: Reading, theirs: str, cells: Sequence[Cell], texts: Sequence[str | None]) -> None:
    """Warn if ages without a stated unit look like months; ``texts`` are as written, before a cap."""
    if not cells or reading.sidecars.unit("age", cells[0].table, theirs, reading.source.units.get("age", "")):
        return
    described, _ = reading.sidecars.column(cells[0].table, theirs)
    words = f"{theirs.lower()} {describing_words(described)}"
    word = next((word for word in ("month", "week", "day") if word in words), "")
    old = sum((parse_number(text or "") or 0.0) > OLD for text in texts)
    if word or old > max(1, len(texts) // 50):
        reason = f"the table calls them {word}s" if word else f"{old} of {len(texts)} are above {OLD}"
        warn(
            f"{reading.source.name}: ages are read as years, but look like {word or 'month'}s ({reason}); declare "
            f"`units: {{age: {word or 'month'}s}}` or `units: {{age: years}}` {reading.source.place}"
        )


def _age_from_dates(reading: Reading, row: Row) -> float | None:
    """Years from the date of birth to that of the scan, to two decimals, since dates are exact to a day."""
    days, source = [], reading.source
    for key in ("birth", "scan"):
        cell, date_format = row.cell(source.age[key]), source.age.get("format", "%Y-%m-%d")
        text = cell.text.strip()
        if text in MISSING or any(
            same(text, m) for m in (*source.missing.get("age", ()), *source.missing.get(ALL, ()))
        ):
            return None
        try:
            days.append(datetime.strptime(text, date_format))
        except ValueError:
            raise UserError(
                f"{cell.where}: {source.age[key]}={text!r} is not a date of the form {date_format}; "
                f"declare its format in {source.declared_in}, as in `age: {{format: '%d/%m/%Y'}}`"
            ) from None
    years = f"{(days[1] - days[0]).days / DAYS_PER_YEAR:.2f}"
    age = in_years(row.cell(source.age["scan"]).where, "age from dates", years, float(years))
    cap = source.cap.get("age")
    return age if cap is None else min(age, cap)
