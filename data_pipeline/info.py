"""``yaware shards info``: what a data set holds, from its manifest alone.

Reads the few columns that it needs by pyarrow, without pandas and the imaging libraries, so that a million scans are told
of within two seconds of the command. The scan table's checksum is verified all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.manifest_file import is_simulated, read_checked

COUNTED = ("dataset", "site", "sex", "split", "diagnosis")  # columns whose values are counted
MOST_SHOWN = 12  # values of a column that the text names
DECADE = 10


def shards_info(root: str | Path) -> dict[str, Any]:
    """Counts, ages in years, sizes in bytes; the keys are those that ``--json`` prints. UserError as ``Manifest.load``."""
    content, table = read_checked(root)
    source = pq.ParquetFile(pa.BufferReader(table))
    names = set(source.schema_arrow.names)
    texts = [name for name in (*COUNTED, "participant_id") if name in names]
    # Codes instead of a million Python strings.
    scans = pq.read_table(pa.BufferReader(table), columns=[*texts, "age"], read_dictionary=texts)
    people = _people(scans)
    sizes = np.array([int(shard["bytes"]) for shard in content["shards"]])
    settings, splits = content["settings"], _codes(scans["split"])
    return {
        "root": str(root),
        "digest": content["digest"],
        "modality": settings["modality"],
        "scaling": settings["scaling"],
        "codec": settings["codec"],
        "simulated": is_simulated(settings),
        "grid": content["grid"],
        "scans": scans.num_rows,
        "participants": int(people.max(initial=-1)) + 1,
        "quarantined": sum(int(p.get("quarantined", 0)) for p in (settings, *settings.get("appended", []))),
        "shards": {"count": len(sizes), "bytes": int(sizes.sum()), "smallest": int(sizes.min()), "largest": int(sizes.max())},
        "table_bytes": len(table),
        "age": _ages(scans["age"]),
        "counts": {name: _counts(scans[name]) for name in COUNTED if name in names},
        "splits": {
            str(name): {"scans": int((splits[0] == n).sum()), "participants": len(np.unique(people[splits[0] == n]))}
            for n, name in enumerate(splits[1])
        },
        "appended": [{key: part[key] for key in ("dataset", "scans")} for part in settings.get("appended", [])],
    }  # fmt: skip


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[Any]]:
    """(N,) number of each row's value, and the values; missing ones and empty texts are a value of their own."""
    whole = column.combine_chunks().cast(pa.dictionary(pa.int32(), pa.string())) if column.num_chunks else None
    if whole is None or isinstance(whole, pa.ChunkedArray):
        whole = pa.array(column.to_pylist(), pa.string()).dictionary_encode()
    codes = whole.indices.fill_null(len(whole.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)
    values = [value or "missing" for value in whole.dictionary.to_pylist()]
    return codes, [*values, "missing"]


def _people(scans: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(N,) a number for every row's participant; two data sets may both have a sub-01."""
    ids, values = _codes(scans["participant_id"])
    datasets, _ = _codes(scans["dataset"])
    joined = datasets * (len(values) + 1) + ids
    _, numbers = np.unique(joined, return_inverse=True)
    return numbers.astype(np.int64)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Scans per value, the most frequent first."""
    codes, values = _codes(column)
    found: dict[str, int] = {}
    for value, count in zip(values, np.bincount(codes, minlength=len(values)), strict=True):
        if count:
            found[str(value)] = found.get(str(value), 0) + int(count)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _ages(column: pa.ChunkedArray) -> dict[str, Any]:
    ages = pc.cast(column, pa.float64()).to_numpy()
    known = ages[np.isfinite(ages)]
    decades, counts = np.unique(known // DECADE, return_counts=True)
    figures = (
        {"mean": known.mean(), "sd": known.std(ddof=1), "min": known.min(), "max": known.max()}
        if len(known) > 1
        else {}
    )
    return {
        **{name: float(value) for name, value in figures.items()},
        "missing": len(ages) - len(known),
        "decades": {f"{int(d) * DECADE}-{int(d) * DECADE + DECADE - 1}": int(n) for d, n in zip(decades, counts, strict=True)},
    }  # fmt: skip


def run_info(root: str, as_json: bool = False) -> int:
    """Print what ``shards_info`` finds, for people or as JSON."""
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
        f"{shards['bytes'] / 1e6:.1f} MB; {info['quarantined']} left out",
        "shards": f"{shards['smallest'] / 1e6:.1f} to {shards['largest'] / 1e6:.1f} MB each, "
        f"scan table {info['table_bytes'] / 1e6:.1f} MB",
        "grid": f"{' x '.join(map(str, grid['shape']))} voxels of {' x '.join(f'{v:g}' for v in grid['spacing'])} mm",
        "age": (f"{age['mean']:.1f} ± {age['sd']:.1f} years ({age['min']:.0f} to {age['max']:.0f}), " if "mean" in age else "")
        + f"{age['missing']} missing",
        "decades": ", ".join(f"{name}: {count}" for name, count in age["decades"].items()),
        "sex": _shown(counts["sex"]),
        "sites": f"{len(counts['site'])}: {_shown(counts['site'])}",
        "splits": ", ".join(
            f"{n} {s['scans']} ({s['participants']} participants)" for n, s in info["splits"].items() if s["scans"]
        ),
        "digest": info["digest"],
    }  # fmt: skip
    if "diagnosis" in counts:
        lines["diagnosis"] = _shown(counts["diagnosis"])
    if info["appended"]:
        lines["appended"] = ", ".join(f"{part['dataset']} {part['scans']}" for part in info["appended"])
    return lines


def _shown(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:MOST_SHOWN])
    return shown + (f" and {len(counts) - MOST_SHOWN} more" if len(counts) > MOST_SHOWN else "")
