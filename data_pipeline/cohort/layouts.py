"""The layouts in which cohorts come: each reader finds the scans of one data set and the table row of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data_pipeline.cohort.declarations import DataSet, typed
from data_pipeline.cohort.scan import Scan
from data_pipeline.cohort.tables import SESSION_COLUMNS, People, Row, read_people, read_rows, read_sessions
from infra.errors import UserError

# What each modality's file name ends in. The grey-matter maps are CAT12's, as BIDS derivatives or under their own name;
# quasi-raw T1 images (bias-corrected, affinely registered, skull-stripped) are brainprep's, as OpenBHB has them.
MODALITIES = {
    "vbm": re.compile(r"(_desc-mwp1_probseg|_desc-gm_T1w|cat12vbm.*)\.nii(\.gz)?$|^mwp1.*\.nii(\.gz)?$"),
    "t1w": re.compile(r"^(?!.*_(desc|preproc)-).*_T1w\.nii(\.gz)?$"),
    "quasiraw": re.compile(r"_preproc-quasiraw_T1w\.nii(\.gz)?$"),
}
EXAMPLES = {"vbm": "_desc-mwp1_probseg", "t1w": "_T1w", "quasiraw": "_preproc-quasiraw_T1w"}
OPENBHB = {"vbm": "_preproc-cat12vbm_desc-gm_T1w.npy", "quasiraw": "_preproc-quasiraw_T1w.npy"}
CAT12_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # how deep CAT12's mri/ is looked for to tell the layout
CAT12_FIGURES = {"cat12_iqr": "qualityratings/IQR", "tiv": "subjectmeasures/vol_TIV"}  # a school mark (1 best); ml

Scans = tuple[list[Scan], list[Scan]]


@dataclass(frozen=True)
class Found:
    """A scan's file, the ids in its name, the table's row (None: not listed) and what was measured of it."""

    path: Path
    participant: str
    session: str
    run: str
    row: Row | None
    measured: dict[str, Any] = field(default_factory=dict)


def read_bids_layout(source: DataSet, modality: str) -> Scans:
    """``sub-*/[ses-*/]anat/*.nii[.gz]``, of the folder itself, else of the pipelines in its ``derivatives``."""
    folder = _folder(source)
    people = _people(source, [_bids_table(folder)])
    sessions = _root_sessions(source, folder)
    own: dict[Path, dict[str, Row]] = {}
    found = []
    for path in _bids_files(folder, modality):
        participant, session, run = entities(path, folder)
        row = people.find(participant, session, run)
        home = next(parent for parent in path.parents if parent.name == f"sub-{participant}")
        if row is not None and home not in own:
            table = home / f"{home.name}_sessions.tsv"
            own[home] = read_sessions(table, "session_id") if table.is_file() else {}
        if row is not None and session:
            for table_row in (sessions.get((participant, session)), own[home].get(session)):
                row = row if table_row is None else Row(_without_ids(table_row), table_row.where, row)
        found.append(Found(path, participant, session, run, row))
    return _scans(source, found, modality, f"sub-*/[ses-*/]anat/*{EXAMPLES[modality]}.nii.gz")


def read_cat12(source: DataSet, modality: str) -> Scans:
    """``mri/mwp1*.nii[.gz]`` in any sub-folder; ``cat12_iqr`` and ``tiv`` from ``report/cat_*.xml`` beside ``mri``."""
    folder = _folder(source)
    if modality != "vbm":
        raise UserError(
            f"modality={modality!r}: CAT12's folders are read as vbm only; use --layout bids for {modality}"
        )
    people = _people(source, [folder / "participants.tsv"])
    found = []
    for path in sorted(folder.rglob("mri/mwp1*.nii*")):
        stem = path.name.removeprefix("mwp1").removesuffix(".gz").removesuffix(".nii")
        named = _named(stem.split("_"))
        participant = named.get("sub") or _listed_in(stem, people)
        session, run = named.get("ses", ""), named.get("run", "")
        row = people.find(participant, session, run)
        found.append(Found(path, participant, session, run, row, read_report(path.parent.parent / "report", stem)))
    return _scans(source, found, modality, "mri/mwp1*.nii[.gz]")


def read_openbhb(source: DataSet, modality: str) -> Scans:
    """``{train,val}/derivatives/sub-*/ses-*/sub-*_preproc-*.npy``; the two folders' name as ``openbhb_split``."""
    folder = _folder(source)
    if modality not in OPENBHB:
        raise UserError(f"modality={modality!r}: OpenBHB has {' and '.join(OPENBHB)}; choose one with --modality")
    tables = [folder / part / "participants.tsv" for part in ("train", "val")]
    root = folder / "participants.tsv"
    people = _people(source, [root] if root.is_file() else [table for table in tables if table.is_file()] or [root])
    found = []
    for path in openbhb_arrays(folder, OPENBHB[modality]):
        participant, session, run = entities(path, folder)
        part = {"openbhb_split": path.relative_to(folder).parts[0]}
        found.append(Found(path, participant, session, run, people.find(participant, session, run), part))
    return _scans(source, found, modality, f"{{train,val}}/derivatives/sub-*/ses-*/sub-*{OPENBHB[modality]}")


def read_csv(source: DataSet, modality: str) -> Scans:
    """A CSV or TSV with a column ``path`` (from the table's own folder on), one of participants, and any others."""
    if not source.path.is_file():
        raise UserError(f"cohort {source.path} is not a file; layout csv needs a table with a column path")
    with source.path.open(encoding="utf-8-sig") as stream:
        header = stream.readline()
    delimiter = "\t" if "\t" in header else "," if "," in header else ";"
    place, person, run = (source.column(name) for name in ("path", "participant_id", "run"))
    rows = read_rows(source.path, [place, person], delimiter)
    wanted = (source.columns or {}).get("session")
    session = next((c for c in ([wanted] if wanted else SESSION_COLUMNS) if rows and c in rows[0].values), "")
    found = []
    for row in rows:
        text, participant = row.values[place].strip(), row.values[person].strip().removeprefix("sub-")
        if not text or not participant:
            raise UserError(f"{row.where}: {place if not text else person} is empty; every row needs one")
        its_session = row.values.get(session, "").strip().removeprefix("ses-")
        its_run = row.values.get(run, "").strip().removeprefix("run-")
        path = (source.path.parent / text).resolve()
        found.append(Found(path, participant, its_session, its_run, row))
    return _scans(source, found, modality, "a row per scan")


def entities(path: Path, root: Path) -> tuple[str, str, str]:
    """Participant, session and run of a file below ``root``, from the folders first, then from the file's name."""
    parts = path.relative_to(root).parts[:-1]
    folders = parts[next(n for n, part in enumerate(parts) if part.startswith("sub-")) :]
    named = _named([*path.name.partition(".")[0].split("_"), *folders])
    return folders[0].removeprefix("sub-"), named.get("ses", ""), named.get("run", "")


def bids_images(folder: Path) -> Iterator[Path]:
    """Any image in ``sub-*/[ses-*/]anat``."""
    for depth in ("", "*/"):
        yield from folder.glob(f"sub-*/{depth}anat/*.nii*")
    for depth in ("", "*/"):
        yield from folder.glob(f"derivatives/*/sub-*/{depth}anat/*.nii*")


def cat12_maps(folder: Path) -> Iterable[Path]:
    """CAT12's modulated grey-matter maps, a few folders deep."""
    return (path for depth in CAT12_DEPTHS for path in folder.glob(f"{depth}mri/mwp1*.nii*"))


def openbhb_arrays(folder: Path, ending: str) -> Iterable[Path]:
    """OpenBHB's arrays with a certain end of their names, in the order of their names."""
    return sorted(p for part in ("train", "val") for p in folder.glob(f"{part}/derivatives/sub-*/ses-*/sub-*{ending}"))


def read_report(folder: Path, stem: str) -> dict[str, float]:
    """What CAT12's report of a scan says of quality and head size; empty where there is no readable report."""
    try:
        tree = ElementTree.parse(folder / f"cat_{stem}.xml")
    except (OSError, ElementTree.ParseError):
        return {}
    figures = {}
    for name, place in CAT12_FIGURES.items():
        # Newer versions hold a description under the same name, before or behind the figure.
        numbers = [value for value in map(_number, tree.iterfind(f".//{place}")) if value is not None]
        if numbers:
            figures[name] = numbers[0]
    return figures


def _number(element: ElementTree.Element) -> float | None:
    try:
        value = float((element.text or "").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scans(source: DataSet, found: Sequence[Found], modality: str, where: str) -> Scans:
    """Scans in the order of their keys, and those that no table lists; UserError where there is none of the former."""
    known = [one for one in found if one.row is not None]
    unknown = [
        Scan(one.path, source.name, one.participant, one.session or "1", one.run, orientation=source.orientation)
        for one in found
        if one.row is None
    ]
    if not known:
        raise UserError(
            f"cohort {source.path} has no {modality} scan of a listed participant; looked for {where}; "
            "choose another --modality"
        )
    values = typed([one.row for one in known if one.row is not None], source)
    scans = [_scan(source, one, its) for one, its in zip(known, values, strict=True)]
    return sorted(scans, key=lambda scan: scan.key), unknown


def _scan(source: DataSet, one: Found, values: dict[str, Any]) -> Scan:
    measured = {name: value for name, value in one.measured.items() if values.get(name) is None}
    extra = {name: value for name, value in {**values, **measured}.items() if name not in ("age", "sex", "site")}
    return Scan(
        one.path, source.name, one.participant, one.session or "1", one.run, str(values.get("site") or ""),
        float("nan") if values.get("age") is None else float(values["age"]), str(values.get("sex") or ""), extra,
        source.orientation,
    )  # fmt: skip


def _folder(source: DataSet) -> Path:
    if not source.path.is_dir():
        raise UserError(f"cohort {source.path} is not a folder; give the folder that holds participants.tsv")
    return source.path


def _people(source: DataSet, tables: Sequence[Path]) -> People:
    paths = [source.participants] if source.participants else list(tables)
    session = (source.columns or {}).get("session", "")
    delimiter = "," if paths[0].suffix.lower() == ".csv" else "\t"
    return read_people(paths, source.column("participant_id"), session, source.column("run"), delimiter)


def _bids_table(folder: Path) -> Path:
    """A derivative data set often has no table of its own: the raw one above it has."""
    own, above = folder / "participants.tsv", folder.parent.parent / "participants.tsv"
    return above if not own.is_file() and folder.parent.name == "derivatives" and above.is_file() else own


def _bids_files(folder: Path, modality: str) -> list[Path]:
    for pattern in ("sub-*/**/*.nii*", "derivatives/*/sub-*/**/*.nii*"):
        paths = sorted(path for path in folder.glob(pattern) if MODALITIES[modality].search(path.name))
        if paths:
            return paths
    return []


def _root_sessions(source: DataSet, folder: Path) -> dict[tuple[str, str], Row]:
    """``sessions.tsv`` beside participants.tsv: rows by participant and session."""
    path = folder / "sessions.tsv"
    if not path.is_file():
        return {}
    people = read_people([path], source.column("participant_id"), "session_id", source.column("run"))
    return {(name, people.session_of(row)): row for name, rows in people.rows.items() for row in rows}


def _without_ids(row: Row) -> dict[str, str]:
    return {name: text for name, text in row.values.items() if name not in ("participant_id", *SESSION_COLUMNS)}


def _named(parts: Iterable[str]) -> dict[str, str]:
    return {part.partition("-")[0]: part.partition("-")[2] for part in parts if "-" in part}


def _listed_in(stem: str, people: People) -> str:
    """The listed participant whose id a file's name begins with (up to a separator), the longest; else the whole name."""
    cuts = [match.start() for match in re.finditer(r"[-_.\s]", stem)]
    return next((stem[:cut] for cut in (len(stem), *reversed(cuts)) if stem[:cut] in people.rows), stem)
