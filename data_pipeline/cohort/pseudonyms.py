"""Keyed hashes in place of participants' ids: the same for the same key file, unreadable without it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.cohort.scan import Scan
from infra.errors import UserError

LEAST_BYTES = 16
DIGITS = 12
LEAST_LETTERS = 3  # of an id to look for it inside other texts; shorter ones are in any text


def read_key(path: Path) -> bytes:
    """The secret bytes of a key file; UserError where it is missing or so short that hashes could be guessed back."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--pseudonymise={path} cannot be read ({error.strerror}); make one with `head -c 32 /dev/urandom > {path}`"
        ) from None
    if len(key) < LEAST_BYTES:
        raise UserError(f"--pseudonymise={path} holds {len(key)} bytes; at least {LEAST_BYTES} are needed")
    return key


def pseudonym(key: bytes, dataset: str, participant: str) -> str:
    """HMAC-SHA256 of ``dataset/participant``, its first 12 hexadecimal digits."""
    return hmac.new(key, f"{dataset}/{participant}".encode(), hashlib.sha256).hexdigest()[:DIGITS]


def key_mark(key: bytes) -> str:
    """What tells one key from another in a manifest and does not give it away."""
    return hmac.new(key, b"", hashlib.sha256).hexdigest()[:DIGITS]


def pseudonymise(scans: Sequence[Scan], key: bytes) -> list[Scan]:
    """Scans under pseudonyms, in the order of their new keys (the old order would tell the ids apart).

    The id also goes out of the other columns' texts, and a column of numbers that is a copy of the ids goes as a whole.
    The path stays, since the file must be read; ``place`` no longer shows it.
    """
    named = {(scan.dataset, scan.participant_id): "" for scan in scans}
    for dataset, participant in named:
        named[dataset, participant] = pseudonym(key, dataset, participant)
    taken: dict[tuple[str, str], str] = {}
    for (dataset, participant), name in named.items():
        if taken.setdefault((dataset, name), participant) != participant:
            raise UserError(
                f"--pseudonymise: two participants of {dataset} have the pseudonym {name}; use another key file"
            )
    copies = _copies_of_ids(scans)
    hidden = [_hide(scan, named[scan.dataset, scan.participant_id], copies) for scan in scans]
    return sorted(hidden, key=lambda scan: (scan.key, scan.shown_as))


def _hide(scan: Scan, name: str, copies: set[str]) -> Scan:
    def clean(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        known = value.strip().removeprefix("sub-") == scan.participant_id
        if known or (len(scan.participant_id) >= LEAST_LETTERS and scan.participant_id in value):
            return value.replace(scan.participant_id, name)
        return value

    extra = {column: clean(value) for column, value in scan.extra.items() if column not in copies}
    hidden = replace(scan, participant_id=name, session=clean(scan.session), run=clean(scan.run), extra=extra)
    endings = "".join(
        s for s in scan.path.suffixes[-2:] if s.lower() in (".nii", ".gz", ".npy", ".mgz", ".mgh", ".img", ".hdr")
    )
    return replace(hidden, shown_as=f"{hidden.key}{endings}")


def _copies_of_ids(scans: Sequence[Scan]) -> set[str]:
    """Columns of numbers that hold every participant's own id."""
    columns = {column for scan in scans for column, value in scan.extra.items() if isinstance(value, float)}
    copies = set()
    for column in columns:
        held = [(scan.extra.get(column), scan.participant_id) for scan in scans if scan.extra.get(column) is not None]
        if all(isinstance(v, float) and _is_number(name, v) for v, name in held):
            copies.add(column)
    return copies


def _is_number(name: str, value: float) -> bool:
    digits = name.lstrip("0") or "0"
    return digits.isdigit() and digits == f"{value:.0f}"
