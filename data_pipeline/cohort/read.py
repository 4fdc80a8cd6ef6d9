"""Read the scans of a cohort: a folder, a table of paths, or a list of data sets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.cohort.cells import MISSING, number_as_text
from data_pipeline.cohort.declarations import DataSet, declare, licence_text, read_data_sets
from data_pipeline.cohort.layouts import (
    MODALITIES,
    OPENBHB,
    CohortScans,
    bids_images,
    cat12_maps,
    openbhb_arrays,
    read_bids_layout,
    read_cat12,
    read_csv,
    read_openbhb,
)
from data_pipeline.cohort.pseudonyms import pseudonymise, read_key
from data_pipeline.cohort.scan import Scan, check_readable, safe_name
from data_pipeline.cohort.split import KNOWN_SPLITS, SPLIT, check_declared_splits
from data_pipeline.cohort.texts import read_sidecar, warn
from infra.errors import OPTIONAL_PATH, OPTIONAL_TEXT, PATH, UserError, check_arguments, nearest

LAYOUTS: dict[str, Callable[[DataSet, str], CohortScans]] = {
    "bids": read_bids_layout,
    "cat12": read_cat12,
    "openbhb": read_openbhb,
    "csv": read_csv,
}
# Layout -> function that finds the files which identify it in a folder.
SIGNS: dict[str, Callable[[Path], Iterable[Path]]] = {
    "bids": bids_images,
    "cat12": cat12_maps,
    "openbhb": lambda folder: (path for ending in OPENBHB.values() for path in openbhb_arrays(folder, ending)),
}
# Endings of files that list data sets, and of tables of paths.
DATA_SETS, TABLES = (".yaml", ".yml"), (".csv", ".tsv", ".txt")
DESCRIPTION = "dataset_description.json"
DATA_SETS_FILE = "datasets.yaml"  # in a folder of several data sets, as ``cohort prepare`` writes it


def read_cohort(
    source: str | Path,
    dataset: str | None = None,
    modality: str = "vbm",
    *,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
) -> tuple[list[Scan], list[Scan]]:
    """Read the scans of a cohort. Every scan has a unique key.

    Args:
        source: a folder, a table of paths (``.csv``, ``.tsv``), or a YAML file that lists data sets.
        dataset: the name with which every key begins; default: the name of the folder or table.
        modality: ``vbm`` (grey-matter maps), ``t1w`` or ``quasiraw``; layout ``csv`` reads every row.
        layout: one of ``LAYOUTS``; default: detected from the content of the folder.
        columns: a YAML file that declares the columns and the rules for their values, for one data set.
        key_file: a file with a secret of at least 16 bytes; participants' ids are then replaced by keyed hashes everywhere
            but in ``Scan.path``.

    Returns:
        The scans sorted by key, and the scans that no table lists.

    Raises:
        UserError: a folder, a table, a declaration or a value is wrong, the layout is ambiguous, two files have one key, or
            a table declares several splits for one participant.
    """
    check_arguments(PATH, source=source)
    check_arguments(OPTIONAL_TEXT, dataset=dataset, layout=layout)
    check_arguments(OPTIONAL_PATH, columns=columns, key_file=key_file)
    return read_with_changes(source, dataset, modality, layout=layout, columns=columns, key_file=key_file)[:2]


def read_with_changes(
    source: str | Path,
    dataset: str | None = None,
    modality: str = "vbm",
    *,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
    text: Collection[str] = (),
    number: Collection[str] = (),
) -> CohortScans:
    """Read the scans of a cohort as ``read_cohort`` does, and the cells of its tables that a rule changed.

    ``text`` names columns that are read as text even if they hold numbers only, because the shards hold text; the columns
    ``number`` must hold numbers, because the shards do.

    Raises UserError as ``read_cohort`` does, and if a column of ``number`` holds other texts.
    """
    if modality not in MODALITIES:
        raise UserError(
            f"modality={modality!r} is not known{nearest(modality, MODALITIES)}; allowed: {', '.join(MODALITIES)}"
        )
    key = None if key_file is None else read_key(Path(key_file))
    data_sets = [
        replace(_as_text(data_set, text), number=tuple(number))
        for data_set in _data_sets(Path(source), dataset, layout, columns)
    ]
    cohorts = [_read(data_set, modality) for data_set in data_sets]
    mixed = _mixed_columns([scan for cohort in cohorts for scan in cohort.scans])
    if mixed:  # read again, because a number does not keep the text that it was written in
        cohorts = [_read(_as_text(data_set, mixed), modality) for data_set in data_sets]
    scans = sorted((_texts(scan, mixed) for cohort in cohorts for scan in cohort.scans), key=lambda scan: scan.key)
    unlisted = [scan for cohort in cohorts for scan in cohort.unlisted]
    changes = [change for cohort in cohorts for change in cohort.changes]
    without_scan = [row for cohort in cohorts for row in cohort.without_scan]
    _check_unique_keys(scans, source)
    splits = check_declared_splits((f"{scan.dataset}/{scan.participant_id}", scan.extra.get(SPLIT)) for scan in scans)
    for name in sorted({*splits.values()} - {*KNOWN_SPLITS}):
        warn(f"split {name!r} is none of {', '.join(KNOWN_SPLITS)}; only recipes and tasks that name it use its scans")
    if key is not None:
        scans, unlisted = pseudonymise(scans, key), pseudonymise(unlisted, key)
        changes = [change._replace(before="") for change in changes]  # the text of a cell may hold an id
        without_scan = [row.partition(":")[0] for row in without_scan]
    return CohortScans(scans, unlisted, changes, without_scan)


def _read(data_set: DataSet, modality: str) -> CohortScans:
    """Read the scans of one data set."""
    return LAYOUTS[data_set.layout or detect_layout(data_set.path)](data_set, modality)


def _as_text(data_set: DataSet, columns: Collection[str]) -> DataSet:
    """The data set with more columns that are read as text."""
    return replace(data_set, text=(*data_set.text, *columns)) if columns else data_set


def _texts(scan: Scan, columns: Collection[str]) -> Scan:
    """The scan with text in some columns, also where a report and not a table gave the number."""
    numbers = {name: value for name, value in scan.extra.items() if name in columns and isinstance(value, float)}
    if not numbers:
        return scan
    return replace(scan, extra={**scan.extra, **{name: number_as_text(value) for name, value in numbers.items()}})


def is_simulated(root: str | Path) -> bool:
    """Whether dataset_description.json of the data set, or of one that a YAML file lists, says that it is simulated."""
    source = _listing(Path(root))
    if source.is_file() and source.suffix.lower() in DATA_SETS:
        return any(is_simulated(data_set.path) for data_set in read_data_sets(source))
    return bool(read_sidecar(source / DESCRIPTION).get("Simulated", False))


def preparations_of(root: str | Path, name: str) -> dict[str, dict[str, Any]]:
    """How ``cohort prepare`` made the scans of each data set, from its dataset_description.json; others are left out.

    Args:
        root: the cohort's folder, table or list of data sets.
        name: of a single data set.

    Returns:
        Name of a data set -> ``recipe``: all parameters and their version; ``libraries``: name -> version.
    """
    source = _listing(Path(root))
    if source.is_file() and source.suffix.lower() in DATA_SETS:
        found: dict[str, dict[str, Any]] = {}
        for data_set in read_data_sets(source):
            found |= preparations_of(data_set.path, data_set.name)
        return found
    described = read_sidecar(source / DESCRIPTION)
    recipe, programs = described.get("Preparation"), described.get("GeneratedBy")
    if not isinstance(recipe, dict):
        return {}
    named = [program for program in programs if isinstance(program, dict)] if isinstance(programs, list) else []
    libraries = {str(program["Name"]): str(program.get("Version", "")) for program in named if "Name" in program}
    return {name: {"recipe": recipe, "libraries": libraries}}


def origins_of(
    root: str | Path, name: str, dataset: str | None = None, columns: str | Path | None = None
) -> dict[str, Any]:
    """What a manifest records of the data sets of a cohort: ``preparations`` and ``licences``, each only if there are any.

    ``name`` is that of the cohort; the other arguments are those of ``licences_of``.
    """
    found = {"preparations": preparations_of(root, name), "licences": licences_of(root, dataset, columns)}
    return {key: stated for key, stated in found.items() if stated}


def licences_of(
    root: str | Path, dataset: str | None = None, columns: str | Path | None = None
) -> dict[str, dict[str, str]]:
    """The licence of each data set of a cohort that states one, in the data set's own words.

    It is declared (``licence``), or the field ``License`` of dataset_description.json. If both are there and differ, the
    declared one is taken and a warning names both. A derivative that states none has that of the raw data set around it.

    Args:
        root: the cohort's folder, table or list of data sets.
        dataset: the name of a single data set.
        columns: the file that declares the columns of a single data set.

    Returns:
        Name of a data set -> ``licence``, and the name of the file it is ``stated_in``.
    """
    found = {data_set.name: _licence_of(data_set) for data_set in _data_sets(Path(root), dataset, None, columns)}
    return {name: stated for name, stated in found.items() if stated}


def _licence_of(data_set: DataSet) -> dict[str, str]:
    """The licence of a data set and where it is stated; empty if it states none."""
    own = _described_licence(data_set.path / DESCRIPTION)
    if data_set.licence:
        file = Path(data_set.declared_in.partition(": ")[0]).name
        if own not in ("", data_set.licence):
            warn(
                f"{data_set.name}: licence {data_set.licence!r} is declared in {file}, {DESCRIPTION} has License={own!r}; the "
                "declared one is recorded"
            )
        return {"licence": data_set.licence, "stated_in": file}
    raw = data_set.path.parent.parent if data_set.path.parent.name == "derivatives" else None
    around = "" if own or raw is None else _described_licence(raw / DESCRIPTION)
    if around:
        return {"licence": around, "stated_in": f"{DESCRIPTION} of the raw data set"}
    return {"licence": own, "stated_in": DESCRIPTION} if own else {}


def _described_licence(path: Path) -> str:
    """The field License of a dataset_description.json; empty if it has none, or what it has is no licence."""
    value = read_sidecar(path).get("License", "")
    if value is None or (isinstance(value, str) and value.strip() in MISSING):
        return ""
    try:
        return licence_text(value, f"{path}: License")
    except UserError as error:
        warn(f"{error}; it is taken as unknown")
        return ""


def _listing(source: Path) -> Path:
    """The list of the data sets in a folder that has one; else the path itself."""
    listing = source / DATA_SETS_FILE
    return listing if listing.is_file() else source


def name_of(scans: Iterable[Scan], source: str | Path) -> str:
    """The name of a cohort: that of its data set, or that of the YAML file if there are several data sets."""
    names = {scan.dataset for scan in scans}
    return names.pop() if len(names) == 1 else safe_name(Path(source).stem)


def detect_layout(path: Path) -> str:
    """Detect the layout of a folder or table from its content.

    Raises UserError if there is no known layout or more than one.
    """
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return "csv"
        raise UserError(
            f"cohort {path} is not a folder; give one, a table of paths ({', '.join(TABLES)}) or a list of data sets "
            f"({', '.join(DATA_SETS)})"
        )
    if not path.is_dir():
        raise UserError(f"cohort {path} is not a folder; give the folder that holds participants.tsv")
    signs = {name: next(iter(find(path)), None) for name, find in SIGNS.items()}
    matching = {name: sign.relative_to(path) for name, sign in signs.items() if sign is not None}
    if len(matching) > 1:
        candidates = " or ".join(f"{name} ({sign})" for name, sign in matching.items())
        raise UserError(
            f"cohort {path} could be {candidates}; choose one with --layout (in a list of data sets: layout:)"
        )
    if not matching:
        check_readable(child for child in (path, *path.iterdir()) if child.is_dir())
        raise UserError(
            f"cohort {path} has no known layout: no sub-*/[ses-*/]anat/*.nii.gz (bids), no mri/mwp1*.nii (cat12), "
            "no {train,val}/derivatives/sub-*/ses-*/*.npy (openbhb); list its files in a .csv with a column path"
        )
    return next(iter(matching))


def _data_sets(source: Path, dataset: str | None, layout: str | None, columns: str | Path | None) -> list[DataSet]:
    """The data sets of a cohort; raises UserError if an option does not fit or a layout is unknown."""
    source = _listing(source)
    if source.is_file() and source.suffix.lower() in DATA_SETS:
        for option, value in (("dataset", dataset), ("layout", layout), ("columns", columns)):
            if value is not None:
                raise UserError(f"--{option}={value}: {source} lists data sets; declare it there for each data set")
        data_sets = read_data_sets(source)
    else:
        path = source.resolve()
        name = dataset or (path.stem if path.is_file() else path.name)
        data_set = DataSet(path, safe_name(name), layout or "", declared_in="the cohort")
        data_sets = [data_set if columns is None else declare(data_set, Path(columns))]
    for data_set in data_sets:
        chosen = data_set.layout
        if chosen and chosen not in LAYOUTS:
            where = data_set.declared_in + ": " if len(data_sets) > 1 else ""
            raise UserError(
                f"{where}layout={chosen!r} is not known{nearest(chosen, LAYOUTS)}; allowed: {', '.join(LAYOUTS)}"
            )
    return data_sets


def _check_unique_keys(scans: list[Scan], source: str | Path) -> None:
    """Raise UserError if two scans (sorted by key) have one key."""
    for first, second in pairwise(scans):
        if first.key == second.key:
            names = [(scan.dataset, scan.participant_id, scan.session, scan.run) for scan in (first, second)]
            if names[0] != names[1]:
                one, other = next((a, b) for a, b in zip(*names, strict=True) if a != b)
                raise UserError(
                    f"cohort {source}: {one!r} and {other!r} both become {safe_name(one)!r} in the key {first.key}, where "
                    f"letters other than A-Z, 0-9, _ and - are replaced; rename one of them"
                )
            number = sum(scan.key == first.key for scan in scans)
            raise UserError(
                f"cohort {source}: {number} files have the key {first.key}, for example {first.path} and {second.path}; "
                "name their runs _run-1, _run-2, or list the files to use in a .csv with a column path"
            )


def _mixed_columns(scans: Iterable[Scan]) -> set[str]:
    """The columns that hold numbers in one data set and text in another."""
    types: dict[str, set[type[Any]]] = {}
    for scan in scans:
        for name, value in scan.extra.items():
            if value is not None:
                types.setdefault(name, set()).add(type(value))
    return {name for name, found in types.items() if len(found) > 1}
