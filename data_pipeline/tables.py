"""Tab-separated tables of a BIDS folder, values checked where they are read so that an error can name file and line."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.errors import UserError

Row = dict[str, str | None]
MISSING = {"", "n/a", "N/A", "nan", "NaN"}
SEX = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
NAMES = {"site", "diagnosis", "split"}  # text also where every value looks like a number


def read_table(path: Path, key: str) -> list[Row]:
    """Rows of a .tsv with the column ``key``; ``n/a`` and empty are None, age is a number of years, sex F, M or O.

    UserError naming file, line and value for anything else.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; a cohort needs this tab-separated table with the columns {key} and age (sex, site, ... if known)"
        )
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, dialect="excel-tab")
            head = [name.strip() for name in next(reader, [])]
            if key not in head:
                raise UserError(f"{path} has no column {key}; found: {', '.join(head) or 'nothing'}; name it so")
            if len(set(head)) < len(head):
                raise UserError(f"{path} has two columns of one name: {', '.join(head)}; rename one")
            for fields in reader:
                if any(field.strip() for field in fields):
                    rows.append(_row(path, reader.line_num, head, fields))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tab-separated UTF-8 table: {' '.join(str(error).split())}") from None
    return rows


def _row(path: Path, line: int, head: list[str], fields: list[str]) -> Row:
    if len(fields) != len(head):
        raise UserError(
            f"{path} line {line} has {len(fields)} fields, its head {len(head)}; separate by tabs, n/a where unknown"
        )
    return {name: _checked(path, line, name, field.strip()) for name, field in zip(head, fields, strict=True)}


def _checked(path: Path, line: int, column: str, text: str) -> str | None:
    if text in MISSING:
        return None
    if column == "age" and not 0 <= _number(text, -1.0) <= 130:
        raise UserError(f"{path} line {line}: age={text!r} is not a number of years in 0..130; write n/a if unknown")
    if column == "sex":
        if text.lower() not in SEX:
            raise UserError(
                f"{path} line {line}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown"
            )
        return SEX[text.lower()]
    return text


def typed(column: str, values: Iterable[str | None]) -> list[Any]:
    """A whole column as float where every value that is there is a number, else as text; None stays None.

    By column rather than by value: a column of both ``3`` and ``unknown`` is text, and has one type in scans.parquet.
    """
    texts = list(values)
    numeric = column not in NAMES and all(_number(text, None) is not None for text in texts if text is not None)
    return [float(text) if numeric and text is not None else text for text in texts]


def _number(text: str, otherwise: Any) -> Any:
    try:
        return float(text)
    except ValueError:
        return otherwise
