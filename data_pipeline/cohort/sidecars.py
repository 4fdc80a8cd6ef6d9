"""The files beside tables and scans: units and labels of columns in JSON (BIDS), and CAT12's reports in XML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data_pipeline.cohort.cells import known_name, parse_number, same
from data_pipeline.cohort.texts import read_sidecar, warn
from infra.errors import UserError

DAYS_PER_YEAR = 365.25
# Column -> unit -> the number by which a value is divided: to years, and to ml.
UNITS = {
    "age": {"years": 1.0, "months": 12.0, "weeks": DAYS_PER_YEAR / 7, "days": DAYS_PER_YEAR},
    "tiv": {"ml": 1.0, "mm3": 1000.0, "l": 0.001},
}
SPELLINGS = {
    "year": "years", "yr": "years", "yrs": "years", "y": "years", "years old": "years", "a": "years",
    "month": "months", "mo": "months", "mos": "months", "week": "weeks", "wk": "weeks", "wks": "weeks", "w": "weeks",
    "day": "days", "d": "days", "milliliter": "ml", "millilitre": "ml", "cm3": "ml", "cm^3": "ml", "cc": "ml",
    "cm³": "ml", "mm^3": "mm3", "mm³": "mm3", "liter": "l", "litre": "l",
}  # fmt: skip
CAT12_MEASURES = {"cat12_iqr": "qualityratings/IQR", "tiv": "subjectmeasures/vol_TIV"}  # rating (1 is best); ml
UNITS_KEYS, LEVELS = ("Units", "Unit"), ("Levels", "Level")  # in any case
NOT_STATED = ("", "n/a", "none", "na")
WITH_COLUMNS = "a YAML file given with --columns"


@dataclass
class Sidecars:
    """The sidecars of a data set's tables, each read once; ``place`` is where a unit can be declared, for messages."""

    read: dict[Path, dict[str, Any]] = field(default_factory=dict)
    place: str = f"in {WITH_COLUMNS}"
    columns: dict[tuple[Path, str], tuple[dict[str, Any], str]] = field(default_factory=dict)

    def column(self, table: Path, name: str) -> tuple[dict[str, Any], str]:
        """What the sidecar of a table says of a column, whose name may be in another case, and the sidecar's name."""
        if (table, name) not in self.columns:
            self.columns[table, name] = self._find(table, name)
        return self.columns[table, name]

    def _find(self, table: Path, name: str) -> tuple[dict[str, Any], str]:
        candidates = [table.with_suffix(".json")]
        if table.name.endswith("_sessions.tsv"):  # BIDS: a file at the top of the data set holds for all below it
            candidates.append(table.parent.parent / "sessions.json")
        for path in candidates:
            if path not in self.read:
                self.read[path] = read_sidecar(path)
            described = _entry(self.read[path], (name,), str(path))
            if isinstance(described, dict):
                levels = _entry(described, LEVELS, f"{path}: {name}")
                if levels is not None and not isinstance(levels, dict):
                    warn(
                        f"{path}: {name}: Levels is not read, it must map each code to its label, as in "
                        f'{{"0": "control"}}, found {type(levels).__name__}'
                    )
                return described, str(path)
            if described is not None:
                warn(f"{path}: {name} is ignored, it must hold keys and values, found {type(described).__name__}")
        return {}, ""

    def unit(self, column: str, table: Path, theirs: str, declared: str = "") -> str:
        """The unit of a column in a table: the declared one, or else the sidecar's ``Units``; empty if none is stated.

        Raises UserError if the sidecar's unit is not known.
        """
        if declared or column not in UNITS:
            return declared
        described, path = self.column(table, theirs)
        stated = _entry(described, UNITS_KEYS) or ""
        if not isinstance(stated, str) or stated.strip().lower() not in NOT_STATED:
            return known_unit(column, stated, f"{path}: {theirs}: Units", self.place)
        return ""

    def label(self, table: Path, theirs: str, text: str) -> tuple[str | None, str]:
        """The label of a code in the sidecar's ``Levels``, and the sidecar's name; None if the code has no label.

        Codes are numbers and single letters. Words are labels themselves; their ``Levels`` describe them.
        """
        if parse_number(text) is None and len(text) != 1:
            return None, ""
        described, path = self.column(table, theirs)
        levels = _entry(described, LEVELS)
        if isinstance(levels, dict):
            for code, label in levels.items():
                words = _entry(label, ("Description",)) if isinstance(label, dict) else label
                if same(text, str(code).strip()) and isinstance(words, str):
                    return words.strip(), path
        return None, ""


def describing_words(described: dict[str, Any]) -> str:
    """What a sidecar says of a column in words, in lower case."""
    return " ".join(str(_entry(described, (key,)) or "") for key in ("Description", "LongName")).lower()


def _entry(content: dict[str, Any], names: Sequence[str], where: str = "") -> Any:
    """The value of the first of ``names`` that a JSON object has, in any case; None if it has none.

    Prints a warning, which begins with ``where``, if several keys differ in case only.
    """
    for name in names:
        keys = [key for key in content if _plain(key) == _plain(name)]
        if keys:
            chosen = name if name in content else keys[0]
            if where and len(keys) > 1:
                warn(f"{where}: the keys {', '.join(keys)} are one name; {chosen} is read")
            return content[chosen]
    return None


def _plain(name: str) -> str:
    return known_name(name).casefold()


def known_unit(column: str, text: Any, where: str, place: str = "") -> str:
    """The name of a unit in ``UNITS``; raises UserError, which begins with ``where``, if it is not known.

    ``place`` is where another unit can be declared; empty if nowhere else.
    """
    units = UNITS[column]
    word = str(text).strip().lower()
    unit = SPELLINGS.get(word, word)
    if unit not in units:
        raise UserError(
            f"{where}={text!r} is not a known unit; allowed: {', '.join(units)}; correct it"
            + (f", or declare `units: {{{column}: {next(iter(units))}}}` {place}" if place else "")
        )
    return unit


def read_report(folder: Path, stem: str) -> dict[str, float]:
    """Read ``cat12_iqr`` and ``tiv`` from CAT12's report of a scan; empty if the report is missing or damaged."""
    path = folder / f"cat_{stem}.xml"
    if not path.is_file():
        return {}
    try:
        tree = ElementTree.parse(path)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        warn(f"{path} is ignored, it is not XML: {' '.join(str(error).split())}")
        return {}
    measures = {}
    for name, element in CAT12_MEASURES.items():
        # Newer versions also have a description under the same element name, before or after the number.
        numbers = [value for value in map(_number, tree.iterfind(f".//{element}")) if value is not None]
        if numbers:
            measures[name] = numbers[0]
    return measures


def stem_of(path: Path) -> str:
    """The name of the T1 image of one of CAT12's maps, without ending."""
    return path.name.removeprefix("mwp1").removesuffix(".gz").removesuffix(".nii")


def cat12_measures(path: Path) -> dict[str, float]:
    """What CAT12 reports of a map: in ``report`` beside ``mri``, or in the map's own folder if CAT12 ran on a BIDS tree."""
    for folder in (path.parent.parent / "report", path.parent, path.parent / "report"):
        report = read_report(folder, stem_of(path))
        if report:
            return report
    return {}


def _number(element: ElementTree.Element) -> float | None:
    """An element's finite number, or None."""
    try:
        value = float((element.text or "").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
