"""Assigns samples of foreign shards to participants: entities from the key, values from the table beside the shards."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.cells import MISSING, SEX_WORDS, TEXT_COLUMNS, is_numeric, parse_number
from data_pipeline.cohort.sidecars import UNITS, Sidecars
from data_pipeline.cohort.split import SPLIT
from data_pipeline.cohort.texts import decode_text, parse_sidecar
from data_pipeline.shards.scan_table import LOCATION_COLUMNS
from data_pipeline.volume.errors import BadScan
from infra.errors import UserError

# Names that keys and tables use for the four entities.
ENTITIES = {
    "participant_id": ("participant_id", "sub", "subject", "participant"),
    "session": ("session", "ses", "session_id"),
    "run": ("run", "run_id"),
    "dataset": ("dataset", "study", "ds", "source"),
}
PREFIXES = ("sub-", "ses-", "run-")
OLDEST = 130  # years
RESERVED = (*LOCATION_COLUMNS, "codec")  # the manifest's columns; a table's columns with these names are ignored


def parse_key(key: str, pattern: str | None = None) -> dict[str, str]:
    """Return the entities of a sample's key, as in ``abide_sub-01_ses-1_run-1``, in any order, with or without folders.

    Args:
        key: the key. Words without a hyphen before the participant name the data set.
        pattern: regular expression with named groups for keys of another form.

    Raises:
        BadScan: if the key names no participant.
    """
    if pattern is not None:
        match = re.search(pattern, key)
        entities = {name: str(value) for name, value in (match.groupdict() if match else {}).items() if value}
    else:
        entities = _entities(key)
    if "participant_id" not in entities:
        raise BadScan(
            "its key names no participant; expected <dataset>_sub-<id>_ses-<id>, or a form given with --key-pattern"
        )
    return entities


def check_pattern(pattern: str | None) -> None:
    """Raise UserError if a --key-pattern is invalid or has no group for the participant."""
    if pattern is None:
        return
    try:
        groups = set(re.compile(pattern).groupindex)
    except re.error as error:
        raise UserError(f"--key-pattern={pattern!r} is not a regular expression: {error}") from None
    if "participant_id" not in groups or groups - set(ENTITIES):
        raise UserError(
            f"--key-pattern={pattern!r} has the groups {', '.join(sorted(groups)) or 'none'}; "
            f"it needs (?P<participant_id>...) and may have {', '.join(list(ENTITIES)[1:])}"
        )


def _entities(key: str) -> dict[str, str]:
    words = {alias: name for name, aliases in ENTITIES.items() for alias in aliases}
    entities: dict[str, str] = {}
    dataset_words: list[str] = []
    for part in re.split(r"[_/]", key):
        label, hyphen, value = part.partition("-")
        if hyphen and value and label.lower() in words:
            entities.setdefault(words[label.lower()], value)
        elif part and "participant_id" not in entities:
            dataset_words.append(part)
    if dataset_words:
        entities.setdefault("dataset", "_".join(dataset_words))
    return entities


@dataclass
class People:
    """The rows of a participants' table by participant. A row may apply to a single session, run or data set."""

    path: str
    rows: dict[str, list[dict[str, Any]]]

    def find(self, entities: Mapping[str, str]) -> dict[str, Any]:
        """Return the values of the row that matches a scan. Raises BadScan if none does, or if several different rows do."""
        description = ", ".join(f"{name} {value}" for name, value in entities.items())
        rows = self.rows.get(entities["participant_id"], [])
        for name in ("dataset", "session", "run"):
            if name in entities:
                rows = [row for row in rows if row.get(name) in (None, entities[name])]
        if not rows:
            raise BadScan(f"{description} is not in {self.path.rpartition('/')[2]}")
        first = {name: value for name, value in rows[0].items() if name not in ("session", "run")}
        if any({n: v for n, v in row.items() if n not in ("session", "run")} != first for row in rows[1:]):
            raise BadScan(f"{description} has {len(rows)} different rows in {self.path.rpartition('/')[2]}")
        return first


def read_people(content: bytes, path: str, sidecar: bytes | None = None) -> People:
    """Read a participants.tsv, which may have a row per session, and check ages and sexes.

    Args:
        content: the file's bytes.
        path: its name for error messages.
        sidecar: the bytes of the JSON file beside it, whose ``Units`` and ``Levels`` are applied; None if there is none.

    Raises:
        UserError: if it is not a table, or a value is invalid.
    """
    text = decode_text(content, path, "a tab-separated table")
    try:
        table = pd.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a tab-separated table: {' '.join(str(error).split())}") from None
    if "participant_id" not in table.columns:
        raise UserError(f"{path} has no column participant_id; found: {', '.join(table.columns)}")
    aliases = {alias: name for name, words in ENTITIES.items() for alias in words if name not in table.columns}
    table = table.rename(columns=aliases).drop(columns=[name for name in RESERVED if name in table.columns])
    table = table.apply(lambda column: column.str.strip())
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise UserError(f"{path} has several columns for {repeated[0]}; keep one of them")
    table_path = Path(path)
    described = {} if sidecar is None else parse_sidecar(sidecar, str(table_path.with_suffix(".json")))
    sidecars = Sidecars({table_path.with_suffix(".json"): described})
    for name in [column for column in table.columns if column not in (*ENTITIES, *UNITS)]:
        words = SEX_WORDS if name == "sex" else ()
        table[name] = [
            text if text.lower() in words else sidecars.label(table_path, str(name), text)[0] or text
            for text in table[name]
        ]
    texts = (*TEXT_COLUMNS, *ENTITIES)
    numeric = {name for name in table.columns if name not in texts and is_numeric(str(name), _cells(path, table[name]))}
    _check_splits(path, table)
    rows: dict[str, list[dict[str, Any]]] = {}
    for line, record in enumerate(table.to_dict("records"), start=2):
        values = {str(k): _value(path, line, str(k), str(v), str(k) in numeric) for k, v in record.items()}
        for name in UNITS:
            unit = sidecars.unit(name, table_path, name)
            if unit and isinstance(values.get(name), float):
                values[name] /= UNITS[name][unit]
        if not 0 <= (values.get("age") or 0) <= OLDEST:
            raise UserError(f"{path} line {line}: age={record['age']!r} is not a number of years in 0..{OLDEST}; "
                            "write n/a if unknown")  # fmt: skip
        rows.setdefault(str(values.pop("participant_id")), []).append(values)
    return People(path, rows)


def _cells(path: str, column: pd.Series[str]) -> list[tuple[str | None, str]]:
    """The texts of a column, None where missing, and their places."""
    return [(None if text in MISSING else text, f"{path} line {line}") for line, text in enumerate(column, start=2)]


def _check_splits(path: str, table: pd.DataFrame) -> None:
    """Raise UserError if some rows have a split and others none: people declared as test must not be trained on."""
    missing = table[SPLIT].isin(MISSING) if SPLIT in table.columns else pd.Series(dtype=bool)
    if missing.any() and not missing.all():
        line = int(missing.to_numpy().argmax()) + 2
        raise UserError(f"{path} line {line}: split is missing, while other rows have one; write it")


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
    age = parse_number(text)
    if age is None:
        raise UserError(f"{path} line {line}: age={text!r} is not a number of years in 0..130; write n/a if unknown")
    return age
