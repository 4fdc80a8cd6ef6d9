"""Adds columns of a table to a built data set: a proxy or label that arrived later. No shard is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_pipeline.cohort.values import MISSING
from data_pipeline.shards import unfinished
from data_pipeline.shards.scan_table import LOCATION_COLUMNS
from data_pipeline.storage.manifest import Manifest, write_manifest
from data_pipeline.volume.grid import Grid
from infra.errors import UserError, nearest

IDS = ("dataset", "participant_id", "session")
# What the build itself wrote; a table may not change where a scan lies or on which side of a split.
OWN = (*LOCATION_COLUMNS, "run", "split", "voxels_sha256", *IDS)


def annotate_shards(
    shards: str | Path, table: str | Path, columns: Sequence[str] | None = None, *, replace: bool = False
) -> tuple[Manifest, dict[str, int]]:
    """Add ``columns`` (default: all) of a .tsv or .csv to the scan table; the new manifest, and known values a column.

    Rows are matched by ``participant_id``, and by ``session`` and ``dataset`` where the table has them. A column is numbers
    where every value is one, else text; scans without a row have it missing. ``replace`` allows columns that are there.
    The manifest gets a new digest, so a run that was begun goes on only with the old one; encoders of it can be judged
    on the new one. UserError where the table, a column or a value does not fit.
    """
    folder, path = Path(shards).resolve(), Path(table)
    with unfinished.locked(folder):
        old = Manifest.load(folder)
        given = _read(path)
        ids = [name for name in IDS if name in given]
        wanted = _wanted(path, given, columns, old, replace)
        left = old.scans[ids].astype(str)
        left["participant_id"] = left["participant_id"].str.removeprefix("sub-")
        found = left.merge(given[[*ids, *wanted]], on=ids, how="left", validate="many_to_one")
        if found[wanted].isna().all(axis=None):
            raise UserError(f"{path}: no row fits a scan of {folder}; compare its {', '.join(ids)} with the manifest's")
        scans = old.scans.assign(**{name: _typed(found[name]).to_numpy() for name in wanted})
        added = [*old.settings.get("annotated", []), {"columns": wanted, "table": path.name}]
        settings = {**old.settings, "annotated": added}
        new = write_manifest(folder, Grid.from_dict(old.grid), settings, old.shards, scans, replaces=True)
    return new, {name: int(found[name].notna().sum()) for name in wanted}


def _read(path: Path) -> pd.DataFrame:
    """The table as text, ids without their prefixes, missing values as None; each participant (and session) once."""
    if not path.is_file():
        raise UserError(f"{path} is missing; give a .tsv or .csv with a column participant_id")
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table: {' '.join(str(error).split())}") from None
    table = table.rename(columns={"session_id": "session"}).apply(lambda column: column.str.strip())
    if "participant_id" not in table:
        raise UserError(f"{path} has no column participant_id; found: {', '.join(map(str, table.columns))}")
    table["participant_id"] = table["participant_id"].str.removeprefix("sub-")
    if "session" in table:
        table["session"] = table["session"].str.removeprefix("ses-")
    ids = [name for name in IDS if name in table]
    twice = table[table.duplicated(ids)]
    if len(twice):
        shown = ", ".join(f"{name} {twice[name].iloc[0]!r}" for name in ids)
        raise UserError(
            f"{path} line {twice.index[0] + 2}: {shown} is there twice; keep one row each, or add a column session"
        )
    known: pd.DataFrame = table.mask(table.isin(MISSING), None)
    return known


def _wanted(
    path: Path, given: pd.DataFrame, columns: Sequence[str] | None, old: Manifest, replace: bool
) -> list[str]:  # fmt: skip
    there = [str(name) for name in given.columns if name not in IDS]
    wanted = list(columns) if columns else there
    if not wanted:
        raise UserError(f"{path} has no column beside {', '.join(given.columns)}; add the one that shall be known")
    for name in wanted:
        if name in OWN:
            raise UserError(f"{path}: column {name!r} is the build's own; give it another name")
        if name not in there:
            raise UserError(f"{path} has no column {name!r}{nearest(name, there)}; there: {', '.join(there)}")
        if name in old.scans and not replace:
            raise UserError(
                f"{path}: {old.root} has a column {name!r} already; give --replace, or choose others by --columns"
            )
    return wanted


def _typed(column: pd.Series[str]) -> pd.Series[float] | pd.Series[str]:
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if bool((numbers.notna() == column.notna()).all()) else column
