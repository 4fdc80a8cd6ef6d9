"""What a scan table must hold: its columns, their types, and locations that lie inside the manifest's shards."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.volume.limits import largest_member
from infra.errors import UserError

if TYPE_CHECKING:  # `shards info` reads no table with pandas, whose import takes half a second
    import pandas as pd

MAX_CELLS = 2**27  # rows x columns, 1 GB of numbers


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


# Column -> (check of its Arrow type, the allowed types in words). A column without any value has Arrow's type null.
COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("shard", "offset", "size", "crc32c"), (pa.types.is_integer, "whole numbers")),
    **dict.fromkeys(("key", "participant_id", "dataset", "split"), (_is_text, "text")),
    "age": (_is_number, "numbers"),
    **dict.fromkeys(("session", "run", "site", "sex"), (lambda kind: True, "anything")),
}


def check_columns(file: pq.ParquetFile, content: dict[str, Any], where: str) -> None:
    """Check the number of rows and the columns of a scan table against its manifest, before the table is read.

    Args:
        file: the open table.
        content: of manifest.json.
        where: the table's path, for messages.

    Raises:
        UserError: naming the column that is missing or of a wrong type, or the numbers that differ.
    """
    schema, rows = file.schema_arrow, file.metadata.num_rows
    listed = sum(int(shard["scans"]) for shard in content["shards"])
    if not rows == int(content["scans"]["rows"]) == listed:
        raise UserError(
            f"{where} has {rows} rows, manifest.json says {content['scans']['rows']}, and its shards {listed}; "
            "build the shards again"
        )
    if rows * len(schema.names) > MAX_CELLS:
        raise UserError(
            f"{where} has {rows} rows of {len(schema.names)} columns; more than {MAX_CELLS} cells are not read"
        )
    for name, (is_allowed, allowed) in COLUMNS.items():
        if schema.names.count(name) != 1:
            found = "has two columns" if name in schema.names else "has no column"
            raise UserError(f"{where} {found} {name}; build the shards again")
        kind = schema.field(name).type
        if not is_allowed(kind):
            raise UserError(f"{where}: column {name} is of type {kind}, not {allowed}; build the shards again")


def open_table(table: Any, content: dict[str, Any], where: str) -> pq.ParquetFile:
    """Open and check a scan table. Raises UserError if it is not a Parquet file, or as ``check_columns`` does.

    Args:
        table: its bytes, or an Arrow reader of them.
        content: of manifest.json.
        where: the table's path, for messages.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(table))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where} is not a Parquet file ({_line(error)}); build the shards again") from None
    check_columns(file, content, where)
    return file


def read_table(table: bytes, content: dict[str, Any], where: str) -> pd.DataFrame:
    """Read and check a scan table. Raises UserError, naming the column and the first row that is wrong."""
    file = open_table(table, content, where)
    try:
        scans: pd.DataFrame = file.read().to_pandas()
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({_line(error)}); build the shards again") from None
    scans = scans.reset_index(drop=True)  # whatever index the file's metadata names
    lost = [name for name in COLUMNS if name not in scans.columns]
    if lost:
        raise UserError(f"{where} has no column {lost[0]}; build the shards again")
    _check_locations(scans, content, where)
    return scans


def _check_locations(scans: pd.DataFrame, content: dict[str, Any], where: str) -> None:
    """Check that every scan has its place in a shard, and a key of its own."""
    for name in ("key", "participant_id", "dataset", "split", "shard", "offset", "size", "crc32c"):
        _refuse(scans[name].isna().to_numpy(), scans, name, where, "a value")
    _refuse(np.isinf(scans["age"].to_numpy(np.float64, na_value=np.nan)), scans, "age", where, "finite")
    shards, most = content["shards"], largest_member(prod(content["grid"]["shape"]))
    columns = {name: scans[name].to_numpy() for name in ("shard", "offset", "size", "crc32c")}
    limits = {"shard": (0, len(shards) - 1), "offset": (0, 2**50), "size": (1, most), "crc32c": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        _refuse((columns[name] < low) | (columns[name] > high), scans, name, where, f"in {low}..{high}")
    numbers = columns["shard"].astype(np.int64)
    sizes = np.array([int(shard["bytes"]) for shard in shards], dtype=np.int64)
    ends = columns["offset"].astype(np.int64) + columns["size"].astype(np.int64)
    _refuse(ends > sizes[numbers], scans, "offset", where, "inside its shard")
    counts = np.bincount(numbers, minlength=len(shards))
    for shard, count in zip(shards, counts, strict=True):
        if int(shard["scans"]) != count:
            raise UserError(
                f"{where} has {count} scans of {shard['name']}, manifest.json says {shard['scans']}; build the shards again"
            )
    _refuse(scans["key"].duplicated().to_numpy(), scans, "key", where, "a key that no other row has")


def _refuse(wrong: NDArray[Any], scans: pd.DataFrame, name: str, where: str, allowed: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        value = repr(scans[name].iloc[row : row + 1].tolist()[0])[:80]
        raise UserError(f"{where}, row {row}: {name}={value} is not {allowed}; build the shards again")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
