"""Readers of the cohort layouts: each finds the scans of one data set and their rows in its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.declarations import DataSet
from data_pipeline.cohort.reading import Change
from data_pipeline.cohort.scan import Scan, check_readable, entities, entities_of, paths_below, visible
from data_pipeline.cohort.sidecars import cat12_measures, stem_of
from data_pipeline.cohort.table_file import Row, read_rows
from data_pipeline.cohort.tables import (
    SESSION_COLUMNS,
    ParticipantTable,
    no_session_row,
    read_participants,
    read_sessions,
    session_column_of,
    without_prefix,
)
from data_pipeline.cohort.values import RowOwners, typed_values
from infra.errors import UserError

# The file names of each modality. Grey-matter maps are CAT12's, as BIDS derivatives or under CAT12's own names; quasi-raw
# T1 images (bias-corrected, affinely registered, skull-stripped) are those of brainprep in OpenBHB, or of ``cohort prepare``.
MODALITIES = {
    "vbm": re.compile(r"(_desc-mwp1_probseg|_desc-gm_T1w|cat12vbm.*)\.nii(\.gz)?$|^mwp1.*\.nii(\.gz)?$"),
    "t1w": re.compile(r"^(?!.*_(desc|preproc)-).*_T1w\.nii(\.gz)?$"),
    "quasiraw": re.compile(r"(_preproc-quasiraw|_space-MNI152NLin2009_desc-preproc)_T1w\.nii(\.gz)?$"),
}
EXAMPLES = {"vbm": "_desc-mwp1_probseg", "t1w": "_T1w", "quasiraw": "_preproc-quasiraw_T1w"}
OPENBHB = {"vbm": "_preproc-cat12vbm_desc-gm_T1w.npy", "quasiraw": "_preproc-quasiraw_T1w.npy"}
CAT12_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # where to look for CAT12's mri/ when detecting the layout


class CohortScans(NamedTuple):
    """The scans of a cohort.

    Attributes:
        scans: those that a table lists.
        unlisted: those that none lists.
        changes: the cells of the tables that a rule changed.
        without_scan: the rows of the tables that belong to no scan, each as "file line n: sub-x ses-y".
    """

    scans: list[Scan]
    unlisted: list[Scan]
    changes: list[Change]
    without_scan: list[str]


@dataclass(frozen=True)
class ScanFile:
    """A scan's file and what is known of it.

    Attributes:
        path: the file.
        participant: from its name, as are ``session`` and ``run``, which may be empty.
        row: of the participants' table; None if it does not list the scan.
        measured: values from the layout or from reports, used if the tables lack them.
        reason: why no table lists the scan although one lists its participant.
    """

    path: Path
    participant: str
    session: str
    run: str
    row: Row | None
    measured: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def read_bids_layout(source: DataSet, modality: str) -> CohortScans:
    """Read ``sub-*/[ses-*/]anat/*.nii[.gz]`` of the folder, or if there is none, of its ``derivatives/*/``.

    CAT12's own maps (``mwp1*``) have ``cat12_iqr`` and ``tiv`` from ``cat_*.xml`` beside them or in ``report``.
    """
    folder = _folder(source)
    table = _bids_table(folder)
    people, sessions = _participant_table(source, [table]), _root_sessions(source, table.parent)
    own_sessions: dict[Path, dict[str, Row]] = {}
    files = []
    for path in _bids_files(folder, modality):
        participant, session, run = entities(path, folder)
        row, reason = _row_and_reason(people, participant, session, run)
        home = next(parent for parent in path.parents if parent.name == f"sub-{participant}")
        if home not in own_sessions:
            # A derivative without a table of sessions uses that of the raw data set.
            places = (
                place / f"{home.name}_sessions.tsv" for place in (home, folder / home.name, table.parent / home.name)
            )
            own_table = next((place for place in places if place.is_file()), None)
            own_sessions[home] = read_sessions(own_table, "session_id") if own_table else {}
        for rows in (sessions.get(participant, {}), own_sessions[home]) if session else ():
            if row is not None and session in rows:
                row = Row(_without_ids(rows[session]), rows[session].where, rows[session].table, row)
            elif row is not None and rows:
                table_name = next(iter(rows.values())).table.name
                reason = no_session_row(table_name, session, list(rows))
                row = people.person_row([row])
        measured = cat12_measures(path) if path.name.startswith("mwp1") else {}
        files.append(ScanFile(path, participant, session, run, row, measured=measured, reason=reason))
    tables = {
        participant: [*rows, *sessions.get(participant, {}).values()] for participant, rows in people.rows.items()
    }
    for home, rows in own_sessions.items():
        tables.setdefault(home.name.removeprefix("sub-"), []).extend(rows.values())
    return _scans(source, files, modality, f"sub-*/[ses-*/]anat/*{EXAMPLES[modality]}.nii.gz", tables)


def read_cat12(source: DataSet, modality: str) -> CohortScans:
    """Read ``mri/mwp1*.nii[.gz]`` in any subfolder; ``cat12_iqr`` and ``tiv`` come from ``report/cat_*.xml`` beside ``mri``.

    Raises UserError if the modality is not vbm, or if no table lists such a scan.
    """
    folder = _folder(source)
    if modality != "vbm":
        raise UserError(
            f"modality={modality!r}: layout cat12 has vbm only; give the folder of the raw scans, or --modality vbm"
        )
    people = _participant_table(source, [folder / "participants.tsv"])
    files = []
    homes = [folder / "mri", *(path for path in paths_below(folder) if path.name == "mri")]
    maps = (path for home in dict.fromkeys(homes) for path in home.glob("mwp1*.nii*"))
    for path in sorted(visible(folder, maps)):
        stem = stem_of(path)
        named = entities_of(stem.split("_"))
        participant = named.get("sub") or _listed_in(stem, people)
        session, run = named.get("ses", ""), named.get("run", "")
        row, reason = _row_and_reason(people, participant, session, run)
        files.append(ScanFile(path, participant, session, run, row, measured=cat12_measures(path), reason=reason))
    return _scans(source, files, modality, "mri/mwp1*.nii[.gz]", people.rows)


def read_openbhb(source: DataSet, modality: str) -> CohortScans:
    """Read ``{train,val}/derivatives/sub-*/ses-*/sub-*_preproc-*.npy``; ``openbhb_split`` is ``train`` or ``val``.

    Raises UserError if the layout does not have the modality, or if no table lists such a scan.
    """
    folder = _folder(source)
    if modality not in OPENBHB:
        raise UserError(
            f"modality={modality!r}: layout openbhb has {' and '.join(OPENBHB)}; choose one with --modality"
        )
    tables = [folder / part / "participants.tsv" for part in ("train", "val")]
    root = folder / "participants.tsv"
    people = _participant_table(
        source, [root] if root.is_file() else [table for table in tables if table.is_file()] or [root]
    )
    files = []
    for place in ("", "/derivatives", "/derivatives/sub-*", "/derivatives/sub-*/ses-*"):
        check_readable(path for part in ("train", "val") for path in folder.glob(part + place))
    for path in openbhb_arrays(folder, OPENBHB[modality]):
        participant, session, run = entities(path, folder)
        row, reason = _row_and_reason(people, participant, session, run)
        split = {"openbhb_split": path.relative_to(folder).parts[0]}
        files.append(ScanFile(path, participant, session, run, row, measured=split, reason=reason))
    return _scans(
        source, files, modality, f"{{train,val}}/derivatives/sub-*/ses-*/sub-*{OPENBHB[modality]}", people.rows
    )


def read_csv(source: DataSet, modality: str) -> CohortScans:
    """Read a CSV or TSV with a column ``path`` (relative to the table), a column of participants, and any others.

    Raises UserError if it is not a file, lacks one of these columns, or has a row without a path or participant.
    """
    if not source.path.is_file():
        raise UserError(f"cohort {source.path} is not a file; layout csv needs a table with a column path")
    path_column, id_column, run_column = (source.column(name) for name in ("path", "participant_id", "run"))
    rows = read_rows(source.path, [path_column, id_column], None)
    if not rows:
        raise UserError(f"{source.path} has a header and no rows; add a row for each scan")
    declared = (source.columns or {}).get("session")
    session_column = declared or session_column_of(source.path, rows[0].values if rows else ())
    files = []
    for row in rows:
        text, participant = row.values[path_column].strip(), row.values[id_column].strip().removeprefix("sub-")
        for column in (path_column, id_column):
            cell = row.values[column].strip()
            if cell in MISSING or not participant:
                written = f"={cell!r} means a missing value" if cell in MISSING - {""} else " is empty"
                raise UserError(f"{row.where}: {column}{written}; every row needs one")
        session = without_prefix(row.values.get(session_column, ""), "ses-")
        run = without_prefix(row.values.get(run_column, ""), "run-")
        path = (source.path.parent / text).resolve()
        files.append(ScanFile(path, participant, session, run, row))
    return _scans(source, files, modality, "a row per scan", {})


def bids_images(folder: Path) -> Iterator[Path]:
    """Images of any modality in ``sub-*/[ses-*/]anat`` of the folder and of its derivatives."""
    for place in ("sub-*/", "derivatives/*/sub-*/"):
        for depth in ("", "*/"):
            yield from visible(folder, folder.glob(f"{place}{depth}anat/*.nii*"))


def cat12_maps(folder: Path) -> Iterable[Path]:
    """CAT12's modulated grey-matter maps, down to three folders deep."""
    return (path for depth in CAT12_DEPTHS for path in visible(folder, folder.glob(f"{depth}mri/mwp1*.nii*")))


def openbhb_arrays(folder: Path, ending: str) -> Iterable[Path]:
    """OpenBHB's arrays whose names end in ``ending``, sorted."""
    patterns = [f"{part}/derivatives/sub-*/ses-*/sub-*{ending}" for part in ("train", "val")]
    return sorted(path for pattern in patterns for path in visible(folder, folder.glob(pattern)))


def _row_and_reason(people: ParticipantTable, participant: str, session: str, run: str) -> tuple[Row | None, str]:
    """The row of a scan, or None and why it has none."""
    row = people.find(participant, session, run)
    return row, "" if row is not None else people.why_missing(participant, session, run)


def _scans(
    source: DataSet, files: Sequence[ScanFile], modality: str, pattern: str, tables: Mapping[str, Sequence[Row]]
) -> CohortScans:
    """The scans of listed participants sorted by key, and the others; raises UserError if none is listed.

    Args:
        source: the data set.
        files: its scans' files.
        modality: for the message.
        pattern: describes the files that were searched, for the message.
        tables: each participant's rows in all tables, also those without a scan.
    """
    listed = [file for file in files if file.row is not None]
    unlisted = [_scan(source, file, {}) for file in files if file.row is None]
    if not listed:
        raise UserError(_nothing_listed(source, files, modality, pattern))
    rows = [file.row for file in listed if file.row is not None]
    people = RowOwners([file.participant for file in listed], tables)
    values, changes = typed_values(rows, source, people=people)
    scans = [_scan(source, file, row_values) for file, row_values in zip(listed, values, strict=True)]
    return CohortScans(sorted(scans, key=lambda scan: scan.key), unlisted, changes, _without_scan(files, tables))


def _without_scan(files: Sequence[ScanFile], tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """The rows that belong to no scan, see ``CohortScans``."""
    used = set()
    for file in files:
        row = file.row
        while row is not None:
            used.add(row.where)
            row = row.parent
    return [
        f"{row.table.name}{row.where.removeprefix(str(row.table))}: sub-{participant}"
        + (f" ses-{row.session}" if row.session else "")
        for participant, rows in tables.items()
        for row in rows
        if row.where not in used
    ]


def _nothing_listed(source: DataSet, files: Sequence[ScanFile], modality: str, pattern: str) -> str:
    """The message for a data set without a scan that a table lists."""
    start = f"cohort {source.path} has no {modality} scan of a listed participant"
    if not files:
        return f"{start}; no file is named {pattern}; check the folder, --layout and --modality"
    first = files[0]
    reason = (
        first.reason or f"no table lists {first.participant!r}; compare the column {source.column('participant_id')}"
    )
    return f"{start}; found {len(files)} files, for example {first.path.name}: {reason}"


def _scan(source: DataSet, file: ScanFile, values: dict[str, Any]) -> Scan:
    measured = {name: value for name, value in file.measured.items() if values.get(name) is None}
    extra = {name: value for name, value in {**values, **measured}.items() if name not in ("age", "sex", "site")}
    return Scan(
        path=file.path,
        dataset=source.name,
        participant_id=file.participant,
        session=file.session or "1",
        run=file.run,
        site=str(values.get("site") or ""),
        age=float("nan") if values.get("age") is None else float(values["age"]),
        sex=str(values.get("sex") or ""),
        extra=extra if file.row is not None else {},
        orientation=source.orientation,
        unlisted=file.reason if file.row is None else "",
    )


def _folder(source: DataSet) -> Path:
    """The data set's folder; raises UserError if it is not one."""
    if not source.path.is_dir():
        raise UserError(f"cohort {source.path} is not a folder; give the folder that holds participants.tsv")
    return source.path


def _participant_table(source: DataSet, tables: Sequence[Path]) -> ParticipantTable:
    """Read the declared participants' table, or else the layout's ``tables``."""
    paths = [source.participants] if source.participants else list(tables)
    session = (source.columns or {}).get("session", "")
    delimiter = "," if paths[0].suffix.lower() == ".csv" else "\t"
    person = tuple(source.column(name) for name in source.person)
    return read_participants(paths, source.column("participant_id"), session, source.column("run"), delimiter, person)


def _bids_table(folder: Path) -> Path:
    """The participants' table of the folder; that of the raw data set if the folder is a derivative without a table."""
    own, raw = folder / "participants.tsv", folder.parent.parent / "participants.tsv"
    return raw if not own.is_file() and folder.parent.name == "derivatives" and raw.is_file() else own


def _bids_files(folder: Path, modality: str) -> list[Path]:
    """The files of a modality in the folder, or if there are none, in its derivatives."""
    for pattern in ("sub-*", "derivatives/*/sub-*"):
        check_readable([folder] if "/" not in pattern else folder.glob("derivatives/*"))
        found = (path for home in folder.glob(pattern) if home.is_dir() for path in paths_below(home))
        paths = [path for path in visible(folder, found) if MODALITIES[modality].search(path.name)]
        if paths:
            return sorted(paths)
    return []


def _root_sessions(source: DataSet, folder: Path) -> dict[str, dict[str, Row]]:
    """Read ``sessions.tsv`` beside participants.tsv: participant -> session -> row."""
    path = folder / "sessions.tsv"
    if not path.is_file():
        return {}
    people = read_participants([path], source.column("participant_id"), "session_id", source.column("run"))
    return {name: {people.session_of(row): row for row in rows} for name, rows in people.rows.items()}


def _without_ids(row: Row) -> dict[str, str]:
    return {name: text for name, text in row.values.items() if name not in ("participant_id", *SESSION_COLUMNS)}


def _listed_in(stem: str, people: ParticipantTable) -> str:
    """The longest id of a listed participant with which a file's name begins, up to a separator; else the whole name."""
    cuts = [match.start() for match in re.finditer(r"[-_.\s]", stem)]
    return next((stem[:cut] for cut in (len(stem), *reversed(cuts)) if stem[:cut] in people.rows), stem)
