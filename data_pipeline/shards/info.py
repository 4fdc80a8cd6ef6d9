"""``yaware shards info``: summarises a data set from its manifest.

It reads only the columns that it needs, with pyarrow instead of pandas and without the imaging libraries, so the command
summarises a million scans within two seconds. The scan table's checksum is verified.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.storage.licences import in_words, licences_in
from data_pipeline.storage.manifest_file import is_simulated, read_checked, table_path
from data_pipeline.storage.table_schema import open_table

COUNTED = ("dataset", "site", "sex", "split", "diagnosis")  # columns whose values are counted
MAX_VALUES = 12  # values of a column that the text names
DECADE = 10


def shards_info(root: str | Path) -> dict[str, Any]:
    """Return counts, ages in years and sizes in bytes, with the keys that ``--json`` prints.

    Raises UserError if the manifest or the scan table is missing or damaged.
    """
    content, table = read_checked(root)
    # Dictionary encoding avoids a million Python strings.
    names = set(open_table(table, content, str(table_path(root, content))).schema_arrow.names)
    texts = [*(name for name in COUNTED if name in names), "participant_id"]
    # Without threads: one that still runs when a short command ends aborts it (pyarrow 25, OMP_NUM_THREADS=1: 10 of 236).
    scans = pq.ParquetFile(pa.BufferReader(table), read_dictionary=texts).read([*texts, "age"], use_threads=False)
    people, people_of_split = _participants(scans)
    sizes = np.array([int(shard["bytes"]) for shard in content["shards"]])
    settings = content["settings"]
    counts = {name: _counts(scans[name]) for name in COUNTED if name in names}
    return {
        "root": str(root),
        "digest": content["digest"],
        "modality": settings["modality"],
        "scaling": settings["scaling"],
        "codec": settings["codec"],
        "simulated": is_simulated(settings),
        "grid": content["grid"],
        "scans": scans.num_rows,
        "participants": people,
        "quarantined": sum(int(p.get("quarantined", 0)) for p in (settings, *settings.get("appended", []))),
        "shards": {"count": len(sizes), "bytes": int(sizes.sum()), "smallest": int(sizes.min()), "largest": int(sizes.max())},
        "table_bytes": len(table),
        "age": _ages(scans["age"]),
        "counts": counts,
        "splits": {
            name: {"scans": counts["split"][name], "participants": number} for name, number in people_of_split.items()
        },
        "licences": licences_in(settings, (name for name in counts["dataset"] if name != "missing")),
        "appended": [{key: addition[key] for key in ("dataset", "scans")} for addition in settings.get("appended", [])],
    }  # fmt: skip


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray[Any, np.dtype[np.int64]], pa.Array]:
    """Return the code of each row's value, (N,), and the values; a missing value has the code after the last."""
    if not pa.types.is_dictionary(column.type):  # a numeric column, or an empty one
        column = pc.dictionary_encode(pc.cast(column, pa.string()))
    whole = column.unify_dictionaries()
    values = whole.chunk(0).dictionary if whole.num_chunks else pa.DictionaryArray.from_arrays([], []).dictionary
    parts = [_numbers(chunk.indices, len(values)).astype(np.int64) for chunk in whole.chunks]
    return np.concatenate([np.zeros(0, np.int64), *parts]), values


def _numbers(array: pa.Array, missing: float) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the values of an int32 or double array, ``missing`` for null. Arrow's ``to_numpy`` would import pandas."""
    valid, content = array.buffers()
    kind = np.float64 if pa.types.is_float64(array.type) else np.int32
    window = slice(array.offset, array.offset + len(array))
    values = np.frombuffer(content, dtype=kind)[window]
    if not array.null_count:
        return values
    return np.where(np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[window] > 0, values, kind(missing))


def _participants(scans: pa.Table) -> tuple[int, dict[str, int]]:
    """Return the number of participants, in total and per split; two data sets may both have a sub-01."""
    ids, values = _codes(scans["participant_id"])
    datasets, _ = _codes(scans["dataset"])
    splits, names = _codes(scans["split"])
    # One number per scan for (data set, id, split): sorting it is faster than a million tuples.
    triples = np.sort((datasets * (len(values) + 1) + ids) * (len(names) + 1) + splits)
    triples = triples[np.diff(triples, prepend=-1) > 0]
    people = int((np.diff(triples // (len(names) + 1), prepend=-1) > 0).sum())
    per_split = np.bincount(triples % (len(names) + 1), minlength=len(names))
    return people, {name: int(per_split[n]) for n, name in enumerate(names.to_pylist())}


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Return the number of scans per value, the most frequent first."""
    codes, names = _codes(column)
    values = [name or "missing" for name in (*names.to_pylist(), "missing")]
    counts: dict[str, int] = {}
    for value, count in zip(values, np.bincount(codes, minlength=len(values)), strict=True):
        if count:
            counts[str(value)] = counts.get(str(value), 0) + int(count)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _ages(column: pa.ChunkedArray) -> dict[str, Any]:
    chunks = pc.cast(column, pa.float64()).chunks
    ages = np.concatenate([np.zeros(0), *(_numbers(chunk, np.nan) for chunk in chunks)])
    known = ages[np.isfinite(ages)]
    decades, counts = np.unique(known // DECADE, return_counts=True)
    summary = (
        {"mean": known.mean(), "sd": known.std(ddof=1), "min": known.min(), "max": known.max()}
        if len(known) > 1
        else {}
    )
    return {
        **{name: float(value) for name, value in summary.items()},
        "missing": len(ages) - len(known),
        "decades": {f"{int(d) * DECADE}-{int(d) * DECADE + DECADE - 1}": int(n) for d, n in zip(decades, counts, strict=True)},
    }  # fmt: skip


def run_info(root: str, as_json: bool = False) -> int:
    """Print what ``shards_info`` returns, as text or as JSON; return the exit status 0."""
    info = shards_info(root)
    if as_json:
        print(json.dumps(info, indent=1))
        return 0
    for name, text in _lines(info).items():
        print(f"{name:<10} {text}")
    return 0


def _lines(info: dict[str, Any]) -> dict[str, str]:
    shards, grid, age, counts = info["shards"], info["grid"], info["age"], info["counts"]
    lines = {
        "data": f"{_shown(counts['dataset'])}; {info['modality']}, scaling {info['scaling']}, codec {info['codec']}"
        + (", simulated" if info["simulated"] else ""),
        "scans": f"{info['scans']} of {info['participants']} participants in {shards['count']} shards, "
        f"{shards['bytes'] / 1e6:.1f} MB; {info['quarantined']} excluded",
        "shards": f"{shards['smallest'] / 1e6:.1f} to {shards['largest'] / 1e6:.1f} MB each, "
        f"scan table {info['table_bytes'] / 1e6:.1f} MB",
        "grid": f"{' x '.join(map(str, grid['shape']))} voxels of {' x '.join(f'{v:g}' for v in grid['spacing'])} mm",
        "age": (f"{age['mean']:.1f} ± {age['sd']:.1f} years ({age['min']:.0f} to {age['max']:.0f}), " if "mean" in age else "")
        + f"{age['missing']} missing",
        "decades": ", ".join(f"{name}: {count}" for name, count in age["decades"].items()),
        "sex": _shown(counts["sex"]),
        "sites": f"{len(counts['site'].keys() - {'missing'})}: {_shown(counts['site'])}",
        "splits": ", ".join(
            f"{n} {s['scans']} ({s['participants']} participants)" for n, s in info["splits"].items()
        ),
        "licences": in_words(info["licences"]),
        "digest": info["digest"],
    }  # fmt: skip
    if "diagnosis" in counts:
        lines["diagnosis"] = _shown(counts["diagnosis"])
    if info["appended"]:
        lines["appended"] = ", ".join(f"{part['dataset']} {part['scans']}" for part in info["appended"])
    return lines


def _shown(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:MAX_VALUES])
    return shown + (f" and {len(counts) - MAX_VALUES} more" if len(counts) > MAX_VALUES else "")
