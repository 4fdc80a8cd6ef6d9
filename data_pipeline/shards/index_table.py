"""Whose scan a foreign shard's sample is: entities from its key, values from the table beside the shards."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from data_pipeline.cohort.values import MISSING, SEX_WORDS, TEXT_COLUMNS
from data_pipeline.shards.scan_table import LOCATION_COLUMNS
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError

# The words that keys and tables use for the four entities.
ENTITIES = {
    "participant_id": ("participant_id", "sub", "subject", "participant"),
    "session": ("session", "ses", "session_id"),
    "run": ("run", "run_id"),
    "dataset": ("dataset", "study", "ds", "source"),
}
PREFIXES = ("sub-", "ses-", "run-")
OWN = (*LOCATION_COLUMNS, "codec")  # the manifest's columns; a table's of these names are left out


def parse_key(key: str, pattern: str | None = None) -> dict[str, str]:
    """Entities of a sample's key: ``abide_sub-01_ses-1_run-1``, in any order, with folders or without.

    Words without a hyphen before the participant name the data set; ``pattern``, a regular expression with named groups,
    reads keys that are made otherwise. BadScan for a key that names no participant.
    """
    if pattern is not None:
        match = re.search(pattern, key)
        found = {name: str(value) for name, value in (match.groupdict() if match else {}).items() if value}
    else:
        found = _entities(key)
    if "participant_id" not in found:
        raise BadScan("its key names no participant; keys are read as <dataset>_sub-<id>_ses-<id>, or by --key-pattern")
    return found


def check_pattern(pattern: str | None) -> None:
    """UserError for a --key-pattern that cannot name a participant."""
    if pattern is None:
        return
    try:
        groups = set(re.compile(pattern).groupindex)
    except re.error as error:
        raise UserError(f"--key-pattern={pattern!r} is no regular expression: {error}") from None
    if "participant_id" not in groups or groups - set(ENTITIES):
        raise UserError(
            f"--key-pattern={pattern!r} has the groups {', '.join(sorted(groups)) or 'none'}; "
            f"it needs (?P<participant_id>...) and may have {', '.join(list(ENTITIES)[1:])}"
        )


def _entities(key: str) -> dict[str, str]:
    words = {alias: name for name, aliases in ENTITIES.items() for alias in aliases}
    found: dict[str, str] = {}
    before: list[str] = []
    for part in re.split(r"[_/]", key):
        label, hyphen, value = part.partition("-")
        if hyphen and value and label.lower() in words:
            found.setdefault(words[label.lower()], value)
        elif part and "participant_id" not in found:
            before.append(part)
    if before:
        found.setdefault("dataset", "_".join(before))
    return found


@dataclass
class People:
    """The rows of a participants' table, by participant; a row may be of one session, run or data set only."""

    path: str
    rows: dict[str, list[dict[str, Any]]]

    def find(self, entities: Mapping[str, str]) -> dict[str, Any]:
        """The values of the one row that fits a scan. BadScan where none or several do."""
        named = ", ".join(f"{name} {value}" for name, value in entities.items())
        rows = self.rows.get(entities["participant_id"], [])
        for name in ("dataset", "session", "run"):
            if name in entities:
                rows = [row for row in rows if row.get(name) in (None, entities[name])]
        if not rows:
            raise BadScan(f"{named} is not in {self.path.rpartition('/')[2]}")
        first = {name: value for name, value in rows[0].items() if name not in ("session", "run")}
        if any({n: v for n, v in row.items() if n not in ("session", "run")} != first for row in rows[1:]):
            raise BadScan(f"{named} has {len(rows)} different rows in {self.path.rpartition('/')[2]}")
        return first


def read_people(content: bytes, path: str) -> People:
    """A participants.tsv, which may have a row per session; values checked: ages are numbers, sex is F, M or O."""
    try:
        table = pd.read_csv(io.BytesIO(content), sep="\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tab-separated table: {' '.join(str(error).split())}") from None
    if "participant_id" not in table.columns:
        raise UserError(f"{path} has no column participant_id; found: {', '.join(table.columns)}")
    aliases = {alias: name for name, words in ENTITIES.items() for alias in words if name not in table.columns}
    table = table.rename(columns=aliases).drop(columns=[name for name in OWN if name in table.columns])
    table = table.apply(lambda column: column.str.strip())
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise UserError(f"{path} has several columns for {twice[0]}; keep one of them")
    texts = (*TEXT_COLUMNS, *ENTITIES)
    numeric = {name for name in table.columns if name not in texts and _all_numbers(table[name])}
    rows: dict[str, list[dict[str, Any]]] = {}
    for line, record in enumerate(table.to_dict("records"), start=2):
        values = {str(k): _value(path, line, str(k), str(v), str(k) in numeric) for k, v in record.items()}
        rows.setdefault(str(values.pop("participant_id")), []).append(values)
    return People(path, rows)


def _all_numbers(column: pd.Series[str]) -> bool:
    known = column[~column.isin(MISSING)]
    return len(known) > 0 and bool(pd.to_numeric(known, errors="coerce").notna().all())


def _value(path: str, line: int, column: str, text: str, number: bool) -> Any:
    if text in MISSING:
        return None
    if column in ENTITIES:
        return text[4:] if text.startswith(PREFIXES) else text
    if column == "sex":
        if text.lower() not in SEX_WORDS:
            raise UserError(
                f"{path} line {line}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown"
            )
        return SEX_WORDS[text.lower()]
    if column != "age":
        return float(text) if number else text
    try:
        age = float(text)
    except ValueError:
        age = float("nan")
    if not 0 <= age <= 130:
        raise UserError(f"{path} line {line}: age={text!r} is not a number of years in 0..130; write n/a if unknown")
    return age
