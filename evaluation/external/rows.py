"""Which scan of the shards each row of a table is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cohort.cells import MISSING
from data_pipeline.cohort.scan import entities_of
from data_pipeline.cohort.tables import without_prefix
from data_pipeline.storage.manifest import Manifest
from evaluation.external.sheet import NAME, Sheet
from infra.errors import UserError, nearest

SHOWN = 3  # examples in a message
PREFIXES = {"participant_id": "sub-", "session": "ses-", "run": "run-", "dataset": ""}
NO_SCAN = -1
# What CAT12 and others put around a scan's name in a file's name.
WRAPPING = re.compile(r"^(catROIs?_|mwp[123]|m?wm|cat_)|(\.(nii|xml|csv|mgz|npy|gz))+$")


class ScanIndex:
    """The scans of shards by key and by participant."""

    def __init__(self, manifest: Manifest) -> None:
        scans = manifest.scans
        self.keys: dict[str, int] = {str(key): row for row, key in enumerate(scans["key"])}
        self.names = list(self.keys)
        values = scans[list(PREFIXES)].astype(str).itertuples(index=False, name=None)
        self.identities = [
            {
                column: without_prefix(text, prefix)
                for text, (column, prefix) in zip(texts, PREFIXES.items(), strict=True)
            }
            for texts in values
        ]
        self.pseudonymised = bool(manifest.settings.get("pseudonymised", False))
        self._of_participant: dict[str, list[int]] = {}
        for row, identity in enumerate(self.identities):
            self._of_participant.setdefault(identity["participant_id"], []).append(row)

    def matching(self, wanted: Mapping[str, str]) -> list[int]:
        """Return the rows of the scans with these values of ``PREFIXES``; a value that is not there fits every scan."""
        rows = self._of_participant.get(wanted["participant_id"], [])
        return [row for row in rows if all(self.identities[row][column] == value for column, value in wanted.items())]

    def of_name(self, name: str) -> list[int]:
        """Return the rows of the scans that the name of a folder or file means.

        That is a key, a participant, or BIDS entities (``sub-01_ses-2_T1w``); FreeSurfer's longitudinal folders
        (``sub-01_ses-2.long.sub-01``) and the beginnings of CAT12's files are understood.
        """
        plain = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1].partition(".long.")[0]
        for text in (plain, WRAPPING.sub("", WRAPPING.sub("", plain))):
            if text in self.keys:
                return [self.keys[text]]
            if rows := self.matching({"participant_id": text.removeprefix("sub-")}):
                return rows
            entities = entities_of(text.split("_"))
            if "sub" in entities:
                named = {"participant_id": "sub", "session": "ses", "run": "run"}
                wanted = {column: entities[entity] for column, entity in named.items() if entity in entities}
                before = text.partition("sub-")[0].removesuffix("_")
                if any(before == identity["dataset"] for identity in self.identities):
                    wanted["dataset"] = before
                return self.matching(wanted)
        return []


def rows_of_scans(sheet: Sheet, index: ScanIndex, *, others_allowed: bool = False) -> NDArray[np.int64]:
    """Return for each row of a table the row of its scan in the manifest, (R,); NO_SCAN for one that is no scan of the shards.

    Args:
        sheet: the table.
        index: the scans of the shards.
        others_allowed: whether rows may belong to no scan of the shards; at least one must belong to one.

    Raises:
        UserError: naming the row, if it is about no scan, several scans, or the scan of an earlier row.
    """
    places = np.full(len(sheet.where), NO_SCAN)
    owner: dict[int, int] = {}
    others = []
    for number, where in enumerate(sheet.where):
        shown, rows = _scans_of_row(sheet, index, number)
        if not rows:
            others.append((where, shown))
            continue
        if len(rows) > 1:
            raise UserError(f"{where}: {shown} fits {len(rows)} scans of the shards ({_several(index, rows)}")
        if rows[0] in owner:
            earlier = sheet.where[owner[rows[0]]]
            raise UserError(
                f"{where}: {shown} is the scan {index.names[rows[0]]} again, after {earlier}; keep one row a scan"
            )
        places[number], owner[rows[0]] = rows[0], number
    if others and (not owner or not others_allowed):
        raise UserError(_why_no_scan(sheet, index, others, any_scan=bool(owner)))
    return places


def _scans_of_row(sheet: Sheet, index: ScanIndex, number: int) -> tuple[str, list[int]]:
    """Return what a row of a table says of its scan, for messages, and the rows of the scans that it fits.

    Raises UserError if it says nothing.
    """
    ids = {column: texts[number] for column, texts in sheet.ids.items()}
    where = sheet.where[number]
    main = next(column for column in ("key", "participant_id", NAME) if column in ids)
    if ids[main] in MISSING:
        label = "the name of the scan" if main == NAME else main
        raise UserError(f"{where}: {label} is empty; every row needs one")
    if main == NAME:
        return repr(ids[NAME]), index.of_name(ids[NAME])
    if main == "key":
        key = ids["key"]
        return f"key {key!r}", [index.keys[key]] if key in index.keys else []
    wanted = {column: without_prefix(ids[column], prefix) for column, prefix in PREFIXES.items() if column in ids}
    wanted = {column: text for column, text in wanted.items() if text}
    return ", ".join(f"{column} {ids[column]!r}" for column in wanted), index.matching(wanted)


def _several(index: ScanIndex, rows: Sequence[int]) -> str:
    """Name the scans that a row fits, and what would tell them apart."""
    different = next(
        column for column in ("dataset", "session", "run") if len({index.identities[row][column] for row in rows}) > 1
    )
    return f"{few([index.names[row] for row in rows])}); name its {different} (a column {different}), or its key"


def _why_no_scan(
    sheet: Sheet, index: ScanIndex, others: Sequence[tuple[str, str]], *, any_scan: bool
) -> str:  # fmt: skip
    """Return one line about rows that are no scans of the shards."""
    where, shown = others[0]
    if not any_scan:
        turned = any(index.of_name(column) for column in sheet.columns[:SHOWN])
        hint = f"its rows name scans such as {shown}, the shards hold {index.names[0]}"
        if turned:
            hint = "its columns are the scans; write it without --transpose (asegstats2table, aparcstats2table)"
        elif index.pseudonymised:
            hint += "; the shards hold pseudonyms: name the rows by key"
        return f"{where}: none of the {len(others)} rows of {sheet.name} is a scan of the shards: {hint}"
    more = f", and so are {len(others) - 1} other rows" if len(others) > 1 else ""
    return (
        f"{where}: {shown} is no scan of the shards{_hint(index, shown)}{more}; correct the row, or give --common-scans to "
        "leave such rows out"
    )


def _hint(index: ScanIndex, shown: str) -> str:
    """Return the nearest name of a scan; empty if none is near."""
    text = shown.partition("'")[2].rpartition("'")[0].partition("'")[0]
    participants = {identity["participant_id"] for identity in index.identities}
    zeros = [name for name in participants if name.lstrip("0") == text.removeprefix("sub-").lstrip("0")]
    if zeros and zeros[0] != text.removeprefix("sub-"):
        return f" (the shards have the participant {zeros[0]!r}, with other zeros in front)"
    return nearest(text, index.keys if "key " in shown else participants)


def few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
