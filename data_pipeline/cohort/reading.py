"""Convert the text of a cell to a value by the declared rules, and record every cell that a rule changed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.cohort.cells import DECIMAL_COMMA, MISSING, SEX_WORDS, as_yaml, number_as_text, parse_number, same
from data_pipeline.cohort.declarations import ALL, DataSet
from data_pipeline.cohort.sidecars import UNITS, Sidecars
from data_pipeline.cohort.table_file import Cell
from data_pipeline.cohort.texts import warn
from infra.errors import UserError

AT_LEAST = re.compile(
    r"(?:[>≥]=?\s*(?P<after>[\d.]+)|(?P<before>[\d.]+)\s*(?:\+|(?:or|and) (?:older|over|above|more)))"
)
NO_LABEL = ("", "n/a", "N/A")  # labels of codes that mean a missing value
OLDEST = 130  # years; a number above it is not an age


class Change(NamedTuple):
    """A cell that a rule changed: its column, its file and line, its text and what it was read as, and the rule."""

    column: str
    where: str
    before: str
    after: str
    rule: str


@dataclass
class Reading:
    """The conversion of one data set's cells.

    Attributes:
        source: the data set.
        sidecars: of its tables.
        changes: (column, where) -> what was changed; a row that several scans share counts once.
        labelled: column whose codes were replaced by labels -> the sidecar.
        unlabelled: column -> the codes without a label, with their numbers of cells.
    """

    source: DataSet
    sidecars: Sidecars = field(default_factory=Sidecars)
    changes: dict[tuple[str, str], Change] = field(default_factory=dict)
    labelled: dict[str, str] = field(default_factory=dict)
    unlabelled: dict[str, Counter[str]] = field(default_factory=dict)

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
        if self.is_missing(column, text):
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

    def is_missing(self, column: str, text: str) -> bool:
        """Whether a text is a mark of a missing value, known or declared."""
        declared = (*self.source.missing.get(column, ()), *self.source.missing.get(ALL, ()))
        return text in MISSING or any(same(text, mark) for mark in declared)

    def _labelled(self, column: str, theirs: str, cell: Cell, text: str) -> str | None:
        """The label of a code by the JSON beside the table; words of sexes, and ages and head sizes, are not codes."""
        if column == "sex" and text.lower() in SEX_WORDS:
            return text
        label, path = self.sidecars.label(cell.table, theirs, text)
        if label is None or (column in UNITS and label not in NO_LABEL):
            if parse_number(text) is not None or len(text) == 1:
                self.unlabelled.setdefault(column, Counter())[text] += 1
            return text
        value = None if label in NO_LABEL else label  # other labels are words as written, also None
        if value is not None:
            self.labelled[column] = path
        self.note(column, cell.where, text, value, f"Levels of {Path(path).name}")
        return value

    def warn_of_unlabelled(self, column: str) -> None:
        """Name the codes of a column that stay beside labels, because the sidecar has no label for them."""
        codes = self.unlabelled.get(column)
        if codes and column in self.labelled:
            counts = ", ".join(
                f"{code!r} in {count} cell{'s' * (count > 1)}" for code, count in sorted(codes.items())[:5]
            )
            rule = f"values: {{{as_yaml(column)}: {{{as_yaml(min(codes))}: ...}}}}"
            warn(
                f"{self.source.name}: {column}: {counts} has no label in Levels of {Path(self.labelled[column]).name} and "
                f"stays beside the labels; add it there, or declare `{rule}` {self.source.place}"
            )

    def number(self, column: str, theirs: str, cell: Cell, text: str) -> float | None:
        """Parse a text as a number in our unit, at most the declared cap; None if it is not one.

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
                    f"declare `cap: {{{as_yaml(column)}: {number_as_text(value)}}}` {self.source.place}, "
                    "which reads this and all higher values as that number"
                )
        assert value is not None
        unit = self.sidecars.unit(column, cell.table, theirs, self.source.units.get(column, ""))
        if unit and (factor := UNITS[column][unit]) != 1:
            value /= factor
            self.note(column, cell.where, text, value, unit)
        if cap is not None and bound is not None and value < cap:
            raise UserError(f"{cell.where}: {column}={text!r} may be below the declared cap of {number_as_text(cap)}; "
                            f"declare `cap: {{{as_yaml(column)}: {number_as_text(value)}}}`")  # fmt: skip
        if column == "age" and bound is None and value > OLDEST:
            return value  # no age in years, which a cap must not hide
        if cap is not None and (value > cap or bound is not None):
            self.note(column, cell.where, text, cap, f"cap: {number_as_text(cap)}")
            value = cap
        return value

    def value(self, column: str, theirs: str, cell: Cell, text: str, numeric: bool) -> Any:
        """Convert a text to the value of a column; raises UserError naming the cell if it is not allowed."""
        if column == "age":
            return in_years(cell.where, column, text, self.number(column, theirs, cell, text), self.source.place)
        if column == "sex":
            sex = _sex(cell.where, text, self.source.place)
            if sex != text:
                self.note(column, cell.where, text, sex, "words for sexes")
            return sex
        return self.number(column, theirs, cell, text) if numeric else text


def _sex(where: str, text: str, place: str) -> str:
    if text.lower() in SEX_WORDS:
        return SEX_WORDS[text.lower()]
    if text.replace(".", "").lstrip("-").isdigit():
        raise UserError(
            f"{where}: sex={text!r} is a code without a declared meaning; "
            f"declare it, as in `values: {{sex: {{0: M, 1: F}}}}`, {place}"
        )
    raise UserError(f"{where}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown")


def in_years(where: str, name: str, text: str, age: float | None, place: str = "") -> float:
    """Return an age in years after checking it. Raises UserError unless it is a number in 0..130.

    ``text`` is how it was written, ``place`` where it can be declared missing.
    """
    if age is None or not 0 <= age <= OLDEST:
        declare = "correct the dates"
        if place:
            declare = f"write n/a if unknown, or declare it {place}, as in `missing: {{age: [{as_yaml(text)}]}}`"
            if DECIMAL_COMMA.fullmatch(text):
                declare = f"write decimal points: {text.replace(',', '.')}"
            declare += "; if ages are in months, declare `units: {age: months}`" if (age or 0) > OLDEST else ""
        raise UserError(f"{where}: {name}={text!r} is not a number of years in 0..{OLDEST}; {declare}")
    return age
