"""Reads a BIDS-like folder: participants.tsv, optional sub-X_sessions.tsv, sub-*/[ses-*/]anat/*.nii[.gz]."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.scan import Rejection, Scan, safe
from data_pipeline.tables import Row, read_table, typed
from infra.errors import UserError, nearest

# What each modality's file name ends in. The grey-matter maps are CAT12's, as BIDS derivatives or under their own name.
MODALITIES = {
    "vbm": re.compile(r"(_desc-mwp1_probseg|_desc-gm_T1w|cat12vbm.*)\.nii(\.gz)?$|^mwp1.*\.nii(\.gz)?$"),
    "t1w": re.compile(r"^(?!.*_desc-).*_T1w\.nii(\.gz)?$"),
}
PATTERNS = {
    "vbm": "sub-*/[ses-*/]**/*_desc-mwp1_probseg.nii[.gz], *_desc-gm_T1w.nii[.gz] or mwp1*.nii[.gz]",
    "t1w": "sub-*/[ses-*/]**/*_T1w.nii[.gz]",
}
SESSION_COLUMNS = ("session_id", "session")
# Columns that the scan table has of its own; a participants' column of such a name is kept under ``participants_<name>``.
RESERVED = {"key", "shard", "offset", "size", "crc32c", "run", "dataset"}


def read_bids(
    root: str | Path, dataset: str | None = None, modality: str = "vbm"
) -> tuple[list[Scan], list[Rejection]]:
    """Scans of a BIDS-like folder in the order of their keys, and the images that belong to no row of its tables.

    Values come from participants.tsv: the row of the scan's session where the table has a session column, else the
    participant's; ``sub-X/sub-X_sessions.tsv`` goes before it, value by value. Raises UserError where the folder, a table
    or a value in it is wrong, or where no scan is left.
    """
    folder = Path(root)
    if modality not in MODALITIES:
        raise UserError(f"modality={modality!r} is not known{nearest(modality, MODALITIES)}; allowed: vbm, t1w")
    if not folder.is_dir():
        raise UserError(f"cohort {folder} is not a folder; give the BIDS folder that holds participants.tsv")
    tables = _Tables(folder)
    name = safe(dataset or folder.resolve().name)
    found: dict[str, tuple[Scan, Row]] = {}
    rejected: list[Rejection] = []
    for path in _images(folder, modality):
        scan = _place(path, folder, name)
        row = tables.row(scan)
        if isinstance(row, str):
            rejected.append(Rejection(scan.key, str(path), row))
        elif scan.key in found:
            first = found[scan.key][0].path
            reason = f"same participant, session and run as {first}; tell them apart by _run-1, _run-2"
            rejected.append(Rejection(scan.key, str(path), reason))
        else:
            found[scan.key] = (scan, row)
    if not found:
        what = f"{len(rejected)} images, but: {rejected[0].reason}" if rejected else "none"
        raise UserError(
            f"cohort {folder} has no {modality} scan; looked for {PATTERNS[modality]}, found {what}; "
            "check the folder or --modality"
        )
    tables.check_ages(row for _, row in found.values())
    return _complete([found[key] for key in sorted(found)]), rejected


def is_simulated(root: str | Path) -> bool:
    """Whether the data set's own description says that its scans are simulated."""
    path = Path(root) / "dataset_description.json"
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("Simulated", False))
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not a JSON object; mend or remove it") from None


def _images(folder: Path, modality: str) -> Iterator[Path]:
    for path in sorted(folder.glob("sub-*/**/*.nii*")):
        if MODALITIES[modality].search(path.name):
            yield path


def _place(path: Path, root: Path, dataset: str) -> Scan:
    """Participant, session and run of an image: from its folders first, then from its name."""
    folders = path.relative_to(root).parts[:-1]
    named: dict[str, str] = {}
    for part in (*path.name.split("_"), *folders):
        entity, dash, value = part.partition("-")
        if dash:
            named[entity] = value
    participant = folders[0].removeprefix("sub-")
    return Scan(path, dataset, participant, named.get("ses") or "1", named.get("run", ""))


class _Tables:
    """The rows of a cohort's tables, looked up by scan."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "participants.tsv"
        table = read_table(self.path, "participant_id")
        self.columns = list(table[0]) if table else []
        self.session = next((name for name in SESSION_COLUMNS if name in self.columns), None)
        self.people: dict[str, dict[tuple[str, str], Row]] = {}
        for row in table:
            person = (row.pop("participant_id") or "").removeprefix("sub-")
            session = (row.pop(self.session) or "").removeprefix("ses-") if self.session else ""
            run = row.pop("run") or "" if "run" in self.columns and self.session else ""
            its = self.people.setdefault(person, {})
            if (session, run.removeprefix("run-")) in its:
                where = f" session {session!r}" if session else ""
                raise UserError(f"{self.path}: participant_id {person!r}{where} is there twice; keep one row each")
            its[session, run.removeprefix("run-")] = row
        self._sessions: dict[str, dict[str, Row]] = {}

    def row(self, scan: Scan) -> Row | str:
        """A scan's values, or why it has none."""
        its = self.people.get(scan.participant_id)
        if its is None:
            return "participant is not in participants.tsv"
        for place in ((scan.session, scan.run), (scan.session, ""), ("", "")):
            if place in its:
                return {**its[place], **self._of_session(scan)}
        if len(its) == 1 and not any("ses-" in part for part in scan.path.relative_to(self.root).parts):
            return next(iter(its.values()))  # one row and an image that names no session
        return f"session {scan.session} of the participant is not in participants.tsv"

    def _of_session(self, scan: Scan) -> Row:
        if scan.participant_id not in self._sessions:
            path = self.root / f"sub-{scan.participant_id}" / f"sub-{scan.participant_id}_sessions.tsv"
            rows = read_table(path, "session_id") if path.is_file() else []
            self._sessions[scan.participant_id] = {
                (row.pop("session_id") or "").removeprefix("ses-"): row for row in rows
            }
        values = self._sessions[scan.participant_id].get(scan.session, {})
        return {name: value for name, value in values.items() if value is not None}

    def check_ages(self, rows: Iterator[Row]) -> None:
        """Age is what the scans are compared by: a table without the column is a mistake, n/a in it is not."""
        if not any("age" in row for row in rows):
            raise UserError(
                f"{self.path} has no column age; found: {', '.join(self.columns)}; add it in years, n/a where unknown"
            )


def _complete(found: list[tuple[Scan, Row]]) -> list[Scan]:
    """Scans with their values, each column of one type over the whole cohort."""
    names = dict.fromkeys(name for _, row in found for name in row)
    columns = {name: typed(name, [row.get(name) for _, row in found]) for name in names}
    scans = []
    for number, (scan, _) in enumerate(found):
        values = {name: column[number] for name, column in columns.items()}
        age = values.pop("age", None)
        site, sex = values.pop("site", None) or "", values.pop("sex", None) or ""
        extra: dict[str, Any] = {
            (f"participants_{name}" if name in RESERVED or name.startswith("q_") else name): value
            for name, value in values.items()
            if name not in SESSION_COLUMNS
        }
        known = float("nan") if age is None else float(age)
        scans.append(
            Scan(scan.path, scan.dataset, scan.participant_id, scan.session, scan.run, site, known, sex, extra)
        )
    return scans
