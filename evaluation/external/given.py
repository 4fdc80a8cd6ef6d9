"""Features that were computed elsewhere, as candidates of an evaluation: complete for its scans, and in one scale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.storage.manifest import Manifest
from evaluation.external.rows import NO_SCAN, ScanIndex, few, rows_of_scans
from evaluation.external.sheet import Sheet, read_sheet
from evaluation.features.tables import WIDE
from evaluation.tasks.tasks import Task
from infra.errors import PATH, TEXT, UserError, check_arguments
from infra.files import sha256_of

Source = str | os.PathLike[str] | pd.DataFrame
Tables = Source | Sequence[Source] | Mapping[str, Source | Sequence[Source]]


@dataclass(frozen=True)
class Part:
    """One file of features: row of the manifest -> its row in the file, for messages; and the number of its columns."""

    where: dict[int, str]
    columns: int


@dataclass(frozen=True)
class GivenFeatures:
    """Features of scans that no encoder of this project computed.

    Attributes:
        name: of the candidate.
        kind: ``table`` or ``adapter``.
        source: the files or the adapter, for MLflow.
        digest: SHA-256 of the files, or of the adapter's features.
        columns: names of the F features.
        values: (scans of the manifest, F) float64; NaN where a scan has no value.
        parts: name of each file -> its part, in the order of the columns.
        adapter: computes the features (``adapters.computed``); None: they are known.
    """

    name: str
    kind: str
    source: str
    digest: str
    columns: list[str]
    values: NDArray[np.float64]
    parts: dict[str, Part]
    adapter: Any = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the manifest that all files have, ascending."""
        common = set.intersection(*(set(part.where) for part in self.parts.values()))
        return np.array(sorted(common), dtype=np.int64)

    def cell(self, row: int, column: int) -> str:
        """Return the place of a feature of a row of the manifest, for messages."""
        last = np.cumsum([part.columns for part in self.parts.values()])
        part = list(self.parts.values())[int(np.searchsorted(last, column, side="right"))]
        return f"{part.where[row]}: {self.columns[column]}"

    def of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the features (n, F) of rows of the manifest, with mean 0 and variance 1 over them.

        Models scale every feature by the training scans; this only brings units such as mm and mm³ near each other. More than
        WIDE features are float32.
        """
        values = self.values[rows]
        deviation = values.std(0)
        constant = deviation <= 1e-12 * np.abs(values).max(0, initial=0.0)
        scaled = np.where(constant, 0.0, (values - values.mean(0)) / np.where(constant, 1.0, deviation))
        return scaled.astype(np.float32) if scaled.shape[1] > WIDE else scaled


def read_tables(
    tables: Tables | None,
    name: str | Sequence[str] | None,
    manifest: Manifest,
    *,
    common: bool = False,
    predictions: bool = False,
) -> list[GivenFeatures]:
    """Read tables of features and join their rows to the scans of the shards.

    Args:
        tables: a file or DataFrame; several, whose columns are put side by side; or name -> such files, for several
            candidates.
        name: of the candidate, or of each; by default that of its first file.
        manifest: of the shards.
        common: rows of other scans may be there, and are counted in a printed line.
        predictions: read columns named ``predicted_...`` too, whatever they predict.

    Raises:
        UserError: if a table cannot be read or joined; the message names file, row and column.
    """
    if tables is None:
        if name:
            raise UserError(f"name={name!r} names a table of features; give one with features")
        return []
    index = ScanIndex(manifest)
    return [
        _join(
            title,
            [read_sheet(_path(source), predictions=predictions) for source in sources],
            sources,
            index,
            common=common,
        )
        for title, sources in _named(tables, name).items()
    ]


def _named(tables: Tables, name: str | Sequence[str] | None) -> dict[str, list[Source]]:
    """Return name -> files of each candidate. Raises UserError if a name is empty or there are no files."""
    if isinstance(tables, Mapping):
        if name:
            raise UserError(f"name={name!r}: the tables are named by the keys of features; leave out name")
        named = {str(key): _listed(value) for key, value in tables.items()}
    else:
        files = _listed(tables)
        first = files[0] if files else ""
        default = "table" if isinstance(first, pd.DataFrame) else Path(first).stem
        if name is not None:
            check_arguments(TEXT, name=name)
        named = {str(name or default): files}
    if not named or not all(title.strip() and files for title, files in named.items()):
        raise UserError(f"features={tables!r:.80} names no table; give a file (.tsv, .csv, .parquet, .npz)")
    return named


def _listed(value: Any) -> list[Source]:
    return [value] if isinstance(value, str | os.PathLike | pd.DataFrame) else list(value)


def _path(source: Source) -> Path | pd.DataFrame:
    if isinstance(source, pd.DataFrame):
        return source
    check_arguments(PATH, features=source)
    return Path(source)


def _join(
    name: str, sheets: Sequence[Sheet], sources: Sequence[Source], index: ScanIndex, *, common: bool
) -> GivenFeatures:
    """Put the columns of tables side by side, by scan; print what is not used of them."""
    columns, parts = list[str](), dict[str, Part]()
    blocks: list[NDArray[np.float64]] = []
    digest = hashlib.sha256()
    for sheet, source in zip(sheets, sources, strict=True):
        places = rows_of_scans(sheet, index, others_allowed=common)
        used = places != NO_SCAN
        _print_reading(name, sheet, int((~used).sum()))
        values = np.full((len(index.names), len(sheet.columns)), np.nan)
        values[places[used]] = sheet.values[used]
        title = sheet.name if sheet.name not in parts else str(source)
        if title in parts:
            raise UserError(f"features: {source} is named twice; name it once")
        blocks.append(_new_columns(name, sheet, values, columns, blocks))
        where = {int(places[row]): sheet.where[row] for row in np.flatnonzero(used)}
        parts[title] = Part(where, blocks[-1].shape[1])
        digest.update(_digest(source).encode())
    values = np.concatenate(blocks, axis=1)
    return GivenFeatures(
        name=name, kind="table", source=", ".join(parts), digest=digest.hexdigest(), columns=columns, values=values, parts=parts
    )  # fmt: skip


def _new_columns(
    name: str, sheet: Sheet, values: NDArray[np.float64], columns: list[str], blocks: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return the columns of a table that no earlier table has with the same values, and add their names to ``columns``.

    FreeSurfer writes eTIV into every table. Columns of one name and other values, as of CAT12's tissues, are kept apart.
    """
    earlier = np.concatenate(blocks, axis=1) if blocks else np.empty((len(values), 0))
    kept, repeated = [], []
    for number, column in enumerate(sheet.columns):
        places = [place for place, known in enumerate(columns) if known == column]
        if any(np.array_equal(values[:, number], earlier[:, place], equal_nan=True) for place in places):
            repeated.append(column)
        else:
            kept.append(number)
    if repeated:
        print(f"evaluate: {name}: {sheet.name} repeats {few(repeated)} of an earlier table; used once")
    columns += [sheet.columns[number] for number in kept]
    return values[:, kept]


def _print_reading(name: str, sheet: Sheet, others: int) -> None:
    for note in sheet.notes:
        print(f"evaluate: {name}: {note}")
    for words, columns in (("describe people", sheet.descriptions), ("hold text", sheet.texts)):
        if columns:
            print(f"evaluate: {name}: {sheet.name}: columns that {words} are not used as features: {few(columns)}")
    if others:
        print(
            f"evaluate: {name}: {others} rows of {sheet.name} are no scans of the shards and are left out (--common-scans)"
        )


def _digest(source: Source) -> str:
    if isinstance(source, pd.DataFrame):
        return hashlib.sha256(source.to_csv().encode()).hexdigest()
    return sha256_of(source)


def missing_rows(given: Sequence[GivenFeatures], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows of the manifest, (n,), lack features of one of the candidates."""
    lacking = np.zeros(len(rows), dtype=bool)
    for features in given:
        lacking |= ~np.isin(rows, features.rows)
    return lacking


def check_complete(given: Sequence[GivenFeatures], manifest: Manifest, rows: NDArray[np.int64]) -> None:
    """Raise UserError naming scans of ``rows`` without features, and how to evaluate without them."""
    keys = manifest.scans["key"]
    for features in given:
        for title, part in features.parts.items():
            lacking = [row for row in rows if int(row) not in part.where]
            if lacking:
                names = few([str(key) for key in keys.iloc[lacking]])
                raise UserError(
                    f"{features.name}: {title} has no features of {len(lacking)} of the {len(rows)} scans of the tasks "
                    f"({names}); add them, or give --common-scans to evaluate everything on the scans that all have"
                )


def check_values(given: Sequence[GivenFeatures], tasks: Sequence[Task], rows: NDArray[np.int64]) -> None:
    """Check the features of the scans ``rows`` of all tasks.

    Raises UserError naming the cell if one has no value or is infinite, or naming the column if it is the label of a task.
    """
    for features in given:
        values = features.values[rows]
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            row, column = wrong[0]
            found = "no value" if np.isnan(values[row, column]) else "an infinite value"
            more = f" (and {len(wrong) - 1} other cells)" if len(wrong) > 1 else ""
            raise UserError(
                f"{features.cell(int(rows[row]), int(column))} has {found}{more}; every scan needs a number in "
                "every column: correct the cell, or remove its column, or its row and give --common-scans"
            )
        for task in tasks:
            copies = copies_of_label(features.values[task.rows], task)
            if len(copies):
                title = features.columns[int(copies[0])]
                raise UserError(
                    f"{features.name}: column {title!r} of {features.source} is the label of task {task.name}; remove it"
                )


def copies_of_label(values: NDArray[np.float64], task: Task) -> NDArray[np.int64]:
    """Return which columns of features (n, F) of a task's scans are its label, up to their scale or the numbers of classes."""
    if task.kind == "regression":
        labels = (task.labels - task.labels.mean()) / (task.labels.std() or 1.0)
        deviation = values.std(0)
        scaled = (values - values.mean(0)) / np.where(deviation == 0, 1.0, deviation)
        return np.flatnonzero(np.abs(labels @ scaled) / len(labels) > 1 - 1e-9)
    own = [values[task.labels == code] for code in np.unique(task.labels)]
    constant = np.flatnonzero(np.logical_and.reduce([(part == part[0]).all(0) for part in own]))
    firsts = np.array([part[0] for part in own])
    return constant[[len(np.unique(firsts[:, column])) == len(own) for column in constant]]
