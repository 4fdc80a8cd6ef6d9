"""Adds columns of a table, such as a proxy or label that arrives later, to a built data set. No shard changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.cells import TEXT_COLUMNS, known_name
from data_pipeline.cohort.column_names import columns_to_read
from data_pipeline.cohort.declarations import ALL, DataSet, declare, licence_text
from data_pipeline.cohort.split import SPLIT
from data_pipeline.cohort.table_file import Row, read_rows
from data_pipeline.cohort.tables import session_column_of, without_prefix
from data_pipeline.cohort.values import typed_values
from data_pipeline.shards import unfinished
from data_pipeline.shards.scan_table import LOCATION_COLUMNS, text_columns
from data_pipeline.storage.licences import with_licences
from data_pipeline.storage.manifest import Manifest, write_manifest
from data_pipeline.volume.grid import Grid
from infra.errors import UserError, nearest

IDS = ("dataset", "participant_id", "session")
# Columns that the build writes. A table must not change where a scan's bytes are or to which split it belongs.
RESERVED = (*LOCATION_COLUMNS, "run", "split", "voxels_sha256", *IDS)


def annotate_shards(
    shards: str | Path,
    table: str | Path,
    columns: Sequence[str] | None = None,
    *,
    replace: bool = False,
    rules: str | Path | None = None,
) -> tuple[Manifest, dict[str, int]]:
    """Add columns of a .tsv or .csv file to the scan table; return the new manifest and the known values per column.

    Rows are matched by ``participant_id``, and by ``session`` and ``dataset`` if the table has these columns. Cells are read
    as those of a cohort's table: with the JSON file beside it, and with declared rules. Scans without a row have missing
    values. The manifest gets a new digest, so a run that has begun can continue only with the old manifest; its encoders can be
    evaluated on the new one.

    Args:
        shards: the folder of the shards.
        table: the file.
        columns: names of the columns to add; None for all.
        replace: allow columns that the scan table has already.
        rules: a YAML file that declares columns and the rules for their values, see ``docs/cohorts.md``.

    Raises:
        UserError: if the table cannot be read, a column is missing, reserved or there already, or no row matches a scan.
    """
    folder, path = Path(shards).resolve(), Path(table)
    with unfinished.locked(folder):
        old = Manifest.load(folder)
        source = _source(path, None if rules is None else Path(rules), old)
        rows, ids = _read(path, source)
        theirs = columns_to_read(source, rows)
        constants = [name for name, rule in source.values.items() if isinstance(rule, str)]
        names = _columns_to_add(path, list(dict.fromkeys([*theirs, *constants])), columns, old, replace)
        values, _ = typed_values(rows, _narrowed(source, names, theirs, SPLIT in rows[0].values))
        typed = ids.assign(**{name: _series([row[name] for row in values]) for name in names})
        keys = [str(name) for name in ids.columns]
        scan_ids = old.scans[keys].astype(str)
        scan_ids["participant_id"] = scan_ids["participant_id"].str.removeprefix("sub-")
        matched = scan_ids.merge(typed, on=keys, how="left", validate="many_to_one")
        if matched[names].isna().all(axis=None):
            raise UserError(
                f"{path}: no row matches a scan of {folder}; compare its {', '.join(keys)} with the manifest's"
            )
        scans = old.scans.assign(**{name: matched[name].to_numpy() for name in names})
        added = [*old.settings.get("annotated", []), {"columns": names, "table": path.name}]
        settings = {**old.settings, "annotated": added}
        new = write_manifest(folder, Grid.from_dict(old.grid), settings, old.shards, scans, replaces=True)
    return new, {name: int(matched[name].notna().sum()) for name in names}


def state_licences(shards: str | Path, licences: Mapping[str, str], *, replace: bool = False) -> Manifest:
    """Record the licences of data sets whose own files state none, and return the new manifest; it gets a new digest.

    Args:
        shards: the folder of the shards.
        licences: name of a data set -> the name or the terms of its licence.
        replace: allow data sets that have a licence already.

    Raises:
        UserError: if the shards have no such data set, a licence has no words or too many, or is there already.
    """
    folder = Path(shards).resolve()
    with unfinished.locked(folder):
        old = Manifest.load(folder)
        known = old.licences()
        stated = {name: licence_text(text, f"licence of {name}") for name, text in licences.items()}
        for name, text in stated.items():
            if name not in known:
                raise UserError(
                    f"{folder} has no data set {name!r}{nearest(name, known)}; its data sets: {', '.join(known)}"
                )
            if known[name] not in ([], [text]) and not replace:
                raise UserError(
                    f"{folder}: the licence of {name} is {' and '.join(known[name])} already; give --replace to change it"
                )
        settings = with_licences(old.settings, stated, "yaware shards annotate")
        return write_manifest(folder, Grid.from_dict(old.grid), settings, old.shards, old.scans, replaces=True)


def _series(values: Sequence[Any]) -> pd.Series[Any]:
    """Values of a column as numbers, or as text with None where missing."""
    numeric = any(isinstance(value, float) for value in values)
    return pd.Series(
        [math.nan if value is None and numeric else value for value in values], dtype=None if numeric else object
    )


def _source(path: Path, rules: Path | None, old: Manifest) -> DataSet:
    """The table as a data set with its rules; columns that are text in the scan table are read as text."""
    text = tuple(name for name in text_columns(old.scans) if name not in TEXT_COLUMNS)
    source = DataSet(path, path.name, declared_in="a YAML file given with --rules", declared=True)
    source = source if rules is None else declare(source, rules)
    if source.licence:
        raise UserError(f"{rules}: licence is no rule for a column; remove it, and give --licence NAME=TEXT")
    return dataclasses.replace(source, text=text)


def _narrowed(source: DataSet, names: Sequence[str], theirs: Mapping[str, str], has_split: bool) -> DataSet:
    """The data set with some of its columns and their rules only: no error comes from a column that is not added."""
    rules: dict[str, Any] = {
        key: {name: rule for name, rule in getattr(source, key).items() if name in (*names, ALL)}
        for key in ("values", "missing", "default", "cap", "units", "types")
    }
    rules |= {"only": tuple(name for name in source.only if name in (*names, ALL)), "left_out": (SPLIT,) * has_split}
    columns = {name: theirs[name] for name in names if name in theirs}
    return dataclasses.replace(source, columns=columns, age=source.age if "age" in names else {}, **rules)


def _read(path: Path, source: DataSet) -> tuple[list[Row], pd.DataFrame]:
    """Return the rows of the table, and the ids of each without prefixes: ``participant_id`` and others of ``IDS``.

    Raises UserError if the file is not a table, has no rows, or a participant (and session) appears twice.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; give a .tsv or .csv file with a column participant_id")
    key, session = source.column("participant_id"), (source.columns or {}).get("session", "")
    required = [key, *([session] if session else [])]
    rows = read_rows(path, required, None if path.suffix.lower() == ".csv" else "\t")
    if not rows:
        raise UserError(f"{path} has a header and no rows; add a row for each participant")
    ids = {"participant_id": [row.values[key].strip().removeprefix("sub-") for row in rows]}
    session = session or session_column_of(path, rows[0].values)
    if session:
        ids["session"] = [without_prefix(row.values[session], "ses-") for row in rows]
    if "dataset" in rows[0].values:
        ids["dataset"] = [row.values["dataset"].strip() for row in rows]
    table = pd.DataFrame(ids)
    repeated = table[table.duplicated()]
    if len(repeated):
        first = ", ".join(f"{name} {repeated[name].iloc[0]!r}" for name in ids)
        raise UserError(
            f"{rows[repeated.index[0]].where}: {first} appears twice; keep one row each, or add a column session"
        )
    return rows, table


def _columns_to_add(
    path: Path, available: Sequence[str], columns: Sequence[str] | None, old: Manifest, replace: bool
) -> list[str]:  # fmt: skip
    """Return the names of the columns to add after checking them."""
    names = [known_name(name) for name in columns] if columns else list(available)
    if not names:
        raise UserError(f"{path} has no column besides those of ids; add a column with values")
    for name in names:
        if name in RESERVED:
            raise UserError(f"{path}: column {name!r} is written by the build; rename it")
        if name not in available:
            raise UserError(
                f"{path} has no column {name!r}{nearest(name, available)}; available: {', '.join(available)}"
            )
        if name in old.scans and not replace:
            raise UserError(
                f"{path}: {old.root} has a column {name!r} already; give --replace, or choose others with --columns"
            )
    return names
