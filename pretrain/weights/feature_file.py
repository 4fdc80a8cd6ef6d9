"""A table of the features of many scans, written so that a killed run can be continued.

During the run each batch's features are appended to a hidden file beside the table. A second start reads them and embeds
only the missing scans. The table itself appears complete or not at all.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.declarations import DataSet
from data_pipeline.cohort.table_file import Row, read_rows
from data_pipeline.cohort.values import typed_values
from infra.errors import UserError
from infra.files import atomic_write, read_bytes, sha256_of
from pretrain.weights.embedding import embed_source, feature_table
from pretrain.weights.encoder import Encoder
from pretrain.weights.folder import find_encoder
from pretrain.weights.readouts import readouts_folder
from pretrain.weights.scan_source import ScanSource

FORMATS = (".tsv", ".parquet")
IMAGES = (".nii", ".nii.gz", ".mgz", ".npy")
TABLES = (".tsv", ".csv")
NO_SCANS = ("_mask", "_xfm")  # endings of BIDS names, before that of the format
# Scan -> its stamp (see ScanSource.stamp) and its features (F,).
Entries = dict[str, tuple[list[Any], NDArray[np.float32]]]
# What a source notes about scans while it reads them: the names of its attributes (ScanSource).
NOTES = ("unlike", "unusual", "voxels")
Notes = Mapping[str, Mapping[str, str]]  # scan -> its notes


class PartialFile:
    """The features computed so far, as JSON lines. The first line names the encoder and the options."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.partial")
        self.header = header

    def read(self) -> tuple[Entries, Notes]:
        """Return stamp and features by name, and notes.

        Both are empty if the file belongs to another encoder or other options.
        """
        lines = list(_json_lines(self.path))
        if not lines or lines[0] != self.header:
            return {}, {}
        entries = {
            entry["name"]: (entry["stamp"], np.frombuffer(base64.b64decode(entry["features"]), "<f4"))
            for entry in lines[1:]
        }
        return entries, {entry["name"]: {key: entry[key] for key in NOTES if key in entry} for entry in lines[1:]}

    def start(self, entries: Entries, notes: Notes) -> None:
        """Replace the file by one with these entries, without a last line that a kill cut short."""
        with atomic_write(self.path, "w") as stream:
            stream.write(json.dumps(self.header) + "\n")
        self.append(entries, notes)

    def append(self, entries: Entries, notes: Notes) -> None:
        """Add the features of a batch, and what was noted about its scans."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(
                _entry(name, stamp, features, notes.get(name, {})) for name, (stamp, features) in entries.items()
            )


def embed_to_file(
    encoder: str | Path, source: ScanSource, out: Path, *, loaded: Encoder | None = None, **options: Any
) -> tuple[pd.DataFrame, dict[str, str], int]:
    """Embed scans into a table. Unreadable scans are left out, and a killed run is continued.

    Args:
        encoder: an exported encoder, a checkpoint or a run folder.
        source: the scans.
        out: the table to write, ``.tsv`` or ``.parquet``; not written if no scan can be read.
        loaded: the encoder, if it has been loaded already.
        options: those of ``embed_source``; ``layer``, ``pooling`` and ``readouts`` must be those of the killed run to
            continue it.

    Returns:
        The table, the reason of each scan that cannot be read, and the number of scans taken from a killed run.
    """
    check_format(out)
    network = loaded or Encoder.from_pretrained(encoder)
    header: dict[str, Any] = {
        "encoder": sha256_of(find_encoder(encoder) / "checksums.json"), "layer": options.get("layer"),
        "pooling": list(options.get("pooling", ["mean"])),
    }  # fmt: skip
    if options.get("readouts") is not None:
        header["readouts"] = sha256_of(readouts_folder(find_encoder(encoder)) / "checksums.json")
    partial = PartialFile(out, header)
    stamps = [source.stamp(position) for position in range(len(source.names))]
    stored, notes = partial.read()
    computed = {
        name: stored[name]
        for name, stamp in zip(source.names, stamps, strict=True)
        if name in stored and stored[name][0] == stamp
    }
    for key in NOTES:
        getattr(source, key).update({name: notes[name][key] for name in computed if key in notes[name]})
    partial.start(computed, notes)
    continued = len(computed)
    missing = [position for position, name in enumerate(source.names) if name not in computed]
    unreadable: dict[str, str] = {}
    with closing(embed_source(network.network, source, missing, **options)) as batches:
        for batch in batches if missing else ():
            entries = {
                source.names[position]: (stamps[position], features)
                for position, features in zip(batch.positions, batch.features, strict=True)
            }
            partial.append(entries, {name: _notes(source, name) for name in entries})
            computed |= entries
            unreadable |= {source.names[position]: reason for position, reason in batch.unreadable.items()}
    readable = [name for name in source.names if name in computed]
    features = np.stack([computed[name][1] for name in readable]) if readable else np.empty((0, 0), np.float32)
    table = feature_table(readable, features, source.index, options.get("readouts"))
    if readable:
        write_table(table, out)
    partial.path.unlink()
    return table, unreadable, continued


def check_format(out: Path) -> None:
    """Raise UserError unless a table's name ends in .tsv or .parquet."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out={out}: the name must end in {' or '.join(FORMATS)}")


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table of features; the first column is the scan's path or key."""
    with atomic_write(out) as stream:
        if out.suffix == ".parquet":
            table.reset_index().to_parquet(stream, index=False)
        else:
            stream.write(to_tsv(table).encode())


def to_tsv(table: pd.DataFrame) -> str:
    """Return a table of features as tab-separated text with six significant digits."""
    return str(table.to_csv(sep="\t", float_format="%.6g"))


def find_scans(places: Sequence[Path], tiv: bool = True) -> pd.DataFrame:
    """Return a table with a column ``path``, and ``tiv`` if a table has it, of the scans at some places.

    Args:
        places: image files; folders, searched for .nii, .nii.gz, .mgz and .npy files in all their subfolders (hidden ones,
            masks and transforms left out); and .tsv or .csv tables with a column ``path``, relative to the table's folder.
        tiv: read the column ``tiv`` of tables, by the rules of cohorts' tables, in ml.

    Raises:
        UserError: if a folder holds no image, or a table has no column ``path``.
    """
    return pd.concat([_scans_at(place, tiv) for place in places], ignore_index=True)


def _is_scan(name: str) -> bool:
    """Whether a file of this name (in small letters) is an image, and no mask or transform of one."""
    return name.endswith(IMAGES) and not name.partition(".")[0].endswith(NO_SCANS)


def _scans_at(place: Path, tiv: bool) -> pd.DataFrame:
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if _is_scan(path.name.lower()) and path.is_file())
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(place).parts)]
        if not paths:
            raise UserError(f"{place} holds no {' or '.join(IMAGES)} file; give the folder of the scans")
        return pd.DataFrame({"path": [str(path) for path in paths]})
    if place.suffix.lower() not in TABLES:
        return pd.DataFrame({"path": [str(place)]})
    rows = read_rows(place, ["path"], None)
    if not rows:
        raise UserError(f"{place} has a header and no rows; add a row for each scan")
    for row in rows:
        if row.values["path"].strip() in MISSING:
            raise UserError(f"{row.where}: path is empty; every row needs the path of a scan")
    table = pd.DataFrame({"path": [str(place.parent / row.values["path"].strip()) for row in rows]})
    if tiv and "tiv" in rows[0].values:
        table["tiv"] = _head_sizes(place, rows)
    return table


def _head_sizes(place: Path, rows: Sequence[Row]) -> list[float]:
    """Total intracranial volumes in ml, NaN where missing, read as a build reads them; raises UserError naming a wrong cell."""
    cells = [Row({"tiv": row.values["tiv"]}, row.where, row.table) for row in rows]
    source = DataSet(place, place.name, types={"tiv": "number"}, declared_in=place.name)
    try:
        values, _ = typed_values(cells, source)
    except UserError as error:  # a table for embed has no file with rules
        raise UserError(str(error).partition(", or declare")[0]) from None
    return [math.nan if row["tiv"] is None else float(row["tiv"]) for row in values]


def _notes(source: ScanSource, name: str) -> dict[str, str]:
    return {key: getattr(source, key)[name] for key in NOTES if name in getattr(source, key)}


def _entry(name: str, stamp: list[Any], features: NDArray[np.float32], notes: Mapping[str, str]) -> str:
    encoded = base64.b64encode(features.astype("<f4").tobytes()).decode()
    return json.dumps({"name": name, "stamp": stamp, "features": encoded, **notes}) + "\n"


def _json_lines(path: Path) -> Iterator[Any]:
    """Yield the lines of a file up to one that a kill cut short; nothing if there is no file."""
    if path.exists():
        for line in read_bytes(path).decode().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
