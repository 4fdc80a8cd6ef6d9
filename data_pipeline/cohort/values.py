"""Convert the texts of tables to values by declared rules, and record every cell that a rule changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.cohort.cells import MISSING, SEX_WORDS, is_numeric, number_as_text, parse_number, same
from data_pipeline.cohort.declarations import ALL, IDENTITY, RESERVED, DataSet
from data_pipeline.cohort.sidecars import DAYS_PER_YEAR, UNITS, Sidecars
from data_pipeline.cohort.split import SPLIT
from data_pipeline.cohort.tables import Cell, Row
from data_pipeline.cohort.texts import warn
from infra.errors import UserError, nearest

AT_LEAST = re.compile(
    r"(?:[>≥]=?\s*(?P<after>[\d.]+)|(?P<before>[\d.]+)\s*(?:\+|(?:or|and) (?:older|over|above|more)))"
)
OLD, OLDEST = 100, 130  # years; several ages above the first are more likely months, one above the second is no age


class Change(NamedTuple):
    """A cell that a rule changed: its column, its file and line, its text and what it was read as, and the rule."""

    column: str
    where: str
    before: str
    after: str
    rule: str


@dataclass
class _Reading:
    """The conversion of one data set's cells.

    Attributes:
        source: the data set.
        sidecars: of its tables.
        changes: (column, where) -> what was changed; a row that several scans share counts once.
    """

    source: DataSet
    sidecars: Sidecars = field(default_factory=Sidecars)
    changes: dict[tuple[str, str], Change] = field(default_factory=dict)

    def note(self, column: str, where: str, before: str, after: Any, rule: str) -> None:
        """Record that a rule changed a cell; a later rule keeps the cell's first text."""
        shown = "missing" if after is None else number_as_text(after) if isinstance(after, float) else str(after)
        earlier = self.changes.get((column, where))
        if earlier is not None:
            before = earlier.before
            rule = earlier.rule if rule in earlier.rule else f"{earlier.rule}, {rule}"
        self.changes[column, where] = Change(column, where, before, shown, rule)

    def recode(self, column: str, theirs: str, cell: Cell) -> str | None:
        """The text of a cell after the declared rules; None if it is missing. Raises UserError if it has no rule."""
        text, source = cell.text.strip(), self.source
        rule, file = source.values.get(column), Path(source.declared_in.partition(":")[0]).name
        for code, ours in rule.items() if isinstance(rule, dict) else ():
            if same(text, code):
                value = None if ours in MISSING else ours
                if value != text:
                    self.note(column, cell.where, text, value, f"values of {file}")
                return value
        declared = (*source.missing.get(column, ()), *source.missing.get(ALL, ()))
        if text in MISSING or any(same(text, mark) for mark in declared):
            value = source.default.get(column)
            if value is not None:
                self.note(column, cell.where, text, value, f"default of {file}")
            elif text not in ("", "n/a"):
                self.note(
                    column, cell.where, text, None, f"missing of {file}" if text not in MISSING else "missing mark"
                )
            return value
        if isinstance(rule, dict):
            if column in source.only or ALL in source.only:
                raise UserError(
                    f"{cell.where}: {column}={text!r} has no rule in values.{column} of {source.declared_in}; "
                    f"found: {', '.join(rule)}; add it (with the value n/a if it means missing), or remove `only: true`"
                )
            return text
        return self._labelled(column, theirs, cell, text)

    def _labelled(self, column: str, theirs: str, cell: Cell, text: str) -> str | None:
        """The label of a code by the JSON beside the table; words of sexes, and ages and head sizes, are not codes."""
        if column == "sex" and text.lower() in SEX_WORDS:
            return text
        label, path = self.sidecars.label(cell.table, theirs, text)
        if label is None or (column in UNITS and label not in MISSING):
            return text
        value = None if label in MISSING else label
        self.note(column, cell.where, text, value, f"Levels of {Path(path).name}")
        return value

    def number(self, column: str, theirs: str, cell: Cell, text: str) -> float | None:
        """The number that a text is, in our unit, at most the declared cap; None if the text is no number.

        Raises UserError for a lower bound such as 89+ if it has no declared cap.
        """
        value, cap = parse_number(text), self.source.cap.get(column)
        bound = AT_LEAST.fullmatch(text.lower()) if value is None else None
        if value is None and bound is None:
            return None
        if bound is not None:
            value = parse_number(bound["after"] or bound["before"])
            if value is None:
                return None
            if cap is None:
                raise UserError(
                    f"{cell.where}: {column}={text!r} is a lower bound, not a number; "
                    f"declare `cap: {{{column}: {number_as_text(value)}}}` {self.source.place}, "
                    "which reads this and all higher values as that number"
                )
        assert value is not None
        unit = self.sidecars.unit(column, cell.table, theirs, self.source.units.get(column, ""))
        if unit and (factor := UNITS[column][unit]) != 1:
            value /= factor
            self.note(column, cell.where, text, value, unit)
        if cap is not None and bound is not None and value < cap:
            raise UserError(f"{cell.where}: {column}={text!r} may be below the declared cap of {number_as_text(cap)}; "
                            f"declare `cap: {{{column}: {number_as_text(value)}}}`")  # fmt: skip
        if column == "age" and bound is None and value > OLDEST:
            return value  # no age in years, which a cap must not hide
        if cap is not None and (value > cap or bound is not None):
            self.note(column, cell.where, text, cap, f"cap: {number_as_text(cap)}")
            value = cap
        return value

    def value(self, column: str, theirs: str, cell: Cell, text: str, numeric: bool) -> Any:
        """Convert a text to the value of a column; raises UserError naming the cell if it is not allowed."""
        if column == "age":
            return _in_years(cell.where, column, text, self.number(column, theirs, cell, text), self.source.place)
        if column == "sex":
            sex = _sex(cell.where, text, self.source.place)
            if sex != text:
                self.note(column, cell.where, text, sex, "words for sexes")
            return sex
        return self.number(column, theirs, cell, text) if numeric else text


def typed_values(
    rows: Sequence[Row], source: DataSet, sidecars: Sidecars | None = None
) -> tuple[list[dict[str, Any]], list[Change]]:
    """Convert the texts of rows to values by the declared rules; ``sidecars`` if they have been read already.

    Returns:
        For each row, our column name -> value: age in years, sex F, M or O, numbers as float, text as str, missing None.
        And the cells that a rule changed.

    Raises:
        UserError: a value is not allowed or has no rule, a column of numbers has a text, a split is missing, or a declared
            column does not exist.
    """
    present = dict.fromkeys(column for row in rows for column in row.columns())
    columns, reading = _columns(source, present), _Reading(source, replace(sidecars or Sidecars(), place=source.place))
    values = [dict[str, Any]() for _ in rows]
    for name, theirs in columns.items():
        if isinstance(source.values.get(name), str):
            continue
        cells = [row.cell(theirs) for row in rows]
        texts = [reading.recode(name, theirs, cell) for cell in cells]
        if name == SPLIT:
            _check_complete(texts, cells, source.place)
        numeric = _is_numeric(reading, name, texts, cells)
        for row_values, text, cell in zip(values, texts, cells, strict=True):
            row_values[name] = None if text is None else reading.value(name, theirs, cell, text, numeric)
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


def _is_numeric(reading: _Reading, name: str, texts: Sequence[str | None], cells: Sequence[Cell]) -> bool:
    """``is_numeric`` of a column; lower bounds such as 89+ count as numbers if the column has a cap."""
    capped = name in reading.source.cap
    checked = [
        ("0" if capped and text is not None and AT_LEAST.fullmatch(text.lower()) else text, cell.where)
        for text, cell in zip(texts, cells, strict=True)
    ]
    declared = "number" if capped else reading.source.type_of(name)
    return is_numeric(name, checked, declared, stored=name in reading.source.number)


def _constant(reading: _Reading, name: str, rule: str) -> Any:
    source = reading.source
    cell = Cell(rule, source.declared_in, source.path / "constant")
    constant = None
    if rule not in MISSING:
        numeric = is_numeric(name, [(rule, cell.where)], source.type_of(name))
        constant = reading.value(name, name, cell, rule, numeric)
    reading.changes[name, cell.where] = Change(name, "every row", "", rule, "constant")
    return constant


def _columns(source: DataSet, present: Iterable[str]) -> dict[str, str]:
    """Our name -> their name of the columns to read; raises UserError if no table has a declared column."""
    present = list(present)
    ids = IDENTITY | {source.column(name) for name in IDENTITY}
    dates = {source.age[key] for key in ("birth", "scan") if key in source.age}  # dates could identify a person
    if source.columns is None:
        taken = {name: name for name in present if name not in ids | dates | RESERVED}
    else:
        taken = {ours: theirs for ours, theirs in source.columns.items() if ours not in IDENTITY}
        # People whom a table declares as test must not be trained on because the declaration forgets the column.
        if SPLIT in present and SPLIT not in taken and SPLIT not in taken.values():
            taken[SPLIT] = SPLIT
    for ours, theirs in [*taken.items(), *((f"age.{key}", source.age[key]) for key in ("birth", "scan") if source.age)]:
        if present and theirs not in present:
            raise UserError(
                f"{source.declared_in}: {ours}: no table of {source.name} has a column {theirs!r}{nearest(theirs, present)}; "
                f"found: {', '.join(present)}"
            )
    rules = {"values": [n for n, rule in source.values.items() if not isinstance(rule, str)]}
    rules |= {key: list(getattr(source, key)) for key in ("missing", "default", "cap", "units", "types", "only")}
    for key, names in rules.items():
        for name in names:
            constant = key != "values" and isinstance(source.values.get(name), str)
            known = name in taken or name == ALL or (name == "age" and source.age) or constant
            if present and not known and not (key == "units" and name in UNITS):
                raise UserError(
                    f"{source.declared_in}: {key}.{name}: {source.name} has no column {name!r}{nearest(name, taken)}; "
                    f"found: {', '.join(taken)}"
                )
    return taken


def _check_complete(texts: Sequence[str | None], cells: Sequence[Cell], place: str) -> None:
    """Raise UserError if some scans have a split and others none."""
    missing = [cell for text, cell in zip(texts, cells, strict=True) if text is None]
    if missing and len(missing) < len(cells):
        raise UserError(
            f"{missing[0].where}: split={missing[0].text!r} is missing, while other rows have one; write it, or declare "
            f"a split for such rows, as in `default: {{split: downstream}}`, {place}"
        )


def _sex(where: str, text: str, place: str) -> str:
    if text.lower() in SEX_WORDS:
        return SEX_WORDS[text.lower()]
    if text.replace(".", "").lstrip("-").isdigit():
        raise UserError(
            f"{where}: sex={text!r} is a code without a declared meaning; "
            f"declare it, as in `values: {{sex: {{0: M, 1: F}}}}`, {place}"
        )
    raise UserError(f"{where}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown")


def _in_years(where: str, name: str, text: str, age: float | None, place: str = "") -> float:
    """Check that an age is a number in 0..130; ``text`` is how it was written, ``place`` where it can be declared missing."""
    if age is None or not 0 <= age <= OLDEST:
        declare = "correct the dates"
        if place:
            declare = f"write n/a if unknown, or declare it {place}, as in `missing: {{age: [{text}]}}`"
            declare += "; if ages are in months, declare `units: {age: months}`" if (age or 0) > OLDEST else ""
        raise UserError(f"{where}: {name}={text!r} is not a number of years in 0..{OLDEST}; {declare}")
    return age


def _warn_of_months(reading: _Reading, theirs: str, cells: Sequence[Cell], texts: Sequence[str | None]) -> None:
    """Warn if ages without a stated unit look like months; ``texts`` are as written, before a cap."""
    if not cells or reading.sidecars.unit("age", cells[0].table, theirs, reading.source.units.get("age", "")):
        return
    described, _ = reading.sidecars.column(cells[0].table, theirs)
    words = f"{theirs} {described.get('Description', '')} {described.get('LongName', '')}".lower()
    word = next((word for word in ("month", "week", "day") if word in words), "")
    old = sum((parse_number(text or "") or 0.0) > OLD for text in texts)
    if word or old > max(1, len(texts) // 50):
        reason = f"the table calls them {word}s" if word else f"{old} of {len(texts)} are above {OLD}"
        warn(
            f"{reading.source.name}: ages are read as years, but look like {word or 'month'}s ({reason}); declare "
            f"`units: {{age: {word or 'month'}s}}` or `units: {{age: years}}` {reading.source.place}"
        )


def _age_from_dates(reading: _Reading, row: Row) -> float | None:
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
    age = _in_years(row.cell(source.age["scan"]).where, "age from dates", years, float(years))
    cap = source.cap.get("age")
    return age if cap is None else min(age, cap)
