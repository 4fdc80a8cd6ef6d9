"""The tables of a derivative of prepared scans, and its description, by which another run recognises it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.cohort.cells import number_as_text
from data_pipeline.cohort.scan import Scan, safe_name
from data_pipeline.prepare.job import LIBRARIES, Outcome, versions
from data_pipeline.prepare.settings import COLUMNS, SPACE, PrepareRecipe, recorded
from infra.errors import UserError
from infra.files import atomic_write, read_object, read_text, write_json

DESCRIPTION, PARTICIPANTS, TIMINGS = "dataset_description.json", "participants.tsv", "timings.tsv"
DICOM = "dicom.tsv"  # lists the series of a folder of DICOM files, before the derivative is claimed


def claim(root: Path, recipe: PrepareRecipe, *, name: str, simulated: bool, licence: str = "") -> None:
    """Write ``dataset_description.json`` with the recipe into a new or empty folder; keep that of the same recipe.

    ``licence`` is that of the raw data set, as it states it; empty if it states none: one that is there is then kept.

    Raises UserError if the folder holds other files, or scans that another recipe has prepared (its limits may differ).
    """
    licence = licence or check_claim(root, recipe).get("License", "")
    root.mkdir(parents=True, exist_ok=True)
    described = [
        {"Name": "yaware", "Version": metadata.version("yaware"), "Description": f"cohort prepare, {recipe.pipeline}"},
        *({"Name": library, "Version": versions()[library]} for library in LIBRARIES if versions()[library]),
    ]
    content = {
        "Name": f"{name}, prepared", "BIDSVersion": "1.9.0", "DatasetType": "derivative", "GeneratedBy": described,
        "SpatialReference": f"{SPACE}: ICBM 2009a nonlinear symmetric, as nilearn ships it", "Simulated": simulated,
        "Preparation": recorded(recipe), **({"License": licence} if licence else {}),
    }  # fmt: skip
    write_json(root / DESCRIPTION, content)


def check_claim(root: Path, recipe: PrepareRecipe | None = None) -> dict[str, Any]:
    """Return the description of a derivative in a folder; empty if the folder is new or empty.

    Raises UserError as ``claim`` does; without ``recipe`` any recipe is allowed.
    """
    path = root / DESCRIPTION
    if path.is_file():
        described_before = read_object(path, "choose another folder")
        before = described_before.get("Preparation")
        if not isinstance(before, dict):
            raise UserError(f"{root} holds another data set ({path.name} names no preparation); choose another folder")
        own = {} if recipe is None else recorded(recipe)
        changed = [key for key in own if key != "limits" and before.get(key) != own[key]]
        if changed:
            key = changed[0]
            raise UserError(
                f"{root} holds scans prepared otherwise ({key} was {before.get(key)!r}, now {own[key]!r}); choose another "
                "folder, or remove that one"
            )
        return described_before
    if root.is_dir() and any(not child.name.startswith(".") and child.name != DICOM for child in root.iterdir()):
        raise UserError(f"{root} is not empty and holds no prepared scans; choose another folder")
    return {}


def write_tables(root: Path, scans: Sequence[Scan], outcomes: Mapping[str, Outcome]) -> None:
    """Write ``participants.tsv``, with a row for each prepared scan: the values of the cohort's tables, and the figures.

    A column of the cohort with the name of a figure is kept as ``given_<name>``.
    """
    prepared = [scan for scan in scans if outcomes[scan.key].refused is None]
    extra = list(dict.fromkeys(name for scan in prepared for name in scan.extra))
    figures = [name for name, (own, _, _) in COLUMNS.items() if any(own in outcomes[s.key].figures for s in prepared)]
    runs = any(scan.run for scan in prepared)
    head = ["participant_id", "session_id", *(["run"] if runs else []), "age", "sex", "site"]
    head += [f"given_{name}" if name in COLUMNS else name for name in extra] + figures
    rows = []
    for scan in prepared:
        measured = outcomes[scan.key].figures
        values: list[Any] = [f"sub-{safe_name(scan.participant_id)}", f"ses-{safe_name(scan.session)}"]
        values += [scan.run] if runs else []
        values += [None if scan.age != scan.age else scan.age, scan.sex or None, scan.site or None]
        values += [scan.extra.get(name) for name in extra] + [measured.get(COLUMNS[name][0]) for name in figures]
        rows.append([_cell(value) for value in values])
    described = {
        name: {"Description": words, **({"Units": unit} if unit else {})}
        for name, (_, unit, words) in COLUMNS.items() if name in figures
    }  # fmt: skip
    write_json(root / "participants.json", {"age": {"Description": "age", "Units": "years"}, **described})
    write_tsv(root / PARTICIPANTS, head, sorted(rows))


def _cell(value: Any) -> str:
    """A value as BIDS writes it in a table: n/a if it is missing."""
    if value is None or value == "":
        return "n/a"
    return number_as_text(value) if isinstance(value, float) else " ".join(str(value).split())


def write_tsv(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table of texts."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([head, *rows])


def read_timings(root: Path) -> dict[str, float]:
    """Return the CPU seconds of each scan that any run has prepared here, by key."""
    try:
        text = read_text(root / TIMINGS)
    except OSError:
        return {}
    rows = csv.reader(io.StringIO(text), delimiter="\t")
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[1].replace(".", "", 1).isdigit()}


def write_timings(root: Path, seconds: Mapping[str, float]) -> None:
    """Write the CPU seconds of each scan: apart from the other tables, which are the same for the same input."""
    write_tsv(root / TIMINGS, ["key", "seconds"], [[key, f"{value:.1f}"] for key, value in sorted(seconds.items())])
