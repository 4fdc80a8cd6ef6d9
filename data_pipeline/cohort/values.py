"""Convert the texts of tables to values by declared rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from data_pipeline.cohort.declarations import ALL, IDENTITY, RESERVED, DataSet
from data_pipeline.cohort.tables import Row
from infra.errors import UserError, nearest

MISSING = {"", "n/a", "N/A", "nan", "NaN"}
SEX_WORDS = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
# Columns that are never converted to numbers by themselves: names that may look like numbers; age and sex have checks.
TEXT_COLUMNS = ("site", "diagnosis", "split", "age", "sex")
DAYS_PER_YEAR = 365.25


def typed_values(rows: Sequence[Row], source: DataSet) -> list[dict[str, Any]]:
    """Convert the texts of rows to values by the declared rules.

    Returns:
        For each row, our column name -> value: age in years, sex F, M or O, numbers as float, text as str, missing None.

    Raises:
        UserError: a value is not allowed or has no rule, or a declared column does not exist.
    """
    present = dict.fromkeys(column for row in rows for column in row.columns())
    columns = _columns(source, present)
    values = [dict[str, Any]() for _ in rows]
    for name, theirs in columns.items():
        rule = source.values.get(name)
        if isinstance(rule, str):
            continue
        cells = [row.cell(theirs) for row in rows]
        texts = [_recode(name, text.strip(), where, rule, source) for text, where in cells]
        numeric = name not in TEXT_COLUMNS and _all_numbers(texts)
        for row_values, text, (_, where) in zip(values, texts, cells, strict=True):
            row_values[name] = None if text is None else _value(where, name, text, numeric)
    for name, rule in source.values.items():
        if isinstance(rule, str):
            numeric = name not in TEXT_COLUMNS and _all_numbers([rule])
            constant = None if rule in MISSING else _value(source.declared_in, name, rule, numeric)
            for row_values in values:
                row_values[name] = constant
    if source.age:
        for row_values, row in zip(values, rows, strict=True):
            row_values["age"] = _age_from_dates(row, source)
    return values


def _columns(source: DataSet, present: Iterable[str]) -> dict[str, str]:
    """Our name -> their name of the columns to read; raises UserError if no table has a declared column."""
    present = list(present)
    ids = IDENTITY | {source.column(name) for name in IDENTITY}
    dates = {source.age[key] for key in ("birth", "scan") if key in source.age}  # dates could identify a person
    if source.columns is None:
        taken = {name: name for name in present if name not in ids | dates | RESERVED}
    else:
        taken = {ours: theirs for ours, theirs in source.columns.items() if ours not in IDENTITY}
    for ours, theirs in [*taken.items(), *((f"age.{key}", source.age[key]) for key in ("birth", "scan") if source.age)]:
        if present and theirs not in present:
            raise UserError(
                f"{source.declared_in}: {ours}: no table of {source.name} has a column {theirs!r}{nearest(theirs, present)}; "
                f"found: {', '.join(present)}"
            )
    for part, names in (("values", [n for n, rule in source.values.items() if not isinstance(rule, str)]),
                        ("missing", [n for n in source.missing if n != ALL])):  # fmt: skip
        for name in names:
            if present and name not in taken and not (name == "age" and source.age):
                raise UserError(
                    f"{source.declared_in}: {part}.{name}: {source.name} has no column {name!r}{nearest(name, taken)}; "
                    f"found: {', '.join(taken)}"
                )
    return taken


def _recode(name: str, text: str, where: str, rule: str | dict[str, str] | None, source: DataSet) -> str | None:
    """Translate a cell's text by the declared rules; None if it is missing, UserError if it has no rule."""
    if text in MISSING or any(_same(text, m) for m in (*source.missing.get(name, ()), *source.missing.get(ALL, ()))):
        return None
    if not isinstance(rule, dict):
        return text
    for theirs, ours in rule.items():
        if _same(text, theirs):
            return None if ours in MISSING else ours
    raise UserError(
        f"{where}: {name}={text!r} has no rule in values.{name} of {source.declared_in}; "
        f"found: {', '.join(rule)}; add it (with the value n/a if it means missing)"
    )


def _same(text: str, declared: str) -> bool:
    """Whether a cell equals a declared text; 999, 999.0 and 0999 are equal numbers."""
    if text == declared:
        return True
    try:
        return float(text) == float(declared)
    except ValueError:
        return False


def _all_numbers(texts: Sequence[str | None]) -> bool:
    """Whether a column has numbers and no other text than missing values."""
    try:
        return all(math.isfinite(float(text)) for text in texts if text is not None) and any(
            t is not None for t in texts
        )
    except ValueError:
        return False


def _value(where: str, column: str, text: str, numeric: bool) -> Any:
    """Convert a text to the value of a column; raises UserError naming ``where`` if it is not allowed."""
    if column == "age":
        return _years(where, "age", text)
    if column == "sex":
        if text.lower() in SEX_WORDS:
            return SEX_WORDS[text.lower()]
        if text.replace(".", "").lstrip("-").isdigit():
            raise UserError(
                f"{where}: sex={text!r} is a code without a declared meaning; "
                "declare it, as in `values: {sex: {0: M, 1: F}}`, in a YAML file given with --columns"
            )
        raise UserError(f"{where}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown")
    return float(text) if numeric else text


def _years(where: str, name: str, text: str) -> float:
    """Convert a text to an age in years; raises UserError if it is not a number in 0..130."""
    try:
        age = float(text)
    except ValueError:
        age = float("nan")
    if not 0 <= age <= 130:
        raise UserError(
            f"{where}: {name}={text!r} is not a number of years in 0..130; write n/a if unknown, "
            f"or declare it in a YAML file given with --columns, as in `missing: {{age: [{text}]}}`"
        )
    return age


def _age_from_dates(row: Row, source: DataSet) -> float | None:
    """Years from the date of birth to that of the scan, to two decimals, since dates are exact to a day."""
    days = []
    for key in ("birth", "scan"):
        text, where = row.cell(source.age[key])
        date_format = source.age.get("format", "%Y-%m-%d")
        if _recode("age", text.strip(), where, None, source) is None:
            return None
        try:
            days.append(datetime.strptime(text.strip(), date_format))
        except ValueError:
            raise UserError(
                f"{where}: {source.age[key]}={text!r} is not a date of the form {date_format}; "
                f"declare its format in {source.declared_in}, as in `age: {{format: '%d/%m/%Y'}}`"
            ) from None
    _, where = row.cell(source.age["scan"])
    return _years(where, "age from dates", f"{(days[1] - days[0]).days / DAYS_PER_YEAR:.2f}")
