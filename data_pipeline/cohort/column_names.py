"""Which columns of a table are read under which names; and columns that look like a split or an age but are not read so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from data_pipeline.cohort.cells import MISSING, as_yaml, folded, parse_number
from data_pipeline.cohort.declarations import ALL, IDENTITY, RESERVED, DataSet
from data_pipeline.cohort.sidecars import UNITS
from data_pipeline.cohort.split import SPLIT
from data_pipeline.cohort.table_file import Row
from data_pipeline.cohort.texts import warn
from infra.errors import UserError, nearest

MOST_VALUES = 10  # of a column that divides people into parts
MOST_SHOWN = 3  # values that a message names
TRAIN_WORDS = frozenset({"train", "training", "trainset", "trainingset", "pretrain", "pretraining"})
TEST_WORDS = frozenset({
    "test", "testing", "testset", "tests", "heldout", "holdout", "heldouttest", "holdouttest", "testonly",
})  # fmt: skip
OTHER_WORDS = frozenset({
    "val", "valid", "validation", "validationset", "dev", "development", "monitor", "downstream", "tune", "tuning", "eval",
    "evaluation", "trainval",
})  # fmt: skip
FLAGS = frozenset({"0", "1", "yes", "no", "y", "n", "true", "false", "t", "f", "x"})
PART_NAME = re.compile(r"(data|sub)?(set|fold|partition|phase|part|usage|role|cohort)s?\d*")
FLAG_NAME = re.compile(
    r"(is|in|for)?(train|test|val|validation|heldout|holdout)(ing)?(set|subject|participant|flag)?s?"
)


def looks_like_split(name: str, texts: Iterable[str]) -> bool:
    """Whether a column seems to declare who is trained on and who is tested, by its values and its name.

    ``texts`` are its values that are not missing.
    """
    values = {folded(text) for text in texts}
    train, test = bool(values & TRAIN_WORDS), bool(values & TEST_WORDS)
    words = values & (TRAIN_WORDS | TEST_WORDS | OTHER_WORDS)
    if not values or len(values) > MOST_VALUES:
        return False
    plain = folded(name)
    if "split" in plain or ("train" in plain and "test" in plain):
        return True
    if FLAG_NAME.fullmatch(plain) and values <= FLAGS:
        return True
    if PART_NAME.fullmatch(plain) and words:
        return True
    return (train and test) or (words == values and (test or len(words) > 1))


def looks_like_age(name: str) -> str:
    """The unit that the name of a column of ages states, ``years`` if none; empty if the name does not mean an age."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold())
    if not words or ("age" not in words and words[0] not in ("ages", "agemonths", "ageyears", "agedays", "ageweeks")):
        return ""
    whole = " ".join(words)
    return next((f"{unit}s" for unit in ("month", "week", "day") if unit in whole), "years")


def columns_to_read(source: DataSet, rows: Sequence[Row], others: Sequence[Row] = ()) -> dict[str, str]:
    """Our name -> their name of the columns to read.

    Args:
        source: the data set.
        rows: the rows of the scans.
        others: rows of its tables that belong to no scan; they may declare a split.

    Raises:
        UserError: no table has a declared column, or a column that declares a split would not be read as the split.
    """
    present = list(dict.fromkeys(column for row in rows for column in row.columns()))
    everywhere = dict.fromkeys([*present, *(column for row in others for column in row.columns())])
    taken = _taken(source, present)
    if (SPLIT in everywhere and SPLIT not in source.left_out) or SPLIT in taken:
        _take_split(source, taken, everywhere)
    _check_declared(source, taken, present, list(everywhere))
    return taken


def _taken(source: DataSet, present: Sequence[str]) -> dict[str, str]:
    """The columns that the declaration takes; without one, all but ids and dates."""
    ids = IDENTITY | {source.column(name) for name in IDENTITY}
    dates = {source.age[key] for key in ("birth", "scan") if key in source.age}  # dates could identify a person
    if source.columns is None:
        return {name: name for name in present if name not in {*ids, *dates, *RESERVED, *source.left_out}}
    return {ours: theirs for ours, theirs in source.columns.items() if ours not in IDENTITY}


def _take_split(source: DataSet, taken: dict[str, str], everywhere: Iterable[str]) -> None:
    """Read the tables' column ``split`` also if a declaration lists other columns only: test people must not be trained on."""
    if isinstance(source.values.get(SPLIT), str):
        raise UserError(
            f"{source.declared_in}: values.{SPLIT} is one split for every scan, but the tables of {source.name} have a column "
            f"{taken.get(SPLIT, SPLIT)!r}; remove the constant, or leave the column out: "
            f"`columns: {{{as_yaml(taken.get(SPLIT, SPLIT))}: null}}`"
        )
    renamed = [ours for ours, theirs in taken.items() if theirs == SPLIT and ours != SPLIT]
    if SPLIT in taken:
        if taken[SPLIT] != SPLIT and SPLIT in everywhere and not renamed and SPLIT not in source.left_out:
            warn(f"{source.name}: the split is read from the column {taken[SPLIT]!r}, as {source.declared_in} declares; "
                 f"the tables' column {SPLIT!r} is not read")  # fmt: skip
        return
    if renamed:
        raise UserError(
            f"{source.declared_in}: columns.{renamed[0]}: {SPLIT} reads the tables' column {SPLIT!r} as {renamed[0]!r}, so "
            f"that nobody's split would be read; write `columns: {{{SPLIT}: {as_yaml(renamed[0])}}}` to read the column "
            f"{renamed[0]!r} as the split, or `columns: {{{SPLIT}: {SPLIT}}}`"
        )
    taken[SPLIT] = SPLIT


def _check_declared(
    source: DataSet, taken: Mapping[str, str], present: Sequence[str], everywhere: Sequence[str]
) -> None:
    """Raise UserError if no table has a declared column, or a rule is for a column that is not read."""
    for name in source.left_out if everywhere else ():
        if name not in everywhere:
            raise UserError(
                f"{source.declared_in}: columns.{name}: null: no table of {source.name} has a column {name!r}"
                f"{nearest(name, everywhere)}; found: {', '.join(everywhere)}"
            )
    for ours, theirs in [*taken.items(), *((f"age.{key}", source.age[key]) for key in ("birth", "scan") if source.age)]:
        if present and theirs not in present and not (ours == SPLIT and theirs in everywhere):
            raise UserError(
                f"{source.declared_in}: {ours}: no table of {source.name} has a column {theirs!r}{nearest(theirs, present)}; "
                f"found: {', '.join(present)}"
            )
    rules = {"values": [n for n, rule in source.values.items() if not isinstance(rule, str)]}
    rules |= {key: list(getattr(source, key)) for key in ("missing", "default", "cap", "units", "types", "only")}
    for key, names in rules.items():
        for name in names:
            constant = key != "values" and isinstance(source.values.get(name), str)
            known = name in taken or name == ALL or (name == "age" and source.age) or constant
            if present and not known and not (key == "units" and name in UNITS):
                raise UserError(
                    f"{source.declared_in}: {key}.{name}: {source.name} has no column {name!r}{nearest(name, taken)}; "
                    f"found: {', '.join(taken)}"
                )


def check_similar_columns(source: DataSet, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Name columns that are not read as split or age but look like one.

    ``columns`` are those that are read, ``rows`` all rows of the data set's tables, also those without a scan.

    Raises:
        UserError: nothing declares the splits, and a column looks like a split.
    """
    texts: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, text in row.values.items():
            if text.strip() not in MISSING:
                texts.setdefault(name, {})[text.strip()] = None
    declared = {*(source.columns or {}).values(), *source.left_out, *source.age.values()}
    for name, values in texts.items():
        if name in (SPLIT, *IDENTITY) or name in declared or not looks_like_split(name, values):
            continue
        shown = ", ".join(list(values)[:MOST_SHOWN])
        if SPLIT in columns:
            warn(f"{source.name}: the column {name!r} ({shown}) looks like a split; it is not used, the column "
                 f"{columns.get(SPLIT, SPLIT)!r} decides")  # fmt: skip
            continue
        leave = _with_all(source, columns, f"{as_yaml(name)}: null", without=name)
        raise UserError(
            f"{source.name}: the column {name!r} ({shown}) looks like a split, but nothing reads it as one; declare "
            f"`columns: {{{_with_all(source, columns, f'{SPLIT}: {as_yaml(name)}', without=name)}}}`, or "
            f"`columns: {{{leave}}}` to leave it out, {source.place}"
        )
    _hint_at_age(source, columns, texts)


def _with_all(source: DataSet, columns: Mapping[str, str], first: str, without: str) -> str:
    """The entries of ``columns:`` that read one column differently and the others as before."""
    others = columns.items() if source.columns is not None or not first.endswith(": null") else ()
    same = [f"{as_yaml(ours)}: {as_yaml(theirs)}" for ours, theirs in others if without not in (ours, theirs)]
    return ", ".join([first, *same])


def _hint_at_age(source: DataSet, columns: Mapping[str, str], texts: Mapping[str, Iterable[str]]) -> None:
    """Say which column could be the age if no column is."""
    if source.columns is not None or "age" in columns or source.age or "age" in source.values:
        return
    for name, values in texts.items():
        unit = looks_like_age(name)
        numbers = sum(parse_number(text) is not None for text in values)
        if unit and name in columns and 2 * numbers > len(list(values)):
            entries = _with_all(source, columns, f"age: {as_yaml(name)}", without=name)
            warn(f"{source.name}: no column is named age, so no scan has an age; if {name!r} holds it, declare "
                 f"`columns: {{{entries}}}` and `units: {{age: {unit}}}` {source.place}")  # fmt: skip
            return
