"""Declarations of data sets in YAML files, and how they turn the texts of tables into values; nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.cohort.cells import MISSING, TEXT_COLUMNS, TYPES, known_name, parse_number
from data_pipeline.cohort.scan import safe_name
from data_pipeline.cohort.sidecars import UNITS, WITH_COLUMNS, known_unit
from data_pipeline.cohort.tables import SESSION_COLUMNS
from infra.errors import UserError, nearest
from infra.files import read_text

IDENTITY = {"participant_id", "run", "path", *SESSION_COLUMNS}
# Columns of the manifest itself; a data set must not define them.
RESERVED = {"key", "shard", "offset", "size", "crc32c", "dataset"}
ALL = "all"  # the key of `missing` that stands for every column
AGE_KEYS = ("birth", "scan", "format")
MAX_LICENCE = 1000  # letters of a licence; a longer text is the licence itself, not its name


@dataclass(frozen=True)
class DataSet:
    """One data set of a cohort, as declared in YAML; see ``docs/cohorts.md``.

    "Our" names are those of the scan table, "their" names those of the data set's own tables.

    Attributes:
        path: the folder, or the table of layout ``csv``.
        name: begins every key.
        layout: empty to detect it.
        participants: the participants' table, if it is not at the layout's usual place.
        orientation: of .npy arrays; empty for that of their known grid.
        columns: our name -> their name; None to read all columns.
        left_out: their names of columns that ``columns`` maps to null: they are not read.
        values: our name -> a constant, or their text -> our text. Other texts stay as they are.
        only: our names or ``all``: their texts must all have a rule in ``values``.
        missing: our name or ``all`` -> texts that mean missing.
        default: our name -> our text of missing cells.
        cap: our name -> the highest value: lower bounds such as 89+ and higher values are read as it.
        units: ``age`` or ``tiv`` -> the unit of the table.
        types: our name -> ``number`` or ``text``.
        person: our names of columns that hold for every session of a person, also those without a row.
        age: the columns of the dates of ``birth`` and ``scan``, and the ``format`` of dates.
        licence: under which the data set is given, in its own words; empty if it is not declared.
        declared_in: the file that declares it, for messages.
        declared: a file declares it.
        text: our names of columns that are text, because they are text in another data set; not declared.
        number: our names of columns that hold numbers in the shards to which the scans will be added; not declared.
    """

    path: Path
    name: str = ""
    layout: str = ""
    participants: Path | None = None
    orientation: str = ""
    columns: dict[str, str] | None = None
    left_out: tuple[str, ...] = ()
    values: dict[str, str | dict[str, str]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    missing: dict[str, list[str]] = field(default_factory=dict)
    default: dict[str, str] = field(default_factory=dict)
    cap: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    person: tuple[str, ...] = ()
    age: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    declared_in: str = ""
    declared: bool = False
    text: tuple[str, ...] = ()
    number: tuple[str, ...] = ()

    def column(self, name: str) -> str:
        """Their name of one of our columns."""
        return (self.columns or {}).get(name, name)

    @property
    def place(self) -> str:
        """Where its rules are declared, or could be, for messages."""
        return f"in {self.declared_in}" if self.declared else f"in {WITH_COLUMNS}"

    def type_of(self, name: str) -> str:
        """``number`` or ``text`` if the type of one of our columns is fixed, else empty."""
        return "text" if name in self.text else self.types.get(name, "")


def read_data_sets(path: Path) -> list[DataSet]:
    """Read the data sets that a YAML file lists; paths are relative to that file.

    Raises UserError if a key or a value is wrong or two data sets have one name.
    """
    content = _load(path)
    _refuse_unknown(content, ["datasets"], str(path))
    listed = content.get("datasets")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: datasets must be a list of data sets, each with a path and a name")
    data_sets = []
    for number, entry in enumerate(listed):
        where = f"{path}: datasets[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f"{where}: path is missing; give the data set's folder (or its table, for layout csv)")
        data_sets.append(_data_set(entry, where, path.parent, KEYS))
    names = [source.name for source in data_sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{path}: {names.count(name)} data sets have the name {name!r}; give each its own with name:"
            )
    return data_sets


def declare(source: DataSet, path: Path) -> DataSet:
    """Add the columns and rules of a YAML file for one data set (``--columns``) to ``source``.

    Raises UserError if a key or a value is wrong.
    """
    rules = [key for key in KEYS if key not in ("path", "name", "layout")]
    declared = _data_set({**_load(path), "path": str(source.path)}, str(path), path.parent, ["path", *rules])
    return replace(declared, path=source.path, name=source.name, layout=source.layout)


KEYS = [
    key.name for key in fields(DataSet) if key.name not in ("declared_in", "declared", "text", "number", "left_out")
]


class _TextLoader(yaml.BaseLoader):
    """A YAML loader that keeps every scalar as text (0 is "0", yes is "yes") and refuses repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; raises ConstructorError if a key is repeated."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=True)
        return mapping


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_text(path), _TextLoader)
    except FileNotFoundError:
        raise UserError(f"{path} not found; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values, found {type(content).__name__}")
    return content


def _refuse_unknown(content: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in content:
        if key not in allowed:
            raise UserError(
                f"{where}: unknown key {key!r}{nearest(str(key), allowed)}; allowed here: {', '.join(allowed)}"
            )


def _data_set(entry: dict[str, Any], where: str, folder: Path, allowed: Sequence[str]) -> DataSet:
    """A data set from its YAML entry; ``where`` names the entry in messages, paths are relative to ``folder``."""
    _refuse_unknown(entry, allowed, where)
    for key in ("path", "name", "layout", "participants", "orientation"):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            raise UserError(f"{where}: {key} must be one word or path, found {entry[key]!r}")
    path = (folder / entry["path"]).resolve()
    entry = _in_our_spelling(entry, where)
    columns, left_out = _columns(entry, f"{where}: columns")
    age = _texts(entry.get("age", {}), f"{where}: age")
    age = {key: text if key == "format" else known_name(text) for key, text in age.items()}
    _refuse_unknown(age, AGE_KEYS, f"{where}: age")
    if age and not {"birth", "scan"} <= age.keys():
        raise UserError(f"{where}: age needs both columns, as in `age: {{birth: birth_date, scan: scan_date}}`")
    if age and columns and "age" in columns:
        raise UserError(f"{where}: age is both a column (columns.age) and computed from dates (age); keep one of them")
    orientation = check_orientation(entry.get("orientation", ""), f"{where}: orientation")
    values, only = _values(entry.get("values", {}), f"{where}: values")
    if "only" in entry and _is_true(entry["only"], f"{where}: only"):
        only = (ALL,)
    return DataSet(
        path=path,
        name=safe_name(entry.get("name") or path.name.partition(".")[0] or path.name),
        layout=entry.get("layout", ""),
        participants=(folder / entry["participants"]).resolve() if "participants" in entry else None,
        orientation=orientation,
        columns=columns,
        left_out=left_out,
        values=values,
        only=only,
        missing=_missing(entry.get("missing", []), f"{where}: missing"),
        default=_texts(entry.get("default", {}), f"{where}: default"),
        cap=_caps(entry.get("cap", {}), f"{where}: cap"),
        units=_units(entry.get("units", {}), f"{where}: units"),
        types=_types(entry.get("types", {}), f"{where}: types"),
        person=_names(entry.get("person", []), f"{where}: person"),
        age=age,
        licence=licence_text(entry["licence"], f"{where}: licence") if "licence" in entry else "",
        declared_in=where,
        declared=True,
    )


BY_COLUMN = ("columns", "values", "missing", "default", "cap", "units", "types")  # keys that map our columns to rules
NULL = ("null", "Null", "NULL", "~")


def _in_our_spelling(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry with the known names of columns in our spelling; raises UserError if two names become equal."""
    entry = dict(entry)
    for key in BY_COLUMN:
        rules = entry.get(key)
        if not isinstance(rules, dict):
            continue
        first: dict[str, str] = {}
        for name in rules:
            if first.setdefault(known_name(name), name) != name:
                ours = known_name(name)
                raise UserError(f"{where}: {key}: {first[ours]!r} and {name!r} are both {ours!r}; keep one of them")
        entry[key] = {known_name(name): rule for name, rule in rules.items()}
    return entry


def _columns(entry: dict[str, Any], where: str) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Their name of each of our columns, None to read all; and the columns to leave out, which are mapped to null."""
    if "columns" not in entry:
        return None, ()
    texts = _texts(entry["columns"], where)
    columns = {ours: known_name(theirs) for ours, theirs in texts.items() if theirs not in NULL}
    for ours in columns:
        if ours in RESERVED:
            raise UserError(f"{where}.{ours}: the manifest itself has a column of this name; choose another")
    left_out = tuple(ours for ours in texts if ours not in columns)
    return (columns if columns or not left_out else None), left_out


def check_orientation(text: str, where: str) -> str:
    """Return an orientation such as ``LAS`` in capitals, or an empty text unchanged.

    Raises UserError, which begins with ``where``, if the text is anything else.
    """
    orientation = text.upper()
    if orientation and (len(orientation) != 3 or {"LR", "PA", "IS"} != {_axis(letter) for letter in orientation}):
        raise UserError(f"{where}={text!r} is not an orientation such as RAS, LAS or LPI")
    return orientation


def licence_text(value: Any, where: str) -> str:
    """Return the words of a licence in one line.

    Raises UserError, which begins with ``where``, if there are none or too many.
    """
    words = " ".join(value.split()) if isinstance(value, str) else ""
    if words in MISSING or not words.isprintable() or len(words) > MAX_LICENCE:
        raise UserError(
            f"{where}={value!r:.80} is not a licence; give its name or terms in at most {MAX_LICENCE} letters, such as CC0"
        )
    return words


def _axis(letter: str) -> str:
    """The axis of a direction, for example ``LR`` of ``L``."""
    return next((pair for pair in ("LR", "PA", "IS") if letter in pair), letter)


def _texts(content: Any, where: str) -> dict[str, str]:
    """Check that a value maps names to names."""
    if not isinstance(content, dict) or not all(isinstance(text, str) and text for text in content.values()):
        raise UserError(f"{where} must map names to names, found {content!r}")
    return content


def _values(content: Any, where: str) -> tuple[dict[str, str | dict[str, str]], tuple[str, ...]]:
    """Check the rules of ``values``; return them, and the columns whose rules say ``only: true``."""
    if not isinstance(content, dict):
        raise UserError(f"{where} must map columns to rules, as in `values: {{sex: {{0: M, 1: F}}, site: london}}`")
    only = []
    for name, rule in content.items():
        rules = rule.values() if isinstance(rule, dict) else [rule]
        if name in RESERVED | IDENTITY or not all(isinstance(text, str) for text in rules):
            raise UserError(
                f"{where}.{name} must be a constant or map their values to ours, and the column must not be an id"
            )
        if isinstance(rule, dict) and "only" in rule and _is_true(rule["only"], f"{where}.{name}.only"):
            only.append(name)
    values = {
        name: {theirs: ours for theirs, ours in rule.items() if theirs != "only"} if isinstance(rule, dict) else rule
        for name, rule in content.items()
    }
    return values, tuple(only)


def _is_true(text: Any, where: str) -> bool:
    """Whether a text is ``true``; raises UserError if it is neither ``true`` nor ``false``."""
    if text not in ("true", "false"):
        raise UserError(f"{where} must be true or false, found {text!r}")
    return bool(text == "true")


def _caps(content: Any, where: str) -> dict[str, float]:
    """Check the highest values; a single number is that of age."""
    by_column = {"age": content} if isinstance(content, str) else content
    caps = {name: parse_number(text) for name, text in _texts(by_column, where).items()}
    for name, cap in caps.items():
        if cap is None:
            raise UserError(
                f"{where}.{name}={by_column[name]!r} is not a number, as in `cap: 89` or `cap: {{age: 89}}`"
            )
    return {name: cap for name, cap in caps.items() if cap is not None}


def _units(content: Any, where: str) -> dict[str, str]:
    """Check the units of columns."""
    for name in _texts(content, where):
        if name not in UNITS:
            raise UserError(f"{where}.{name}: only {' and '.join(UNITS)} have a unit; remove it")
    return {name: known_unit(name, unit, f"{where}.{name}") for name, unit in content.items()}


def _types(content: Any, where: str) -> dict[str, str]:
    """Check the types of columns."""
    for name, text in _texts(content, where).items():
        if text not in TYPES or name in TEXT_COLUMNS:
            fixed = f"; the type of {name} is fixed" if name in TEXT_COLUMNS else ""
            raise UserError(f"{where}.{name}={text!r} is not known{nearest(text, TYPES)}; allowed: number, text{fixed}")
    return dict(content)


def _names(content: Any, where: str) -> tuple[str, ...]:
    """Check a list of names."""
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{where} must be a list of columns, as in `person: [sex, site]`, found {content!r}")
    return tuple(known_name(name) for name in content)


def _missing(content: Any, where: str) -> dict[str, list[str]]:
    """Check the lists of ``missing``; a single list is for all columns."""
    by_column = content if isinstance(content, dict) else {ALL: content}
    for name, texts in by_column.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}.{name} must be a list of values, as in `missing: {{age: [999, -9]}}` or `missing: [-9]`"
            )
    return by_column
