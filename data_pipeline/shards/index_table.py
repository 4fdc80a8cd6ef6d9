"""Assigns samples of foreign shards to participants: entities from the key, values from the table beside the shards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.declarations import DataSet, declare
from data_pipeline.cohort.sidecars import Sidecars
from data_pipeline.cohort.table_file import Row, parse_rows
from data_pipeline.cohort.texts import decode_text, parse_sidecar
from data_pipeline.cohort.values import RowOwners, typed_values
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


def read_people(content: bytes, path: str, sidecar: bytes | None = None, rules: Path | None = None) -> People:
    """Read a participants.tsv, which may have a row per session, by the rules of cohorts' tables.

    Args:
        content: the file's bytes.
        path: its name for error messages.
        sidecar: the bytes of the JSON file beside it, whose ``Units`` and ``Levels`` are applied; None if there is none.
        rules: a YAML file that declares columns and the rules for their values (``--columns``).

    Raises:
        UserError: if it is not a table, or a value or a rule is invalid.
    """
    text = decode_text(content, path, "a tab-separated table")
    header, lines = parse_rows(text, Path(path), path)
    table = pd.DataFrame([line.values for line in lines], columns=header, dtype=str)
    source = DataSet(Path(path), Path(path).name, declared_in="the table")
    source = source if rules is None else declare(source, rules)
    for ours in ENTITIES:
        if ours in (source.columns or {}) and source.column(ours) in table.columns:
            table = table.rename(columns={source.column(ours): ours})
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
    names = [str(name) for name in table.columns if name not in ENTITIES]
    records = [{str(name): str(value) for name, value in record.items()} for record in table.to_dict("records")]
    lines = [
        Row({name: record[name] for name in names}, line.where, table_path)
        for line, record in zip(lines, records, strict=True)
    ]
    owners = [f"{_entity(record.get('dataset', '')) or ''}/{_entity(record['participant_id'])}" for record in records]
    sidecars = Sidecars({table_path.with_suffix(".json"): described})
    typed, _ = typed_values(lines, source, sidecars, RowOwners(owners, {}))
    rows: dict[str, list[dict[str, Any]]] = {}
    for record, values in zip(records, typed, strict=True):
        if "path" in names and source.columns is None:  # in a cohort's table it names files; here it is data
            values["path"] = None if record["path"] in MISSING else record["path"]
        entities = {name: _entity(record[name]) for name in ENTITIES if name in record}
        rows.setdefault(str(entities.pop("participant_id")), []).append({**entities, **values})
    return People(path, rows)


def declared_licences(columns: str | Path | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the setting ``licences`` of an index of scans ``rows``; empty if the declaration ``columns`` states no licence.

    Raises UserError if it states one and the scans are of several data sets.
    """
    licence = "" if columns is None else declare(DataSet(Path(columns), ""), Path(columns)).licence
    names = sorted({str(row["dataset"]) for row in rows})
    if not licence or columns is None:
        return {}
    if len(names) > 1:
        raise UserError(
            f"{columns}: licence is that of one data set, the scans are of {len(names)} ({', '.join(names[:3])}); "
            "remove it, and state each with yaware shards annotate INDEX --licence NAME=TEXT"
        )
    return {"licences": {name: {"licence": licence, "stated_in": Path(columns).name} for name in names}}


def _entity(text: str) -> str | None:
    """A participant, session, run or data set without its prefix; None if it is missing."""
    if text in MISSING:
        return None
    return text[4:] if text.startswith(PREFIXES) else text
