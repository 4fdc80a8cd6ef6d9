"""Adds columns of a table, such as a proxy or label that arrives later, to a built data set. No shard changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.cells import MISSING, is_numeric
from data_pipeline.cohort.sidecars import UNITS, Sidecars
from data_pipeline.cohort.table_file import read_rows
from data_pipeline.cohort.tables import without_prefix
from data_pipeline.shards import unfinished
from data_pipeline.shards.scan_table import LOCATION_COLUMNS
from data_pipeline.storage.manifest import Manifest, write_manifest
from data_pipeline.volume.grid import Grid
from infra.errors import UserError, nearest

IDS = ("dataset", "participant_id", "session")
# Columns that the build writes. A table must not change where a scan's bytes are or to which split it belongs.
RESERVED = (*LOCATION_COLUMNS, "run", "split", "voxels_sha256", *IDS)


def annotate_shards(
    shards: str | Path, table: str | Path, columns: Sequence[str] | None = None, *, replace: bool = False
) -> tuple[Manifest, dict[str, int]]:
    """Add columns of a .tsv or .csv file to the scan table; return the new manifest and the known values per column.

    Rows are matched by ``participant_id``, and by ``session`` and ``dataset`` if the table has these columns. A column is
    numeric if every value is a number, else text. Scans without a row have missing values. The manifest gets a new digest, so
    a run that has begun can continue only with the old manifest; its encoders can be evaluated on the new one.

    Args:
        shards: the folder of the shards.
        table: the file.
        columns: names of the columns to add; None for all.
        replace: allow columns that the scan table has already.

    Raises:
        UserError: if the table cannot be read, a column is missing, reserved or there already, or no row matches a scan.
    """
    folder, path = Path(shards).resolve(), Path(table)
    with unfinished.locked(folder):
        old = Manifest.load(folder)
        rows, places = _read(path)
        ids = [name for name in IDS if name in rows]
        names = _columns_to_add(path, rows, columns, old, replace)
        scan_ids = old.scans[ids].astype(str)
        scan_ids["participant_id"] = scan_ids["participant_id"].str.removeprefix("sub-")
        typed = rows[ids].assign(**{name: _typed(rows, places, name, old, path) for name in names})
        matched = scan_ids.merge(typed, on=ids, how="left", validate="many_to_one")
        if matched[names].isna().all(axis=None):
            raise UserError(
                f"{path}: no row matches a scan of {folder}; compare its {', '.join(ids)} with the manifest's"
            )
        scans = old.scans.assign(**{name: matched[name].to_numpy() for name in names})
        added = [*old.settings.get("annotated", []), {"columns": names, "table": path.name}]
        settings = {**old.settings, "annotated": added}
        new = write_manifest(folder, Grid.from_dict(old.grid), settings, old.shards, scans, replaces=True)
    return new, {name: int(matched[name].notna().sum()) for name in names}


def _read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the table as text, with ids without prefixes and missing values as None, and the place of each row.

    Raises UserError if the file is not a table, or a participant (and session) appears twice.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; give a .tsv or .csv file with a column participant_id")
    rows = read_rows(path, ["participant_id"], None if path.suffix.lower() == ".csv" else "\t")
    table = pd.DataFrame([row.values for row in rows], dtype=str)
    table = table.rename(columns={"session_id": "session"}).apply(lambda column: column.str.strip())
    table["participant_id"] = table["participant_id"].str.removeprefix("sub-")
    if "session" in table:
        table["session"] = table["session"].map(lambda text: without_prefix(text, "ses-"))
    ids = [name for name in IDS if name in table]
    places = [row.where for row in rows]
    repeated = table[table.duplicated(ids)]
    if len(repeated):
        first = ", ".join(f"{name} {repeated[name].iloc[0]!r}" for name in ids)
        raise UserError(
            f"{places[repeated.index[0]]}: {first} appears twice; keep one row each, or add a column session"
        )
    with_missing: pd.DataFrame = table.mask(table.isin(MISSING), None)
    return with_missing, places


def _columns_to_add(
    path: Path, rows: pd.DataFrame, columns: Sequence[str] | None, old: Manifest, replace: bool
) -> list[str]:  # fmt: skip
    """Return the names of the columns to add after checking them."""
    available = [str(name) for name in rows.columns if name not in IDS]
    names = list(columns) if columns else available
    if not names:
        raise UserError(f"{path} has no column besides {', '.join(rows.columns)}; add a column with values")
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


def _typed(rows: pd.DataFrame, places: Sequence[str], name: str, old: Manifest, path: Path) -> pd.Series[Any]:
    """A column as numbers or text, by the rules of ``data_pipeline.cohort.cells``; ages in years.

    Raises UserError if a column of numbers has a text; the message names the cell.
    """
    column: pd.Series[Any] = rows[name].astype(object)
    known = [None if text is None or text != text else str(text) for text in column]
    declared = "number" if name == "age" else ""
    if not declared and name in old.scans and pd.api.types.is_string_dtype(old.scans[name].dropna()):
        declared = "text"
    cells = list(zip(known, places, strict=True))
    if not is_numeric("age in years" if name == "age" else name, cells, declared, declarable=False):
        return pd.Series(known, index=rows.index, dtype=object)
    numbers = pd.Series([math.nan if text is None else float(text) for text in known], index=rows.index)
    unit = Sidecars(place="").unit(name, path, name)
    if unit:
        numbers /= UNITS[name][unit]
    if name == "age" and ((numbers < 0) | (numbers > 130)).any():
        row = int(((numbers < 0) | (numbers > 130)).to_numpy().argmax())
        raise UserError(f"{places[row]}: age={known[row]!r} is not a number of years in 0..130; write n/a if unknown")
    return numbers
