"""From a cohort as it comes (a folder, a table, a list of data sets) to scans: ``read_cohort``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.cohort.declarations import DataSet, declare, read_data_sets
from data_pipeline.cohort.layouts import (
    MODALITIES,
    OPENBHB,
    Scans,
    bids_images,
    cat12_maps,
    openbhb_arrays,
    read_bids_layout,
    read_cat12,
    read_csv,
    read_openbhb,
)
from data_pipeline.cohort.pseudonyms import pseudonymise, read_key
from data_pipeline.cohort.scan import Scan, safe
from infra.errors import UserError, nearest

LAYOUTS: dict[str, Callable[[DataSet, str], Scans]] = {
    "bids": read_bids_layout,
    "cat12": read_cat12,
    "openbhb": read_openbhb,
    "csv": read_csv,
}
# A file that shows that a folder has the layout.
SIGNS: dict[str, Callable[[Path], Iterable[Path]]] = {
    "bids": bids_images,
    "cat12": cat12_maps,
    "openbhb": lambda folder: (path for ending in OPENBHB.values() for path in openbhb_arrays(folder, ending)),
}
DATA_SETS, TABLES = (".yaml", ".yml"), (".csv", ".tsv", ".txt")


def read_cohort(
    source: str | Path,
    dataset: str | None = None,
    modality: str = "vbm",
    *,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
) -> Scans:
    """Scans of a cohort in the order of their keys, and those whose participant no table lists.

    Args:
        source: a folder, a table of paths (``.csv``, ``.tsv``), or a YAML file that lists data sets.
        dataset: name that every key begins with; by default the folder's or table's.
        modality: which of the images: ``vbm``, ``t1w`` or ``quasiraw`` (``csv`` takes every row).
        layout: one of ``LAYOUTS``; by default what the folder holds, refused where it could be two.
        columns: a YAML file that declares the columns and the rules of their values (of one data set).
        key_file: a secret of at least 16 bytes; participants' ids then are keyed hashes everywhere but in ``Scan.path``.

    Raises UserError where a folder, a table, a declaration or a value is wrong. No two scans have one key.
    """
    if modality not in MODALITIES:
        raise UserError(
            f"modality={modality!r} is not known{nearest(modality, MODALITIES)}; allowed: {', '.join(MODALITIES)}"
        )
    key = None if key_file is None else read_key(Path(key_file))
    known: list[Scan] = []
    unknown: list[Scan] = []
    for one in _sources(Path(source), dataset, layout, columns):
        its_known, its_unknown = LAYOUTS[one.layout or detect_layout(one.path)](one, modality)
        known += its_known
        unknown += its_unknown
    known = _one_kind_a_column(sorted(known, key=lambda scan: scan.key))
    _refuse_equal_keys(known, source)
    if key is not None:
        known, unknown = pseudonymise(known, key), pseudonymise(unknown, key)
    return known, unknown


def is_simulated(root: str | Path) -> bool:
    """Whether the description of the data set, or of one of those that a YAML file lists, says that it is simulated."""
    source = Path(root)
    if source.is_file() and source.suffix.lower() in DATA_SETS:
        return any(is_simulated(one.path) for one in read_data_sets(source))
    path = source / "dataset_description.json"
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")).get("Simulated", False))


def name_of(scans: Iterable[Scan], source: str | Path) -> str:
    """The name of the whole: the data set's, or that of the YAML file where there are several."""
    names = {scan.dataset for scan in scans}
    return names.pop() if len(names) == 1 else safe(Path(source).stem)


def detect_layout(path: Path) -> str:
    """The layout of a folder or table by what it holds; UserError naming both where it could be two."""
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return "csv"
        raise UserError(
            f"cohort {path} is not a folder; give one, a table of paths ({', '.join(TABLES)}) or a list of data sets "
            f"({', '.join(DATA_SETS)})"
        )
    if not path.is_dir():
        raise UserError(f"cohort {path} is not a folder; give the folder that holds participants.tsv")
    signs = {name: next(iter(look(path)), None) for name, look in SIGNS.items()}
    shown = {name: sign.relative_to(path) for name, sign in signs.items() if sign is not None}
    if len(shown) > 1:
        both = " or ".join(f"{name} ({sign})" for name, sign in shown.items())
        raise UserError(f"cohort {path} could be {both}; say which with --layout (in a list of data sets: layout:)")
    if not shown:
        raise UserError(
            f"cohort {path} has no layout that is known: no sub-*/[ses-*/]anat/*.nii.gz (bids), no mri/mwp1*.nii (cat12), "
            "no {train,val}/derivatives/sub-*/ses-*/*.npy (openbhb); list its files in a .csv with a column path"
        )
    return next(iter(shown))


def _sources(source: Path, dataset: str | None, layout: str | None, columns: str | Path | None) -> list[DataSet]:
    if source.is_file() and source.suffix.lower() in DATA_SETS:
        for option, value in (("dataset", dataset), ("layout", layout), ("columns", columns)):
            if value is not None:
                raise UserError(f"--{option}={value}: {source} lists data sets; declare it there, for each of them")
        found = read_data_sets(source)
    else:
        path = source.resolve()
        name = dataset or (path.stem if path.is_file() else path.name)
        one = DataSet(path, safe(name), layout or "", declared_in="the cohort")
        found = [one if columns is None else declare(one, Path(columns))]
    for one in found:
        if one.layout and one.layout not in LAYOUTS:
            where = one.declared_in + ": " if len(found) > 1 else ""
            raise UserError(
                f"{where}layout={one.layout!r} is not known{nearest(one.layout, LAYOUTS)}; allowed: {', '.join(LAYOUTS)}"
            )
    return found


def _refuse_equal_keys(scans: list[Scan], source: str | Path) -> None:
    for first, second in pairwise(scans):
        if first.key == second.key:
            number = sum(scan.key == first.key for scan in scans)
            raise UserError(
                f"cohort {source}: {number} files have the key {first.key}, such as {first.path} and {second.path}; name "
                "their runs _run-1, _run-2, or list the files to take in a .csv with a column path"
            )


def _one_kind_a_column(scans: list[Scan]) -> list[Scan]:
    """Where one data set's column is numbers and another's of that name is text, all of it is text."""
    kinds: dict[str, set[type[Any]]] = {}
    for scan in scans:
        for name, value in scan.extra.items():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
    mixed = {name for name, its in kinds.items() if len(its) > 1}
    if not mixed:
        return scans
    return [
        replace(scan, extra={n: f"{v:g}" if n in mixed and isinstance(v, float) else v for n, v in scan.extra.items()})
        for scan in scans
    ]
