"""Reads a BIDS-like folder: participants.tsv, optional sessions.tsv, sub-*/[ses-*/]anat/*.nii[.gz]."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.scan import Scan, safe
from infra.errors import UserError

# What each modality's file name ends in. The grey-matter maps are CAT12's, as BIDS derivatives or under their own name.
MODALITIES = {
    "vbm": re.compile(r"(_desc-mwp1_probseg|_desc-gm_T1w|cat12vbm.*)\.nii(\.gz)?$|^mwp1.*\.nii(\.gz)?$"),
    "t1w": re.compile(r"^(?!.*_desc-).*_T1w\.nii(\.gz)?$"),
}
MISSING = {"", "n/a", "N/A", "nan", "NaN"}
SEX = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}
TEXT = ("site", "diagnosis", "split", "age", "sex")  # names, also where they look like numbers; age and sex are checked


def read_bids(root: str | Path, dataset: str | None = None, modality: str = "vbm") -> tuple[list[Scan], list[Scan]]:
    """Scans of a BIDS-like folder, in the order of their keys, and those whose participant the table does not list.

    Sessions' own values (``sub-X/sub-X_sessions.tsv``) go before the participant's. Raises UserError where the folder,
    the table or a value in it is wrong.
    """
    folder = Path(root)
    if modality not in MODALITIES:
        raise UserError(f"modality={modality!r} is not known; allowed: {', '.join(MODALITIES)}")
    if not folder.is_dir():
        raise UserError(f"cohort {folder} is not a folder; give the BIDS folder that holds participants.tsv")
    people = _read_table(folder / "participants.tsv", "participant_id", prefix="sub-")
    name = safe(dataset or folder.resolve().name)
    known, unknown = [], []
    for path in sorted(folder.glob("sub-*/**/*.nii*")):
        if not MODALITIES[modality].search(path.name):
            continue
        participant, session, run = _entities(path, folder)
        row = people.get(participant)
        if row is None:
            unknown.append(Scan(path, name, participant, session or "1", run))
            continue
        values = {**row, **_session_values(folder, participant, session)}
        known.append(_scan(path, name, participant, session, run, values))
    if not known:
        where = f"sub-*/[ses-*/]anat/*{'_T1w' if modality == 't1w' else '_desc-mwp1_probseg'}.nii.gz"
        raise UserError(
            f"cohort {folder} has no {modality} scan of a listed participant; looked for {where}; choose another --modality"
        )
    return sorted(known, key=lambda scan: scan.key), unknown


def is_simulated(root: str | Path) -> bool:
    """Whether the data set's own description says that its scans are simulated."""
    path = Path(root) / "dataset_description.json"
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")).get("Simulated", False))


def _entities(path: Path, root: Path) -> tuple[str, str, str]:
    """Participant, session and run, from the folders first, then from the file's name."""
    folders = path.relative_to(root).parts
    named = {
        part.partition("-")[0]: part.partition("-")[2] for part in (*path.name.split("_"), *folders[:-1]) if "-" in part
    }
    return folders[0].removeprefix("sub-"), named.get("ses", ""), named.get("run", "")


def _scan(path: Path, dataset: str, participant: str, session: str, run: str, values: dict[str, Any]) -> Scan:
    extra = {k: v for k, v in values.items() if k not in ("age", "sex", "site", "session", "session_id")}
    return Scan(
        path, dataset, participant, session or "1", run, str(values.get("site") or ""),
        float("nan") if values.get("age") is None else float(values["age"]), str(values.get("sex") or ""), extra,
    )  # fmt: skip


def _session_values(root: Path, participant: str, session: str) -> dict[str, Any]:
    path = root / f"sub-{participant}" / f"sub-{participant}_sessions.tsv"
    if not session or not path.is_file():
        return {}
    return _read_table(path, "session_id", prefix="ses-").get(session, {})


def _read_table(path: Path, key: str, prefix: str) -> dict[str, dict[str, Any]]:
    """Rows of a .tsv by their key, values checked: age a number, sex F or M, ``n/a`` and empty are None."""
    if not path.is_file():
        raise UserError(f"{path} is missing; a cohort needs this table with a column {key}")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tab-separated table: {' '.join(str(error).split())}") from None
    if key not in table.columns:
        raise UserError(f"{path} has no column {key}; found: {', '.join(table.columns)}")
    numeric = {str(name) for name in table.columns if name not in TEXT and _all_numbers(table[name])}
    rows: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(table.to_dict("records"), start=2):
        name = str(record.pop(key)).removeprefix(prefix)
        if name in rows:
            raise UserError(f"{path} line {number}: {key} {name!r} is there twice; keep one row each")
        rows[name] = {str(k): _value(path, number, str(k), str(v), str(k) in numeric) for k, v in record.items()}
    return rows


def _all_numbers(column: Any) -> bool:
    """Whether a column is numbers and missing values only; one word makes all of it text."""
    return bool(
        pd.to_numeric(column.str.strip().replace(dict.fromkeys(MISSING, None)), errors="coerce").notna().sum()
        == (~column.str.strip().isin(MISSING)).sum()
    )


def _value(path: Path, line: int, column: str, text: str, number: bool) -> Any:
    text = text.strip()
    if text in MISSING:
        return None
    if column == "age":
        try:
            age = float(text)
        except ValueError:
            age = float("nan")
        if not 0 <= age <= 130:
            raise UserError(
                f"{path} line {line}: age={text!r} is not a number of years in 0..130; write n/a if unknown"
            )
        return age
    if column == "sex":
        if text.lower() not in SEX:
            raise UserError(
                f"{path} line {line}: sex={text!r} is not F, M, O, female, male or other; write n/a if unknown"
            )
        return SEX[text.lower()]
    return float(text) if number else text
