"""Read a table of features as people and programs write it: text, Parquet or NumPy; FreeSurfer's and CAT12's tables too.

A row names its scan by one of

- ``key``, the key of the scan in the shards;
- ``participant_id``, with ``session``, ``run`` and ``dataset`` where they are needed;
- the first column of FreeSurfer's ``asegstats2table`` (``Measure:volume``) and ``aparcstats2table`` (``lh.aparc.thickness``),
  which holds names of subjects' folders, or the column ``names`` of CAT12, which holds names of files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.cohort.cells import (
    DECIMAL_COMMA,
    MISSING,
    Text,
    is_numeric,
    known_name,
    number_as_text,
    parse_number,
)
from data_pipeline.cohort.column_names import looks_like_age
from data_pipeline.cohort.table_file import parse_rows
from data_pipeline.cohort.tables import SESSION_COLUMNS, session_column_of
from data_pipeline.cohort.texts import read_text
from infra.errors import UserError
from infra.files import regular_file

TEXT_ENDINGS = (".tsv", ".csv", ".txt", ".dat", ".table")  # FreeSurfer's users write .txt, .dat and .table
ENDINGS = (".tsv", ".csv", ".parquet", ".npz", *TEXT_ENDINGS[2:])
# First cell of FreeSurfer's tables: Measure:volume, lh.aparc.thickness, rh.aparc.a2009s.area, lh.aparc.DKTatlas.volume.
FREESURFER = re.compile(r"Measure:\w+|[lr]h\.\S+\.[A-Za-z0-9_]+")
NAMES = "names"  # CAT12's column of file names
NAME = "name"  # in Sheet.ids: a text that holds participant, session and run
IDENTITY = ("key", "participant_id", "session", "run", "dataset")
PREDICTED = "predicted_"  # first part of the name of a column that is a prediction
# Columns that describe a person or a scan and are no features of the image.
DESCRIPTIONS = frozenset({"age", "sex", "site", "diagnosis", "split", "path"})


@dataclass(frozen=True)
class Sheet:
    """A table of features.

    Attributes:
        name: for messages.
        ids: ``key``, ``participant_id``, ``session``, ``run``, ``dataset`` or NAME -> a text for each of the R rows.
        where: name and line of each row, for messages.
        columns: names of the F features.
        values: (R, F) float64; NaN where a cell has no value.
        descriptions: columns that describe people or scans, which are not features.
        texts: columns that hold text, which are not features.
        notes: lines about the reading.
    """

    name: str
    ids: dict[str, list[str]]
    where: list[str]
    columns: list[str]
    values: NDArray[np.float64]
    descriptions: list[str]
    texts: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _Cells:
    """The cells of a table: columns of texts, or of numbers where the file holds numbers."""

    name: str
    where: list[str]
    columns: dict[str, list[str] | NDArray[Any]]
    notes: list[str]


def read_sheet(source: Path | pd.DataFrame, *, predictions: bool = False) -> Sheet:
    """Read a table of features: a file with one of ENDINGS, or a pandas table.

    With ``predictions``, columns named ``predicted_...`` are read too, whatever they predict.

    Raises UserError with one line that names file, row and column if the table cannot be used.
    """
    if isinstance(source, pd.DataFrame):
        return _sheet(_cells_of_frame(source, "the DataFrame"), predictions)
    if source.is_dir():
        raise UserError(f"{source} is a folder, not a table of features; name checkpoints before --features")
    if not source.exists():
        raise UserError(f"{source} does not exist; give a table of features ({', '.join(ENDINGS)})")
    ending = source.suffix.lower()
    if ending not in ENDINGS:
        raise UserError(
            f"{source}: a table of features cannot end in {ending or 'nothing'!r}; allowed: {', '.join(ENDINGS)}"
        )
    regular_file(source)
    reader = {".parquet": _cells_of_parquet, ".npz": _cells_of_npz}.get(ending, _cells_of_text)
    return _sheet(reader(source), predictions)


def _cells_of_text(path: Path) -> _Cells:
    text = read_text(path, "a table")
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((mark for mark in "\t,;" if mark in first), None)
    if delimiter is None and len(first.split()) > 1:  # FreeSurfer's --delimiter=space
        text, delimiter = "\n".join("\t".join(line.split()) for line in text.splitlines()), "\t"
    header, rows = parse_rows(text, path, path.name, (), delimiter or "\t")
    if not rows:
        raise UserError(f"{path.name} has a header and no rows; it needs a row for each scan")
    columns: dict[str, list[str] | NDArray[Any]] = {}
    for column in header:
        # R and pandas write row numbers under an empty name.
        columns[column] = [row.values[column].strip() for row in rows]
    notes = _read_decimal_commas(columns, path.name) if delimiter == ";" else []
    return _Cells(path.name, [row.where for row in rows], columns, notes)


def _read_decimal_commas(columns: dict[str, list[str] | NDArray[Any]], name: str) -> list[str]:
    """Replace decimal commas by points in a table with semicolons, which German and French programs write so.

    Only if no number of the table has a point: in such a table a comma could separate thousands.
    """
    cells = [cell for values in columns.values() for cell in values]
    if any("." in cell and parse_number(cell) is not None for cell in cells):
        return []
    count = 0
    for column, values in columns.items():
        commas = [bool(DECIMAL_COMMA.fullmatch(cell)) for cell in values]
        if column not in IDENTITY and any(commas):
            count += sum(commas)
            columns[column] = [
                cell.replace(",", ".") if comma else cell for cell, comma in zip(values, commas, strict=True)
            ]
    return [f"{name}: {count} decimal commas of a table with semicolons are read as points"] if count else []


def _cells_of_parquet(path: Path) -> _Cells:
    try:
        table = pd.read_parquet(regular_file(path))
    except Exception as error:  # pyarrow raises many types of errors for damaged files
        raise UserError(
            f"{path.name} cannot be read as Parquet ({' '.join(str(error).split())[:120]}); write it again"
        ) from None
    return _cells_of_frame(table, path.name)


def _cells_of_frame(table: pd.DataFrame, name: str) -> _Cells:
    """The cells of a pandas table; an index with a name is a column."""
    if any(level is not None for level in table.index.names):
        table = table.reset_index()
    names = [known_name(str(column)) for column in table.columns]
    repeated = sorted({column for column in names if names.count(column) > 1})
    if repeated:
        raise UserError(f"{name}: column {repeated[0]!r} appears twice; keep one of them")
    if not len(table):
        raise UserError(f"{name} has no rows; it needs a row for each scan")
    columns: dict[str, list[str] | NDArray[Any]] = {}
    for number, column in enumerate(names):
        values = table.iloc[:, number]
        is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        if is_number and column not in (*IDENTITY, *SESSION_COLUMNS, NAMES):
            columns[column] = values.to_numpy(np.float64, na_value=np.nan)
        else:
            columns[column] = ["" if pd.isna(value) else _as_text(value) for value in values]
    return _Cells(name, [f"{name} row {row}" for row in range(1, len(table) + 1)], columns, [])


def _as_text(value: Any) -> str:
    return number_as_text(float(value)) if isinstance(value, float | np.floating) else str(value).strip()


def _cells_of_npz(path: Path) -> _Cells:
    """The cells of an .npz file: ``features`` (R, F), ``key`` (R,) or other names, and perhaps ``columns`` (F,)."""
    try:
        with np.load(regular_file(path), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile and NumPy raise many types of errors for damaged files and pickled objects
        raise UserError(
            f"{path.name} cannot be read as arrays ({' '.join(str(error).split())[:120]}); write it with np.savez, without "
            "objects"
        ) from None
    fix = "an .npz file holds `features` (scans, F), `key` or `participant_id` (scans,), and perhaps `columns` (F,)"
    features = arrays.pop("features", None)
    if features is None or features.ndim != 2 or features.dtype.kind not in "fiu":
        found = (
            "no array `features`"
            if features is None
            else f"`features` of shape {features.shape} and type {features.dtype}"
        )
        raise UserError(f"{path.name} has {found}; {fix}")
    names = arrays.pop("columns", np.array([f"f{number}" for number in range(features.shape[1])]))
    wrong = {"columns": (names, features.shape[1])} | {name: (array, len(features)) for name, array in arrays.items()}
    for name, (array, count) in wrong.items():
        if array.shape != (count,):
            raise UserError(f"{path.name}: `{name}` has shape {array.shape}, but `features` {features.shape}; {fix}")
    table = pd.DataFrame(features, columns=[str(name) for name in names])
    for name, array in arrays.items():
        if name in table:
            raise UserError(f"{path.name}: {name!r} is an array and one of `columns`; keep one of them")
        table.insert(0, name, array.astype(str) if array.dtype.kind in "SU" else array)
    return _cells_of_frame(table, path.name)


def _sheet(cells: _Cells, predictions: bool) -> Sheet:
    """Divide the columns of a table into identity, features and others."""
    columns = dict(cells.columns)
    columns.pop("", None)  # row numbers, without a name
    ids = _identity(cells.name, columns)
    features, descriptions, texts = dict[str, NDArray[np.float64]](), list[str](), list[str]()
    for column, values in columns.items():
        numbers = values if isinstance(values, np.ndarray) else _numbers(column, values, cells.where)
        predicted = predictions and column.startswith(PREDICTED)
        if not predicted and (known_name(column) in DESCRIPTIONS or looks_like_age(column)):
            descriptions.append(column)
        elif numbers is None:
            texts.append(column)
        else:
            features[column] = numbers
    if not features:
        raise UserError(f"{cells.name} has no column of numbers beside {', '.join(ids)}; give a table of features")
    values = np.column_stack(list(features.values())).astype(np.float64)
    return Sheet(
        name=cells.name, ids=ids, where=cells.where, columns=list(features), values=values, descriptions=descriptions,
        texts=texts, notes=cells.notes,
    )  # fmt: skip


def _identity(name: str, columns: dict[str, list[str] | NDArray[Any]]) -> dict[str, list[str]]:
    """Take the columns that name the scans out of ``columns``. Raises UserError if there are none."""
    session = session_column_of(Path(name), columns)
    if session and session != "session":
        columns["session"] = columns.pop(session)
    if "key" not in columns and "participant_id" not in columns:
        first = next(iter(columns), "")
        named = NAMES if NAMES in columns else first if FREESURFER.fullmatch(first) else ""
        if not named or isinstance(columns[named], np.ndarray):
            raise UserError(
                f"{name} has no column key or participant_id, and is no table of FreeSurfer (first column such as "
                f"lh.aparc.thickness or Measure:volume) or CAT12 (column names); found: {', '.join(list(columns)[:6])}"
            )
        return {NAME: [str(text) for text in columns.pop(named)]}
    ids = {}
    for column in IDENTITY:
        if column in columns:
            ids[column] = [str(text) for text in columns.pop(column)]
    return ids


def _numbers(column: str, texts: Sequence[str], where: Sequence[str]) -> NDArray[np.float64] | None:
    """The numbers (R,) of a column, NaN where missing; None if the column holds text.

    Raises UserError if one of its cells is text and most are numbers.
    """
    cells: list[Text] = [(None if text in MISSING else text, place) for text, place in zip(texts, where, strict=True)]
    try:
        numeric = is_numeric(column, cells)
    except UserError as error:  # a table of features has no file with rules
        raise UserError(str(error).partition(", or declare")[0].partition(", declare")[0]) from None
    if all(text is None for text, _ in cells):
        return np.full(len(cells), np.nan)
    if not numeric:
        return None
    return np.array([np.nan if text is None else float(text) for text, _ in cells])
