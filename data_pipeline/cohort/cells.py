"""What the text of a table's cell means: the name of a column, a missing value, a number, or text; for every command."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence

from infra.errors import UserError

# What R, Python, Excel, SPSS, SAS and BIDS write for a missing value, in any column.
MISSING = frozenset(
    {"", "n/a", "N/A", "NA", "#N/A", "<NA>", "NaN", "nan", "NAN", "null", "NULL", "None", "."}
)  # fmt: skip
# Columns that decide something: who it is, what a run trains on, or what a rule reads.
KNOWN = frozenset({
    "participant_id", "session", "session_id", "ses", "run", "path", "split", "age", "sex", "site", "diagnosis", "tiv",
    "cat12_iqr",
})  # fmt: skip
SEX_WORDS = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
# Columns that are never converted to numbers by themselves: names that may look like numbers; age and sex have checks.
TEXT_COLUMNS = ("site", "diagnosis", "split", "age", "sex")
TYPES = ("number", "text")  # what `types:` may declare of a column

# float() takes more than a table means by a number: 1_000, other scripts' digits, infinity.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
# float64 would change these texts (007 -> 7), so they are kept as text.
NAME_OF_DIGITS = re.compile(r"[+-]?(0\d+|\d{16,})", re.ASCII)

Text = tuple[str | None, str]
"""The text of a cell, None if it is missing; and its file and line, for messages."""


def parse_number(text: str) -> float | None:
    """Parse a text as a finite number; None if it is not one."""
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def same(text: str, other: str) -> bool:
    """Whether two texts are equal, or equal as numbers: 999, 999.0 and 0999."""
    if text == other:
        return True
    number = parse_number(text)
    return number is not None and number == parse_number(other)


def number_as_text(value: float) -> str:
    """A number as a table writes it: 10234560, not 10234560.0 or 1.02346e+07."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def folded(text: str) -> str:
    """A text for comparison: without case, invisible marks, spaces, hyphens and underscores."""
    plain = unicodedata.normalize("NFKC", _without_marks(text)).casefold()
    return re.sub(r"[\s_\-‐‑–]+", "", plain)


def known_name(text: str) -> str:
    """The name of a column without blanks and invisible marks around it; in our spelling if it is one of ``KNOWN``."""
    name = _without_marks(text).strip()
    lower = unicodedata.normalize("NFKC", name).casefold().strip()
    return lower if lower in KNOWN else name


def _without_marks(text: str) -> str:
    """The text without format and control characters: byte order marks, zero-width spaces; tabs and line ends stay."""
    return "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in ("Cf", "Cc"))


def is_numeric(column: str, cells: Sequence[Text], declared: str = "", stored: bool = False) -> bool:
    """Decide whether a column holds numbers, or text.

    A column is text if less than half of its values are numbers, if one is a number that float64 would not give back as it
    is written (007), or if it is one of ``TEXT_COLUMNS``.

    Args:
        column: its name.
        cells: its values.
        declared: ``number`` or ``text`` if the user declared it.
        stored: the shards to which the cells will be added hold numbers in this column.

    Raises:
        UserError: a column of numbers has a cell with text; the message names the cell.
    """
    known = [(text, where) for text, where in cells if text is not None]
    if column in TEXT_COLUMNS or declared == "text" or not known:
        return False
    words = [(text, where) for text, where in known if parse_number(text) is None]
    if stored:
        words = words or [(text, where) for text, where in known if NAME_OF_DIGITS.fullmatch(text)]
        if words:
            text, where = words[0]
            raise UserError(
                f"{where}: {column}={text!r} is not a number, but the shards hold numbers in this column; correct it, declare "
                f"`missing: {{{as_yaml(column)}: [{as_yaml(text)}]}}`, or give the column another name in `columns:`"
            )
        return True
    numbers = len(known) - len(words)
    commas = [text for text, _ in words if DECIMAL_COMMA.fullmatch(text)]
    if not declared and (2 * (numbers + len(commas)) < len(known) or not numbers + len(commas)):
        return False
    if words:
        text, where = words[0]
        name, comma = as_yaml(column), DECIMAL_COMMA.fullmatch(text)
        hint = "write decimal points, " if comma else "correct it, "
        declare = f"`missing: {{{name}: [{as_yaml(text)}]}}` or `types: {{{name}: text}}`"
        declare = f"declare `types: {{{name}: text}}`" if comma else f"declare {declare}"
        raise UserError(
            f"{where}: {column}={text!r} is not a number, but {numbers} of the column's {len(known)} values are; {hint}or "
            + declare
        )
    return declared == "number" or not any(NAME_OF_DIGITS.fullmatch(text) for text, _ in known)


def as_yaml(text: str) -> str:
    """A text as one YAML value that reads as this text, also inside a list: 999, -9, '23,5'."""
    if re.fullmatch(r"-?[A-Za-z0-9_.][A-Za-z0-9_.+/]*(-[A-Za-z0-9_.+/]+)*", text):
        return text
    return "'" + text.replace("'", "''") + "'" if text.isprintable() else json.dumps(text)
